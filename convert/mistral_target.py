"""Writing a Mixtral as Mistral's own files: `consolidated.safetensors`, `params.json` and its `tokenizer.model`.

The one file is streamed a tensor at a time, each in the place that a plan gave it, and continued after a kill.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from lmx.convert.events import Finished, Progress
from lmx.convert.mistral_names import written_table
from lmx.convert.mistral_source import DEFAULT_THETA, PARAMS, SAFETENSORS, context_length
from lmx.convert.original_names import Change, Row
from lmx.convert.original_tensors import restore
from lmx.convert.plain import FORMAT, Options, check_converted
from lmx.convert.single_file import write_slots
from lmx.core.checkpoint import Source
from lmx.core.config import ModelConfig
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.job import check_job, job_identity
from lmx.core.loader import DECODER_PREFIX, HEAD_NAMES, build_bound
from lmx.core.mapped import Advice, stored_name, torch_dtypes
from lmx.core.models.mixtral import NAMES, MixtralConfig
from lmx.core.names import Piece
from lmx.core.output import open_output
from lmx.core.registry import model_type_of
from lmx.core.shards import Shard, ShardWriter, Slot, make_shard


@dataclass(frozen=True, slots=True)
class _Target:
    """A tensor of the output: where it lies in the source, and what changes."""

    slot: Slot
    piece: Piece
    change: Change
    heads: int


@dataclass(frozen=True, slots=True)
class _Plan:
    targets: dict[str, _Target]
    shard: Shard
    params: bytes

    @property
    def parameters(self) -> int:
        return sum(prod(slot.shape) for slot in self.shard.slots)


def predict_mistral(source: Source, target: Path, options: Options) -> Finished:
    """What `write_mistral` would write, from headers alone. Raises as `write_mistral`."""
    check_job(source, target, force=options.force)
    plan = _make_plan(source, options)
    return Finished(target, plan.parameters, plan.shard.size)


def write_mistral(source: Source, target: Path, options: Options) -> Iterator[Progress | Finished]:
    """Write the new folder `target`; yields a Progress for each tensor, and at last Finished.

    Raises:
        UsageError: the target holds the source, or has the name of a file.
        InputError: the source is damaged, no Mixtral, or one that params.json has no words for; or a value does not
            fit the dtype.
        ConflictError: the target exists and `force` is not set, or another process works on it.
        ResourceError: disk or memory would not suffice, or did not.

    """
    check_job(source, target, force=options.force)
    plan = _make_plan(source, options)
    job = job_identity(source, (plan.shard,), "mistral", FORMAT, str(options.dtype))
    with open_output(target, job, force=options.force) as output:
        if plan.shard.name not in output.finished:
            output.check_room((plan.shard,))
            targets = [plan.targets[slot.name] for slot in plan.shard.slots]
            sizes = [prod(target.slot.shape) for target in targets]
            yield from write_slots(output, plan.shard, sizes, lambda file, n: _write(source, targets[n], file))
        output.add(PARAMS, plan.params)
        output.copy(options.companions)
        output.commit()
    yield Finished(target, plan.parameters, plan.shard.size)


def _write(source: Source, target: _Target, file: ShardWriter) -> None:
    piece = target.piece
    weight = restore(piece.of(source.tensor(piece.hub)), target.change, target.heads)
    value = weight.to(torch_dtypes()[target.slot.dtype])
    check_converted(value, weight, piece.hub)
    file.write(target.slot.name, value)
    source.advise(piece.hub, Advice.DONT_NEED)


def _make_plan(source: Source, options: Options) -> _Plan:
    if model_type_of(source.config) != "mixtral":
        raise InputError(f"{quoted(source.label)} is no Mixtral", "other families have no such format: use --to hf")
    stored = {name: info.shape for name, info in source.infos.items()}
    model, bound = build_bound(source.config, stored, "causal")
    config = _known(model.config)
    targets: dict[str, _Target] = {}
    for row, theirs, hub in _names(config):
        ours = next((ours for ours, name in HEAD_NAMES.items() if name == hub), None) or _decoder_name(hub)
        # An output matrix that is the embedding itself is written all the same: the format knows no tied ones
        piece = bound.get(ours) or bound[_decoder_name("model.embed_tokens.weight")]
        kind = source.infos[piece.hub].dtype if options.dtype is None else stored_name(options.dtype)
        targets[theirs] = _Target(Slot(theirs, kind, piece.shape), piece, row.change, row.heads)
    shard = make_shard(SAFETENSORS, [(target.slot,) for target in targets.values()])
    return _Plan(targets, shard, _params(config))


def _names(config: MixtralConfig) -> Iterator[tuple[Row, str, str]]:
    """Every tensor of the model: its row, Mistral's name and the hub's, in the order of the layers."""
    rows = written_table(config.heads, config.kv_heads).rows
    outer = [row for row in rows if "{}" not in row.theirs]
    inner = [row for row in rows if "{}" in row.theirs]
    for row in outer:
        yield row, row.theirs, row.hub[0]
    for layer in range(config.layers):
        for row in inner:
            experts = range(config.experts) if row.theirs.count("{}") == 2 else (None,)
            for expert in experts:
                indices = (layer,) if expert is None else (layer, expert)
                yield row, row.theirs.format(*indices), row.hub[0].format(*indices)


def _decoder_name(hub: str) -> str:
    return DECODER_PREFIX + next(ours for ours, _ in NAMES.pieces(hub, ()))


def _known(config: ModelConfig) -> MixtralConfig:
    """The config, if mistral_inference would compute the same with it."""
    if not isinstance(config, MixtralConfig):
        raise TypeError("a Mixtral has a MixtralConfig")
    if config.activation != "silu":
        raise InputError(f"config.json: hidden_act is {config.activation}, which params.json cannot say", "use --to hf")
    return config


def _params(config: MixtralConfig) -> bytes:
    """params.json."""
    params: dict[str, object] = {
        "dim": config.hidden_size,
        "n_layers": config.layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope.theta or DEFAULT_THETA,
        "moe": {"num_experts_per_tok": config.experts_per_token, "num_experts": config.experts},
    }
    if config.max_position_embeddings != context_length(config.hidden_size):
        params["max_seq_len"] = config.max_position_embeddings
    if config.sliding_window is not None:
        params["sliding_window"] = config.sliding_window
    return (json.dumps(params, indent=4) + "\n").encode()
