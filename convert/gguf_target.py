"""Writing a model as a GGUF that llama.cpp runs: one file, streamed a matrix at a time, continued after a kill.

The file's every byte has its place before the first tensor is read, so it is written through the same journal and
renamed at the end like every output of lmx. Norms, routers and what a scan keeps stay in float32, as llama.cpp wants
them; of the quantized kinds, a matrix whose rows are no whole blocks stays in half precision, and in a Q4_0 file the
embedding and the output matrix are Q8_0, since an error there reaches every token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lmx.convert.events import Finished, Progress
from lmx.convert.gguf_config import Architecture, architecture_for
from lmx.convert.gguf_header import DEFAULT_ALIGNMENT, TensorEntry, Value, aligned, write_header
from lmx.convert.gguf_keys import metadata_of
from lmx.convert.gguf_layout import LAYOUTS, BlockLayout
from lmx.convert.gguf_names import Change, Rule
from lmx.convert.gguf_tensors import apply
from lmx.convert.gguf_tokens import vocabulary_of
from lmx.convert.gguf_types import quantize
from lmx.convert.single_file import write_slots
from lmx.core.checkpoint import Source
from lmx.core.config import ConfigReader, ModelConfig
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.finite import check_finite, is_finite
from lmx.core.job import check_job, job_identity
from lmx.core.loader import DECODER_PREFIX, HEAD_NAMES, build_bound, stored_head
from lmx.core.mapped import Advice, torch_dtypes
from lmx.core.names import NameTable, Piece
from lmx.core.output import open_output
from lmx.core.registry import family_of
from lmx.core.shards import Shard, ShardWriter, Slot

# Kind -> the type of the matrices, and llama.cpp's number for such a file (`enum llama_ftype`).
KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}

_FORMAT = 1
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass(frozen=True, slots=True)
class Options:
    """How to write. kind: of the matrices, "F16", "BF16", "Q8_0", "Q4_0" or "F32"; tokenizer: the folder it lies in."""

    kind: str
    tokenizer: Path
    name: str = "model"
    force: bool = False


@dataclass(frozen=True, slots=True)
class _Target:
    """A tensor of the output: its weights in the source, one or all experts of a layer, and what changes."""

    slot: Slot
    layout: BlockLayout
    shape: tuple[int, ...]
    parts: tuple[Piece, ...]
    change: Change
    heads: int


@dataclass(frozen=True, slots=True)
class _Plan:
    targets: tuple[_Target, ...]
    shard: Shard

    @property
    def parameters(self) -> int:
        return sum(prod(target.shape) for target in self.targets)


def predict_gguf(source: Source, target: Path, options: Options) -> Finished:
    """What `write_gguf` would write, from headers and the tokenizer alone. Raises as `write_gguf`."""
    check_job(source, target, force=options.force, makes_file=True)
    plan = _make_plan(source, target, options)
    return Finished(target, plan.parameters, plan.shard.size)


def write_gguf(source: Source, target: Path, options: Options) -> Iterator[Progress | Finished]:
    """Write the new file `target`; yields a Progress for each tensor, and at last Finished.

    A run that was stopped goes on behind the last gigabyte that was complete.

    Raises:
        UsageError: the target's name does not end in .gguf, or it is the source.
        InputError: the source is damaged, llama.cpp does not run its family or would compute it in another way, its
            tokenizer cannot be said in a GGUF, or a value does not fit the type.
        ConflictError: the target exists and `force` is not set, or another process works on it.
        ResourceError: disk or memory would not suffice, or did not.

    """
    check_job(source, target, force=options.force, makes_file=True)
    plan = _make_plan(source, target, options)
    job = job_identity(source, (plan.shard,), "gguf", _FORMAT, options.kind)
    with open_output(target, job, force=options.force) as output:
        if plan.shard.name not in output.finished:
            output.check_room((plan.shard,))
            targets = plan.targets
            sizes = [prod(target.shape) for target in targets]
            yield from write_slots(output, plan.shard, sizes, lambda file, n: _write(source, targets[n], file))
        output.commit()
    yield Finished(target, plan.parameters, plan.shard.size)


def _write(source: Source, target: _Target, file: ShardWriter) -> None:
    first = 0
    for piece in target.parts:
        weight = apply(piece.of(source.tensor(piece.hub)), target.change, target.heads)
        data = _encoded(weight, target.layout, piece.hub)
        file.write(target.slot.name, data, first)
        first += data.nbytes
        if piece.rows is None:  # else its neighbours in the same tensor come next
            source.advise(piece.hub, Advice.DONT_NEED)
    for hub in {piece.hub for piece in target.parts if piece.rows is not None}:
        source.advise(hub, Advice.DONT_NEED)
    file.write(target.slot.name, torch.zeros(target.slot.nbytes - first, dtype=torch.uint8), first)


def _encoded(weight: Tensor, layout: BlockLayout, name: str) -> Tensor:
    """The bytes of a weight in a type. Raises InputError for what does not fit it."""
    check_finite(weight, quoted(name))
    if layout.plain is None:
        return quantize(layout, weight)
    value = weight.to(torch_dtypes()[layout.plain]).contiguous()
    if not is_finite(value):
        raise InputError(f"{quoted(name)} has values beyond {layout.name}", "convert to bf16 or fp32")
    return value.view(-1).view(torch.uint8)


def _make_plan(source: Source, target: Path, options: Options) -> _Plan:
    config = source.config
    architecture = architecture_for(str(config.get("model_type")))
    stored = {name: info.shape for name, info in source.infos.items()}
    model, bound = build_bound(config, stored, stored_head(config, stored))
    if model.kind != "causal":
        raise InputError(f"{quoted(source.label)} has no output head for tokens", "a GGUF needs one")
    table = family_of(config).names(model.config)
    targets = tuple(_targets(architecture, model.config, table, bound, options.kind))
    metadata = _metadata(source, model.config, architecture, options)
    return _Plan(targets, _lay_out(target.name, metadata, targets))


def _targets(
    architecture: Architecture, config: ModelConfig, table: NameTable, bound: Mapping[str, Piece], kind: str
) -> Iterator[_Target]:
    heads = {hub: ours for ours, hub in HEAD_NAMES.items()}

    def pieces(rule: Rule, indices: tuple[int, ...]) -> tuple[Piece, ...]:
        if rule.change is not Change.EXPERTS:
            name = rule.hub.format(*indices)
            ours = heads.get(name) or DECODER_PREFIX + next(ours for ours, _ in table.pieces(name, ()))
            return (bound[ours],) if ours in bound else ()
        name = next(ours for ours, _ in table.pieces(rule.hub.format(*indices, 0), ()))
        stem = DECODER_PREFIX + name.rpartition(".")[0]
        return tuple(bound[f"{stem}.{expert}"] for expert in range(_experts(bound, stem)))

    for rule, indices in architecture.table.expand(config.layers):
        parts = pieces(rule, indices)
        if not parts:  # a tied output matrix
            continue
        one = parts[0].shape if rule.change is not Change.CONVOLUTION else (parts[0].shape[0], parts[0].shape[2])
        shape = (len(parts), *one) if rule.change is Change.EXPERTS else one
        layout = _layout(rule, shape, kind)
        nbytes = prod(shape) // layout.elements * layout.block_bytes
        slot = Slot(rule.gguf.format(*indices), "U8", (aligned(nbytes, DEFAULT_ALIGNMENT),))
        yield _Target(slot, layout, shape, parts, rule.change, _heads(rule.change, config))


def _experts(bound: Mapping[str, Piece], stem: str) -> int:
    return sum(name.rpartition(".")[0] == stem for name in bound)


def _layout(rule: Rule, shape: tuple[int, ...], kind: str) -> BlockLayout:
    if rule.exact or len(shape) == 1:
        return LAYOUTS["F32"]
    if kind == "Q4_0" and rule.gguf in ("token_embd.weight", "output.weight"):
        kind = "Q8_0"
    return LAYOUTS[kind] if shape[-1] % LAYOUTS[kind].elements == 0 else LAYOUTS["F16"]


def _heads(change: Change, config: ModelConfig) -> int:
    from lmx.core.models.mixtral import MixtralConfig

    if not isinstance(config, MixtralConfig):
        return 1
    return {Change.QUERY_PAIRS: config.heads, Change.KEY_PAIRS: config.kv_heads}.get(change, 1)


def _metadata(source: Source, config: ModelConfig, architecture: Architecture, options: Options) -> dict[str, Value]:
    keys = metadata_of(config, architecture)
    keys |= {
        "general.type": "model",
        "general.name": options.name,
        "general.file_type": KINDS[options.kind],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    keys |= vocabulary_of(options.tokenizer, config.vocab_size, architecture.model_type)
    return keys | _stop_keys(source, config)


def _stop_keys(source: Source, config: ModelConfig) -> dict[str, Value]:
    """Where a text begins and ends, by the configs: they know better than tokenizer files what a model was trained on.

    Where several tokens end an answer, the second is the end of a turn.
    """
    read = ConfigReader(source.generation_config or {}, "generation_config.json")
    bos = read.token_ids("bos_token_id") or config.bos_ids
    ends = read.token_ids("eos_token_id") or config.eos_ids
    named = dict(zip(("bos", "eos", "eot"), (bos[:1], ends[:1], ends[1:2]), strict=True))
    keys: dict[str, Value] = {f"tokenizer.ggml.{name}_token_id": ids[0] for name, ids in named.items() if ids}
    if config.pad_id is not None:
        keys["tokenizer.ggml.padding_token_id"] = config.pad_id
    return keys


def _lay_out(name: str, metadata: Mapping[str, Value], targets: tuple[_Target, ...]) -> Shard:
    """The file as a shard of one slot a tensor, each as long as its padding makes it."""
    starts, end = [], 0
    for target in targets:
        starts.append(end)
        end += target.slot.nbytes
    entries = tuple(
        TensorEntry(target.slot.name, target.shape, target.layout.type_id, start)
        for target, start in zip(targets, starts, strict=True)
    )
    header = write_header(metadata, entries, DEFAULT_ALIGNMENT)
    offsets = {entry.name: len(header) + entry.offset for entry in entries}
    slots = tuple(target.slot for target in targets)
    return Shard(name, header, offsets, slots, tuple((slot,) for slot in slots))
