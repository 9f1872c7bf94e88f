"""From any source to a plain checkpoint in the hub's own layout: canonical names, 16 or 32 bits, sharded safetensors.

Where the hub's file stacks the experts of a layer in one tensor and the source does not, or the other way round, each
weight is written where it belongs in the other; one weight at a time, so that memory does not grow with the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lmx.convert.events import Finished, Progress
from lmx.core.checkpoint import INDEX, Source
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.finite import check_finite, is_finite
from lmx.core.job import check_job, job_identity
from lmx.core.jsonfile import to_json
from lmx.core.loader import DECODER_PREFIX, HEAD_NAMES, build_bound, hub_shapes, stored_head
from lmx.core.mapped import ITEM_SIZES, Advice, stored_name, torch_dtypes
from lmx.core.names import NameTable, Piece, Shape
from lmx.core.output import OutputFolder, open_output
from lmx.core.registry import family_of
from lmx.core.shards import DEFAULT_SHARD_BYTES, Shard, ShardWriter, Slot, index_json, plan_shards

# Changes whenever the same source and options would give other bytes: a half-made output of before is not continued.
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Options:
    """How to write. dtype: of every weight, None keeps each as the source has it; companions: files that are copied."""

    dtype: torch.dtype | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    force: bool = False
    companions: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class _Target:
    """A tensor of the output and the weights in it: where in the source each is, and where in the tensor it goes."""

    slot: Slot
    parts: tuple[tuple[Piece, Piece], ...]


def predict_plain(source: Source, target: Path, options: Options = Options()) -> Finished:
    """What `write_plain` would write, from headers alone. Raises InputError for a source that does not fit its config.

    Also raises as `check_job`.
    """
    check_job(source, target, force=options.force)
    targets = _targets(source, options.dtype)
    shards = plan_shards(([(item.slot,)] for item in targets.values()), options.max_shard_bytes)
    total = sum(prod(item.slot.shape) for item in targets.values())
    return Finished(target, total, sum(shard.size for shard in shards))


def write_plain(source: Source, target: Path, options: Options = Options()) -> Iterator[Progress | Finished]:
    """Write the new folder `target`; yields a Progress for each tensor, and at last Finished.

    A run that was stopped goes on at the first shard that was not complete. Until the end there is nothing under the
    target's name but what was.

    Raises:
        UsageError: the target holds the source, or has the name of a file.
        InputError: the source is damaged or unsupported, or a value does not fit the dtype.
        ConflictError: the target exists and `force` is not set, or another process works on it.
        ResourceError: disk or memory would not suffice, or did not.

    """
    check_job(source, target, force=options.force)
    targets = _targets(source, options.dtype)
    shards = plan_shards(([(item.slot,)] for item in targets.values()), options.max_shard_bytes)
    total = sum(prod(item.slot.shape) for item in targets.values())
    job = job_identity(source, shards, "plain", FORMAT, str(options.dtype))
    with open_output(target, job, force=options.force) as output:
        output.check_room(shards)
        done = 0
        for shard in shards:
            if shard.name in output.finished:
                done += sum(prod(slot.shape) for slot in shard.slots)
                yield Progress("", done, total)
                continue
            with output.shard(shard, {}) as file:
                for (slot,) in shard.units:
                    _write(source, targets[slot.name], file)
                    done += prod(slot.shape)
                    yield Progress(slot.name, done, total)
        _add_small_files(output, source, shards, options)
        output.commit()
    yield Finished(target, total, sum(shard.size for shard in shards))


def _targets(source: Source, dtype: torch.dtype | None) -> dict[str, _Target]:
    """The tensors of the output, in the order in which the model uses them."""
    infos, config = source.infos, source.config
    stored = {name: info.shape for name, info in infos.items()}
    model, bound = build_bound(config, stored, stored_head(config, stored))
    family = family_of(config)
    table = family.names(model.config)
    found: dict[str, _Target] = {}
    for name, shape in hub_shapes(model, family).items():
        parts = tuple((bound[ours], piece) for ours, piece in _weights_in(table, name, shape))
        kind = infos[parts[0][0].hub].dtype if dtype is None else stored_name(dtype)
        found[name] = _Target(Slot(name, kind, shape), parts)
    rank = {piece.hub: place for place, piece in enumerate(bound[name] for name, _ in model.named_parameters())}
    return dict(sorted(found.items(), key=lambda item: min(rank[source.hub] for source, _ in item[1].parts)))


def _weights_in(table: NameTable, name: str, shape: Shape) -> Iterator[tuple[str, Piece]]:
    heads = {hub: ours for ours, hub in HEAD_NAMES.items()}
    if name in heads:
        yield heads[name], Piece(name, shape)
        return
    for ours, piece in table.pieces(name, shape):
        yield DECODER_PREFIX + ours, piece


def _write(source: Source, item: _Target, file: ShardWriter) -> None:
    dtype = torch_dtypes()[item.slot.dtype]
    for stored, wanted in item.parts:
        weight = stored.of(source.tensor(stored.hub))
        value = (weight.t() if wanted.transposed else weight).to(dtype)
        check_converted(value, weight, stored.hub)
        first = 0 if wanted.rows is None else wanted.rows.start * item.slot.shape[-1]
        file.write(item.slot.name, value, first * ITEM_SIZES[item.slot.dtype])
        if stored.rows is None:  # else its neighbours in the same tensor come next
            source.advise(stored.hub, Advice.DONT_NEED)
    for hub in {stored.hub for stored, _ in item.parts if stored.rows is not None}:
        source.advise(hub, Advice.DONT_NEED)


def check_converted(value: Tensor, weight: Tensor, name: str) -> None:
    """Raise InputError where a weight is NaN or infinity, or became so in its new dtype. name: what errors call it."""
    if not is_finite(value):
        check_finite(weight, quoted(name))
        raise InputError(f"{quoted(name)} has values beyond {value.dtype}", "convert to bf16 or fp32")


def _add_small_files(output: OutputFolder, source: Source, shards: tuple[Shard, ...], options: Options) -> None:
    if len(shards) > 1:
        output.add(INDEX, index_json(shards))
    config: Mapping[str, object] = source.config
    if options.dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config = {**config, key: str(options.dtype).removeprefix("torch.")}
    output.add("config.json", to_json(config))
    output.copy(options.companions)
