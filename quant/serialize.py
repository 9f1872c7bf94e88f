"""The bitsandbytes serialization: the tensors that stand in a checkpoint for one quantized matrix.

Four bits, for a matrix `NAME` (usually `….weight`):
    NAME                                   uint8 [ceil(elements / 2), 1], two codes a byte, the first in the high nibble
    NAME.absmax                            float32 [blocks], or uint8 [blocks] with double quantization
    NAME.quant_map                         float32 [16]
    NAME.nested_absmax, .nested_quant_map  float32 [ceil(blocks / 256)], float32 [256], with double quantization
    NAME.quant_state.bitsandbytes__nf4     the rest, as the bytes of a JSON object; or …__fp4
Eight bits, for a matrix `….weight`: `….weight` int8 [rows, columns], `….SCB` float32 [rows] and `….weight_format`,
a uint8 scalar that is 0 for "row by row".
optimum-quanto's own serialization is in `quanto_files`; `layout` and `matrix_tensors` know both.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from math import ceil, prod
from typing import cast, get_args

import torch
from torch import Tensor

from lmx.core.errors import InputError
from lmx.quant.codebook import FourBitType, four_bit_map
from lmx.quant.four_bit import BLOCK_SIZES, NESTED_BLOCK_SIZE, FourBit, NestedScales
from lmx.quant.int8 import Int8
from lmx.quant.matmul import QuantMatrix
from lmx.quant.quanto import Quanto
from lmx.quant.quanto_files import quanto_layout, quanto_tensors
from lmx.quant.spec import DTYPES, QuantSpec

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

STATE_PREFIX = "quant_state.bitsandbytes__"
# Every JSON blob is padded with spaces to this size: the size of a file is known before its numbers are, and what
# follows it stays aligned. The longest that we write is about 180 bytes.
_STATE_BYTES = 256
_LONGEST_STATE = 4096
_HINT = "the checkpoint is damaged or not in the bitsandbytes format: download or quantize it again"


def four_bit_tensors(name: str, q: FourBit) -> dict[str, Tensor]:
    """The tensors of a four-bit matrix by their names in a checkpoint."""
    tensors = {name: q.packed, f"{name}.absmax": q.stored_absmax, f"{name}.quant_map": q.quant_map}
    if q.nested is not None:
        tensors[f"{name}.nested_absmax"] = q.nested.absmax
        tensors[f"{name}.nested_quant_map"] = q.nested.quant_map
    tensors[f"{name}.{STATE_PREFIX}{q.quant_type}"] = _pack_state(q)
    return tensors


def int8_tensors(name: str, q: Int8) -> dict[str, Tensor]:
    """The tensors of an 8-bit matrix by their names in a checkpoint."""
    scb, weight_format = int8_companions(name)
    return {name: q.weight, scb: q.absmax, weight_format: torch.zeros((), dtype=torch.uint8)}


def matrix_tensors(name: str, q: QuantMatrix) -> dict[str, Tensor]:
    """The tensors of a quantized matrix by their names in a checkpoint."""
    if isinstance(q, Quanto):
        return quanto_tensors(name, q)
    return four_bit_tensors(name, q) if isinstance(q, FourBit) else int8_tensors(name, q)


def layout(name: str, shape: tuple[int, ...], spec: QuantSpec, dtype: torch.dtype) -> Layout:
    """Name, dtype and shape of every tensor that a matrix of `shape` becomes, without its data.

    dtype: that of the source, in which optimum-quanto stores its scales.
    """
    if spec.quanto_type is not None:
        return quanto_layout(name, shape, spec.quanto_type, dtype)
    if spec.four_bit_type is None:
        scb, weight_format = int8_companions(name)
        return {name: (torch.int8, shape), scb: (torch.float32, shape[:1]), weight_format: (torch.uint8, ())}
    blocks = ceil(prod(shape) / spec.block_size)
    tensors: Layout = {
        name: (torch.uint8, (ceil(prod(shape) / 2), 1)),
        f"{name}.absmax": (torch.uint8 if spec.double_quant else torch.float32, (blocks,)),
        f"{name}.quant_map": (torch.float32, (16,)),
    }
    if spec.double_quant:
        tensors[f"{name}.nested_absmax"] = (torch.float32, (ceil(blocks / NESTED_BLOCK_SIZE),))
        tensors[f"{name}.nested_quant_map"] = (torch.float32, (256,))
    tensors[f"{name}.{STATE_PREFIX}{spec.four_bit_type}"] = (torch.uint8, (_STATE_BYTES,))
    return tensors


def int8_companions(name: str) -> tuple[str, str]:
    """The names of the scales and of the format mark that go with an 8-bit matrix."""
    stem = name.removesuffix("weight")
    return f"{stem}SCB", f"{stem}weight_format"


def four_bit_type_of(name: str, names: Mapping[str, object]) -> FourBitType | None:
    """The four-bit type that the matrix `name` has in a checkpoint with these names, or None if it has none."""
    found = [t for t in get_args(FourBitType) if f"{name}.{STATE_PREFIX}{t}" in names]
    if len(found) > 1:
        raise InputError(f"{name} has more than one quant_state", _HINT)
    return cast(FourBitType, found[0]) if found else None


def read_four_bit(name: str, tensors: Mapping[str, Tensor]) -> FourBit:
    """Put the tensors of a four-bit matrix together, without copies. Raises `InputError` where they do not fit.

    Sizes, dtypes and the constant table are checked; the bulk of the data is not touched.
    """
    quant_type = four_bit_type_of(name, tensors)
    if quant_type is None:
        raise InputError(f"{name} has no quant_state", _HINT)
    state = _read_state(name, _get(tensors, f"{name}.{STATE_PREFIX}{quant_type}"))
    _check(state.get("quant_type") == quant_type, name, "its quant_state names another type than its key")
    shape, block_size = _read_shape(name, state.get("shape")), state.get("blocksize")
    _check(type(block_size) is int and block_size in BLOCK_SIZES, name, f"a block size of {block_size!r}")
    _check(state.get("dtype") in DTYPES, name, f"the dtype {state.get('dtype')!r}")
    blocks = ceil(prod(shape) / cast(int, block_size))
    nested = _read_nested(name, state, tensors, blocks)
    _check_map(name, _get(tensors, f"{name}.quant_map"), quant_type)
    absmax_dtype = torch.float32 if nested is None else torch.uint8
    absmax = _sized(tensors, f"{name}.absmax", absmax_dtype, blocks)
    packed = _read_packed(name, _get(tensors, name), ceil(prod(shape) / 2))
    dtype = getattr(torch, cast(str, state["dtype"]))
    return FourBit(packed, absmax, quant_type, shape, dtype, cast(int, block_size), nested)


def read_int8(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Int8:
    """Put the tensors of an 8-bit matrix together, without copies. Raises `InputError` where they do not fit.

    dtype: what to dequantize to; the format does not record it.
    """
    weight = _get(tensors, name)
    _check(weight.dtype == torch.int8 and weight.ndim == 2, name, f"{weight.dtype} {list(weight.shape)} for int8")
    scb, weight_format = int8_companions(name)
    if weight_format in tensors:
        mark = tensors[weight_format]
        _check(mark.numel() == 1 and not mark.is_floating_point() and int(mark) == 0, name, "an unknown weight_format")
    return Int8(weight, _sized(tensors, scb, torch.float32, len(weight)), dtype)


def _pack_state(q: FourBit) -> Tensor:
    """The JSON bytes of what is no tensor, in the order in which bitsandbytes writes it."""
    state: dict[str, object] = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": q.shape,
    }
    if q.nested is not None:
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": q.nested.offset}
    text = json.dumps(state).ljust(_STATE_BYTES)
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)


def _read_state(name: str, blob: Tensor) -> dict[str, object]:
    _check(blob.dtype == torch.uint8 and blob.numel() <= _LONGEST_STATE, name, "a quant_state of the wrong size")
    try:
        state = _parse_state(blob.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: its quant_state is no JSON", _HINT) from error
    _check(isinstance(state, dict), name, "a quant_state that is no JSON object")
    return cast(dict[str, object], state)


# A mixture of experts has thousands of matrices of a few shapes: states, and below tables, are the same bytes.
@lru_cache(maxsize=256)
def _parse_state(text: bytes) -> object:
    return json.loads(text)


def _read_shape(name: str, shape: object) -> tuple[int, ...]:
    good = isinstance(shape, list) and 0 < len(shape) <= 2 and all(type(n) is int and 0 < n < 1 << 40 for n in shape)
    _check(good, name, f"the shape {shape!r}")
    return tuple(cast(list[int], shape))


def _read_nested(
    name: str, state: Mapping[str, object], tensors: Mapping[str, Tensor], blocks: int
) -> NestedScales | None:
    if f"{name}.nested_absmax" not in tensors:
        return None
    offset = state.get("nested_offset")
    _check(isinstance(offset, float) and abs(offset) <= torch.finfo(torch.float32).max, name, f"an offset of {offset}")
    size, dtype = state.get("nested_blocksize"), state.get("nested_dtype")
    _check(size == NESTED_BLOCK_SIZE and dtype == "float32", name, f"nested blocks of {size!r} {dtype!r}")
    absmax = _sized(tensors, f"{name}.nested_absmax", torch.float32, ceil(blocks / NESTED_BLOCK_SIZE))
    quant_map = _sized(tensors, f"{name}.nested_quant_map", torch.float32, 256)
    return NestedScales(absmax, quant_map, cast(float, offset))


def _read_packed(name: str, packed: Tensor, size: int) -> Tensor:
    """The packed bytes; some checkpoints store them under the name of a wider dtype (`bnb_4bit_quant_storage`)."""
    _check(packed.nbytes == size and packed.is_contiguous(), name, f"{packed.nbytes} bytes instead of {size}")
    return packed.view(-1).view(torch.uint8).unsqueeze(1)


def _check_map(name: str, quant_map: Tensor, quant_type: FourBitType) -> None:
    """The table is a constant of the format, and every kernel has it built in: another one is not what it says."""
    same = quant_map.shape == (16,) and _is_map(quant_map.float().cpu().numpy().tobytes(), quant_type)
    _check(same, name, f"a quant_map that is not that of {quant_type}")


@lru_cache(maxsize=256)
def _is_map(values: bytes, quant_type: FourBitType) -> bool:
    found = torch.frombuffer(bytearray(values), dtype=torch.float32)
    return torch.allclose(found, four_bit_map(quant_type), rtol=0, atol=1e-6)


def _sized(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, length: int) -> Tensor:
    tensor = _get(tensors, name)
    _check(tensor.dtype == dtype and tensor.shape == (length,), name, f"{tensor.dtype} {list(tensor.shape)}")
    return tensor


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise InputError(f"{name} is missing", _HINT)
    return tensors[name]


def _check(good: bool, name: str, found: str) -> None:
    if not good:
        raise InputError(f"{name} has {found}, which does not fit", _HINT)
