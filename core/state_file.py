"""A state on disk: one safetensors file, whose metadata says of which family it is and how far it has read."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors.torch import save
from torch import Tensor

from lmx.core.errors import InputError
from lmx.core.files import quoted, write_atomically
from lmx.core.jsonfile import parse_json
from lmx.core.kv_cache import KVCache, WindowKVCache
from lmx.core.recurrent_state import GriffinState, MambaState
from lmx.core.safetensors_file import SafetensorsFile, open_safetensors
from lmx.core.state import LayerState, State

_VERSION = 1
_MOST_LAYERS = 4096  # as many as a config may ask for
_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([a-z]{1,16})")
_KINDS: dict[str, type[LayerState]] = {kind.KIND: kind for kind in (KVCache, WindowKVCache, MambaState, GriffinState)}
_HINT = "The file is no state saved by this version of lmx, or it is damaged; start the conversation anew."


def save_state(state: State[LayerState], path: Path) -> None:
    """Write the state beside `path`, sync it, and rename it there. Raises ResourceError where the disk refuses."""
    tensors = {
        f"layers.{index}.{name}": tensor.contiguous()
        for index, layer in enumerate(state.layers)
        for name, tensor in layer.tensors(state.length).items()
    }
    if state.lengths is not None:
        tensors["lengths"] = state.lengths
    about = {
        "version": _VERSION,
        "family": state.family,
        "layers": [layer.KIND for layer in state.layers],
        "batch_size": state.batch_size,
        "length": state.length,
    }
    write_atomically(path, save(tensors, {"lmx_state": json.dumps(about)}))


def load_state(path: Path, device: torch.device | None = None) -> State[LayerState]:
    """Read a saved state; it continues to the same bits. The file is hostile input: anything odd is an InputError."""
    file = open_safetensors(path)
    about = _read_about(file)
    grouped: list[dict[str, Tensor]] = [{} for _ in about.kinds]
    for name in file.tensors:
        if name != "lengths":
            layer, part = _place(name, len(grouped), path)
            grouped[layer][part] = _tensor(file, name, device)
    layers = [_layer(kind, tensors, about, path) for kind, tensors in zip(about.kinds, grouped, strict=True)]
    lengths = _lengths(file, about, device) if "lengths" in file.tensors else None
    return State(about.family, layers, about.batch_size, about.length, lengths)


@dataclass(frozen=True)
class _About:
    """The file's metadata, checked."""

    family: str
    kinds: list[str]
    batch_size: int
    length: int


def _read_about(file: SafetensorsFile) -> _About:
    about = parse_json(file.metadata.get("lmx_state", "{}").encode(), f"{quoted(str(file.path))}: lmx_state")
    kinds, family, batch_size, length = (about.get(key) for key in ("layers", "family", "batch_size", "length"))
    if about.get("version") != _VERSION or not isinstance(family, str) or not isinstance(kinds, list):
        raise _error(file.path, "is no saved state")
    unknown = next((kind for kind in kinds if not isinstance(kind, str) or kind not in _KINDS), None)
    if unknown is not None or len(kinds) > _MOST_LAYERS:
        raise _error(file.path, f"{len(kinds)} layers, or an unknown kind of layer ({unknown!r:.40})")
    if not _is_count(batch_size, 1) or not _is_count(length, 0):
        raise _error(file.path, f"{length!r:.40} tokens in {batch_size!r:.40} rows")
    return _About(family, [str(kind) for kind in kinds], batch_size, length)


def _is_count(value: object, least: int) -> TypeGuard[int]:
    """A whole number (True is one to Python, but not to us)."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _tensor(file: SafetensorsFile, name: str, device: torch.device | None) -> Tensor:
    # A copy: the state will be written to, and the file may be replaced by a later save.
    info = file.tensors[name]
    return file.data.view(info.dtype, info.shape, info.offset, info.nbytes).clone().to(device or "cpu")


def _place(name: str, layers: int, path: Path) -> tuple[int, str]:
    """`layers.3.keys` -> (3, "keys")."""
    found = _NAME.fullmatch(name)
    if found is None or int(found[1]) >= layers:
        raise _error(path, f"unexpected tensor {quoted(name)}")
    return int(found[1]), found[2]


def _layer(kind: str, tensors: dict[str, Tensor], about: _About, path: Path) -> LayerState:
    layer = _KINDS[kind].restore(tensors)
    whole = all(tensor.shape[0] == about.batch_size for tensor in tensors.values())
    if not whole or (isinstance(layer, KVCache) and layer.keys.shape[2] != about.length):
        raise _error(path, f"a {kind} layer does not hold {about.batch_size} rows of {about.length} tokens")
    return layer


def _lengths(file: SafetensorsFile, about: _About, device: torch.device | None) -> Tensor:
    lengths = _tensor(file, "lengths", device)
    if lengths.shape != (about.batch_size,) or lengths.dtype != torch.int64:
        raise _error(file.path, "row lengths of a wrong shape or dtype")
    if int(lengths.min()) < 0 or int(lengths.max()) != about.length:
        raise _error(file.path, f"row lengths that do not end at {about.length} tokens")
    return lengths


def _error(path: Path, what: str) -> InputError:
    return InputError(f"{quoted(str(path))}: {what}", _HINT)
