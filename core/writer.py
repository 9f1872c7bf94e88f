"""Writing a model as a checkpoint folder in the Hugging Face layout, all of it or nothing."""

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from lmx.core.checkpoint import INDEX, SINGLE
from lmx.core.errors import InputError
from lmx.core.files import is_plain_name, quoted
from lmx.core.jsonfile import to_json
from lmx.core.loader import bind, hub_shapes
from lmx.core.mapped import stored_name
from lmx.core.model import LanguageModel
from lmx.core.names import Piece
from lmx.core.output import OutputFolder, open_output
from lmx.core.registry import family_of
from lmx.core.shards import DEFAULT_SHARD_BYTES, Shard, Slot, Unit, index_json, plan_shards

CONFIG = "config.json"

_LAYER = re.compile(r".*?\.\d+\.")


def save_model(
    model: LanguageModel,
    folder: Path,
    *,
    config: Mapping[str, object],
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write config.json, the weights under the hub's names, and the extra files (tokenizer, template).

    config: the model's config.json; its `dtype` is set to that of the weights where they have one. dtype: convert all
    weights; None keeps each. extra_files: name -> bytes.

    Raises:
        ConflictError: the folder exists already, or another process is writing it.
        InputError: an extra file's name is no plain name or one of the checkpoint's own, or the config is of another
            family.
        ResourceError: the disk is full or may not be written.

    """
    extra = dict(extra_files or {})
    for name in extra:
        if not is_plain_name(name) or name in (CONFIG, INDEX) or name.endswith(".safetensors"):
            raise InputError(f"{quoted(name)} cannot be the name of an extra file", "Give it a plain name of its own.")
    tensors = hub_tensors(model, config, dtype)
    shards = _plan(tensors, max_shard_bytes)
    extra[CONFIG] = _config_json(config, tensors)
    if shards[0].name != SINGLE:
        extra[INDEX] = index_json(shards)
    with open_output(folder, f"save {uuid4()}") as output:
        try:
            _write(output, shards, tensors, extra)
        except BaseException:
            output.discard()  # the weights may be others when it is tried again
            raise


def _write(
    output: OutputFolder, shards: tuple[Shard, ...], tensors: Mapping[str, Tensor], extra: Mapping[str, bytes]
) -> None:
    for shard in shards:
        with output.shard(shard, {}) as writer:
            for slot in shard.slots:
                writer.write(slot.name, tensors[slot.name])
    for name, data in extra.items():
        output.add(name, data)
    output.commit()


def hub_tensors(
    model: LanguageModel, config: Mapping[str, object], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Every tensor of the model's checkpoint by its name on the hub; experts that a file keeps in one are gathered.

    Raises InputError where the config names another family than the model's.
    """
    family = family_of(config)
    if family.model_type != model.family:
        raise InputError(f"config.json is of {family.model_type}, the model of {model.family}", "Pass the model's own.")
    shapes = hub_shapes(model, family)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    members: dict[str, list[tuple[Piece, Tensor]]] = {hub: [] for hub in shapes}
    for name, piece in bind(model, family.names(model.config), shapes).items():
        members[piece.hub].append((piece, weights[name]))
    tensors = {hub: _gather(pieces).reshape(shapes[hub]) for hub, pieces in members.items()}
    return {hub: tensor.to("cpu", dtype or tensor.dtype) for hub, tensor in tensors.items()}


def _gather(pieces: list[tuple[Piece, Tensor]]) -> Tensor:
    """A tensor of the file from the weights that are pieces of it: one whole, or rows in their order."""
    if pieces[0][0].rows is None:
        return pieces[0][1]
    ordered = sorted(pieces, key=lambda item: item[0].rows.start if item[0].rows else 0)
    return torch.cat([weight.t() if piece.transposed else weight for piece, weight in ordered])


def _plan(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Tensors in the order of their names, numbers counted, so that an expert's matrices lie side by side."""
    groups: list[list[Unit]] = []
    for _, names in groupby(sorted(tensors, key=_counted), key=_layer):
        groups.append([(Slot(name, stored_name(tensors[name].dtype), tuple(tensors[name].shape)),) for name in names])
    return plan_shards(groups, max_shard_bytes)


def _counted(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _layer(name: str) -> str:
    found = _LAYER.match(name)
    return found[0] if found else name


def _config_json(config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> bytes:
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    described = {**config, "dtype": dtypes.pop()} if len(dtypes) == 1 else config
    return to_json(described)
