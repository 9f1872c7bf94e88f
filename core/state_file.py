"""A state on disk: one safetensors file, whose metadata says of which family it is and how far it has read."""

import json
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save
from torch import Tensor

from lmx.core.errors import InputError
from lmx.core.files import write_atomically
from lmx.core.jsonfile import parse_json
from lmx.core.kv_cache import KVCache, WindowKVCache
from lmx.core.recurrent_state import GriffinState, MambaState
from lmx.core.safetensors_file import SafetensorsFile, open_safetensors
from lmx.core.state import LayerState, State

_VERSION = 1
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
    about = parse_json(file.metadata.get("lmx_state", "{}").encode(), f"{path}: lmx_state")
    kinds, family, batch, length = (about.get(key) for key in ("layers", "family", "batch_size", "length"))
    if (
        about.get("version") != _VERSION
        or not isinstance(family, str)
        or not isinstance(kinds, list)
        or not all(isinstance(number, int) and 0 <= number < 2**31 for number in (batch, length))
    ):
        raise InputError(f"{path}: not a saved state", _HINT)
    batch_size, held = cast(int, batch), cast(int, length)
    grouped: list[dict[str, Tensor]] = [{} for _ in kinds]
    for name in file.tensors:
        if name != "lengths":
            _group(grouped, name, file, path, device)
    layers = [_layer(kind, tensors, batch_size, held, path) for kind, tensors in zip(kinds, grouped, strict=True)]
    lengths = _tensor(file, "lengths", device) if "lengths" in file.tensors else None
    if lengths is not None and (
        lengths.shape != (batch_size,)
        or lengths.dtype != torch.int64
        or not bool(((lengths >= 0) & (lengths <= held)).all())
    ):
        raise InputError(f"{path}: row lengths do not fit the state", _HINT)
    return State(family, layers, batch_size, held, lengths)


def _tensor(file: SafetensorsFile, name: str, device: torch.device | None) -> Tensor:
    # A copy: the state will be written to, and the file may be replaced by a later save.
    info = file.tensors[name]
    return file.data.view(info.dtype, info.shape, info.offset, info.nbytes).clone().to(device or "cpu")


def _group(
    grouped: list[dict[str, Tensor]], name: str, file: SafetensorsFile, path: Path, device: torch.device | None
) -> None:
    layer, _, part = name.removeprefix("layers.").partition(".")
    if not name.startswith("layers.") or not layer.isdecimal() or len(layer) > 6 or int(layer) >= len(grouped):
        raise InputError(f"{path}: unexpected tensor {name!r:.80}", _HINT)
    grouped[int(layer)][part] = _tensor(file, name, device)


def _layer(kind: object, tensors: dict[str, Tensor], batch: int, length: int, path: Path) -> LayerState:
    if kind not in _KINDS:
        raise InputError(f"{path}: unknown kind of layer {kind!r:.80}", _HINT)
    layer = _KINDS[str(kind)].restore(tensors)
    whole = all(tensor.shape[0] == batch for tensor in tensors.values())
    if not whole or (isinstance(layer, KVCache) and layer.keys.shape[2] != length):
        raise InputError(f"{path}: a {kind} layer does not hold {batch} rows of {length} tokens", _HINT)
    return layer
