"""Writing a model as a checkpoint folder in the Hugging Face layout, all of it or nothing.

Everything grows in `FOLDER.partial`, is synced, and gets its name by one rename at the end.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lmx.core.checkpoint import SINGLE
from lmx.core.errors import ConflictError, InputError, ResourceError
from lmx.core.files import is_plain_name, quoted
from lmx.core.loader import bind, hub_shapes
from lmx.core.model import LanguageModel
from lmx.core.names import Piece
from lmx.core.registry import family_of

ALIGNMENT = 64  # a cache line, and the widest vector: kernels then read rows without splitting loads

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_METADATA = {"format": "pt"}


def save_model(
    model: LanguageModel,
    folder: Path,
    *,
    config: Mapping[str, object],
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write config.json, model.safetensors under the hub's names, and the extra files (tokenizer, template).

    config: the model's config.json; its `dtype` is set to that of the weights. dtype: convert all weights; None keeps
    them. extra_files: name -> bytes.

    Raises:
        ConflictError: the folder exists already, or another process is writing it.
        InputError: an extra file's name is no plain name, or the config is of another family.
        ResourceError: the disk is full or may not be written.

    """
    extra = dict(extra_files or {})
    for name in extra:
        if not is_plain_name(name) or name in (SINGLE, "config.json"):
            raise InputError(f"{quoted(name)} cannot be the name of an extra file", "Give it a plain name of its own.")
    tensors = hub_tensors(model, config, dtype)
    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    described = {**config, "dtype": stored.pop()} if len(stored) == 1 else dict(config)
    extra["config.json"] = (json.dumps(described, indent=2) + "\n").encode()
    try:
        with partial_folder(folder) as partial:
            for name, data in extra.items():
                with create_synced(partial / name) as file:
                    file.write(data)
            with create_synced(partial / SINGLE) as file:
                write_safetensors(file, tensors)
    except OSError as error:
        raise ResourceError(
            f"{quoted(str(folder))} cannot be written: {(error.strerror or str(error)).lower()}",
            "free some space on that disk, or choose another folder",
        ) from error


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
    return {hub: tensor.to("cpu", dtype or tensor.dtype).contiguous() for hub, tensor in tensors.items()}


def _gather(pieces: list[tuple[Piece, Tensor]]) -> Tensor:
    """A tensor of the file from the weights that are pieces of it: one whole, or rows in their order."""
    if pieces[0][0].rows is None:
        return pieces[0][1]
    ordered = sorted(pieces, key=lambda item: item[0].rows.start if item[0].rows else 0)
    return torch.cat([weight.t() if piece.transposed else weight for piece, weight in ordered])


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = _METADATA) -> None:
    """Write one safetensors file in which every tensor starts at a multiple of 64 bytes.

    The format leaves no room between tensors, so that only order can align them: those whose size is a multiple of 64
    bytes come first, in the order of their names with numbers counted (an expert's matrices side by side); then the
    rest from the widest element down, each aligned to its own elements at least.
    """
    order = sorted(tensors, key=lambda name: _rank(name, tensors[name]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        end = offset + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _rank(name: str, tensor: Tensor) -> tuple[bool, int, list[tuple[int, str]]]:
    odd = tensor.nbytes % ALIGNMENT > 0
    numbered = [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
    return odd, -tensor.element_size() if odd else 0, numbered


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """Yield the new `FOLDER.partial`; synced and renamed to FOLDER at the end of the block, removed after an error.

    Raises ConflictError where FOLDER exists, or its partial twin, which another process may be writing.
    """
    if folder.exists() or folder.is_symlink():
        raise ConflictError(f"{quoted(str(folder))} exists already", "choose another name, or remove it first")
    partial = folder.with_name(folder.name + ".partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise ConflictError(
            f"{quoted(str(partial))} exists: it is being written, or was left behind by a killed run",
            "wait for the other run, or remove that folder",
        ) from error
    try:
        yield partial
        _sync_folder(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(folder.parent)


@contextmanager
def create_synced(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing; at the end of the block its bytes are on the disk."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make names in a folder as durable as the files they name."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
