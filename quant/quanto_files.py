"""The tensors that stand in a checkpoint for one matrix quantized by optimum-quanto: its frozen modules' state.

For a matrix `….weight` [rows, columns]:
    ….weight._data                 int8 or float8 [rows, columns], of an 8-bit type
    ….weight._data._data           uint8 [ceil(groups / codes a byte), group size], of a packed one
    ….weight._scale                [rows, 1] or [groups, 1] in the dtype of the source; a scalar for a single row
    ….weight._shift                the same, of a packed type
    ….input_scale, ….output_scale  scalars: 1, unless activations are quantized too
Beside the weights, `quanto_qmap.json` names the type of every module. A file does not hold the shape of a packed
matrix: it comes from the model's config.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from lmx.core.errors import InputError
from lmx.core.safetensors_file import TensorInfo
from lmx.quant.four_bit import SOURCE_DTYPES
from lmx.quant.quanto import CODE_DTYPES, PACKED_BITS, Quanto, QuantoType, group_size, is_too_small

QMAP = "quanto_qmap.json"

_BYTES, _PACKED = "._data", "._data._data"
# By the safetensors name of the dtype.
_BYTE_TYPES: dict[str, QuantoType] = {"I8": "qint8", "F8_E4M3": "qfloat8"}
# optimum-quanto's own names, where they differ from what it lets a user say.
_QTYPES = {"qfloat8": "qfloat8_e4m3fn"}
_NO_ACTIVATIONS = "weights alone may be quantized: take the model it was made from"
_HINT = "the checkpoint is damaged or not in optimum-quanto's format: download or quantize it again"


def quanto_tensors(name: str, q: Quanto) -> dict[str, Tensor]:
    """The tensors of a matrix by their names in a checkpoint."""
    module_scales = {each: torch.ones((), dtype=q.dtype, device=q.device) for each in _module_scales(name)}
    if q.shift is not None:
        return {f"{name}{_PACKED}": q.data, f"{name}._scale": q.scale, f"{name}._shift": q.shift, **module_scales}
    scale = q.scale if len(q.scale) > 1 else q.scale.view(())
    return {f"{name}{_BYTES}": q.data, f"{name}._scale": scale, **module_scales}


def quanto_layout(
    name: str, shape: tuple[int, ...], quant_type: QuantoType, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor that a matrix of `shape` and `dtype` becomes, without its data."""
    scales: dict[str, tuple[torch.dtype, tuple[int, ...]]] = dict.fromkeys(_module_scales(name), (dtype, ()))
    if quant_type not in PACKED_BITS:
        scale = (dtype, (shape[0], 1) if shape[0] > 1 else ())
        return {f"{name}{_BYTES}": (CODE_DTYPES[quant_type], shape), f"{name}._scale": scale, **scales}
    size = group_size(shape[1])
    groups = prod(shape) // size
    packed = (torch.uint8, (_height(groups, quant_type), size))
    affine = (dtype, (groups, 1))
    return {f"{name}{_PACKED}": packed, f"{name}._scale": affine, f"{name}._shift": affine, **scales}


def quantization_map(names: Iterable[str], quant_type: QuantoType) -> dict[str, dict[str, str]]:
    """What `quanto_qmap.json` says of a checkpoint whose matrices of these names are quantized."""
    weights = _QTYPES.get(quant_type, quant_type)
    return {name.removesuffix(".weight"): {"weights": weights, "activations": "none"} for name in names}


def quanto_matrices(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every matrix of a checkpoint by name, with all the tensors that make it up, the codes first."""
    for codes in infos:
        if codes.endswith(_BYTES):
            name = codes.removesuffix(_PACKED if codes.endswith(_PACKED) else _BYTES)
            others = (f"{name}._scale", f"{name}._shift", *_module_scales(name))
            yield name, (codes, *(each for each in others if each in infos))


def is_quanto(members: tuple[str, ...]) -> bool:
    """Whether these tensors, the first with the bulk, make up a matrix of optimum-quanto's."""
    return members[0].endswith(_BYTES)


def is_packed(members: tuple[str, ...]) -> bool:
    """Whether the codes share bytes, so that the tensors do not tell the shape of the matrix."""
    return members[0].endswith(_PACKED)


def read_quanto(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> Quanto:
    """Put the tensors of a matrix together, without copies. Raises `InputError` where they do not fit.

    shape: that of the matrix, which a packed one does not record.
    """
    for each in _module_scales(name):
        if each in tensors and not bool((tensors[each] == 1).all()):
            raise InputError(f"{name}: its module quantizes activations too", _NO_ACTIVATIONS)
    if f"{name}{_PACKED}" in tensors:
        return _read_packed(name, tensors, shape)
    data = _get(tensors, f"{name}{_BYTES}")
    _check(data.ndim == 2 and data.numel() > 0, name, f"the shape {list(data.shape)}")
    quant_type = next((each for each in CODE_DTYPES if CODE_DTYPES[each] == data.dtype), None)
    if quant_type is None:
        raise InputError(f"{name} has codes of {data.dtype}, which lmx does not read", _HINT)
    return Quanto(data, _scales(tensors, f"{name}._scale", len(data)), None, quant_type, tuple(data.shape))


def _read_packed(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None) -> Quanto:
    data = _get(tensors, f"{name}{_PACKED}")
    if shape is None or len(shape) != 2 or is_too_small(shape, "qint4"):
        raise InputError(f"{name}: config.json gives {shape} for its shape, which cannot be quantized so", _HINT)
    groups = prod(shape) // group_size(shape[1])
    sizes = {each: (_height(groups, each), group_size(shape[1])) for each in PACKED_BITS}
    quant_type = next((each for each in sizes if sizes[each] == data.shape), None)
    if quant_type is None or data.dtype != torch.uint8:
        raise InputError(f"{name} has {data.dtype} {list(data.shape)} for a matrix of {list(shape)}", _HINT)
    scale, shift = (_scales(tensors, f"{name}.{part}", groups) for part in ("_scale", "_shift"))
    _check(shift.dtype == scale.dtype, name, f"shifts of {shift.dtype} beside scales of {scale.dtype}")
    return Quanto(data, scale, shift, quant_type, shape)


def _module_scales(name: str) -> tuple[str, str]:
    stem = name.removesuffix("weight")
    return f"{stem}input_scale", f"{stem}output_scale"


def _height(groups: int, quant_type: QuantoType) -> int:
    """Rows of packed bytes."""
    return -(-groups * PACKED_BITS[quant_type] // 8)


def _scales(tensors: Mapping[str, Tensor], name: str, length: int) -> Tensor:
    """Scales or shifts as [length, 1]."""
    tensor = _get(tensors, name)
    good = tuple(tensor.shape) == ((length, 1) if length > 1 else ()) and tensor.dtype in SOURCE_DTYPES
    _check(good, name, f"{tensor.dtype} {list(tensor.shape)}")
    return tensor.view(length, 1)


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise InputError(f"{name} is missing", _HINT)
    return tensors[name]


def _check(good: bool, name: str, found: str) -> None:
    if not good:
        raise InputError(f"{name} has {found}, which does not fit", _HINT)
