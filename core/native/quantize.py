"""Weights to four-bit codes, to 8-bit rows and to 8-bit scales, and how far off they then are."""

import ctypes

import torch
from torch import Tensor

from lmx.core.large_pages import lasting_zeros
from lmx.core.native.compiled import INT, LONG, POINTER, c_function, library
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.vector import MatrixTable

_quantize_4bit = c_function("lmx_quantize_4bit", POINTER, INT, LONG, LONG, POINTER, POINTER, POINTER, POINTER, POINTER)
_quantize_int8 = c_function("lmx_quantize_int8", POINTER, INT, LONG, LONG, POINTER, POINTER)
_quantize_scales = c_function("lmx_quantize_scales", POINTER, LONG, POINTER, POINTER, POINTER)
_are_bf16 = c_function("lmx_are_bf16", POINTER, LONG, result=INT)
_to_bf16 = c_function("lmx_to_bf16", POINTER, LONG, POINTER)
_squared_error = c_function("lmx_squared_error", POINTER, POINTER, INT, result=ctypes.c_double)


def can_quantize(x: Tensor) -> bool:
    """Whether the kernels are there and read these weights as they lie: on the CPU, without gaps."""
    return x.is_cpu and x.dtype in DTYPE_CODES and x.is_contiguous() and x.numel() > 0 and library() is not None


def encode_four_bit(
    x: Tensor, block_size: int, thresholds: Tensor, codes: Tensor | None, packed: Tensor, absmax: Tensor
) -> None:
    """Fill packed uint8 [ceil(elements / 2)] and absmax float32 [blocks] with x, as `lmx.quant.four_bit` says.

    thresholds: float32 [15], halfway between the 16 values in their order; codes: uint8 [256], for a byte of two places
    in that order the byte of two codes, or None where they are the same. NaN and infinity in x show in absmax.
    """
    flat = x.view(-1)
    tail = flat[len(flat) // block_size * block_size :].float()
    places = thresholds.data_ptr(), None if codes is None else codes.data_ptr(), tail.data_ptr()
    given = x.data_ptr(), DTYPE_CODES[x.dtype], x.numel(), block_size
    _quantize_4bit()(*given, *places, packed.data_ptr(), absmax.data_ptr())


def encode_int8(x: Tensor, weight: Tensor, absmax: Tensor) -> None:
    """Fill weight int8 [rows, columns] and absmax float32 [rows] with x, as `lmx.quant.int8` says.

    NaN and infinity in x show in absmax.
    """
    _quantize_int8()(x.data_ptr(), DTYPE_CODES[x.dtype], *x.shape, weight.data_ptr(), absmax.data_ptr())


def encode_scales(x: Tensor, nearest: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """Fill codes uint8 [n] and absmax float32 [ceil(n / 256)] with float32 x [n].

    nearest: uint8 [65536], the code for each of so many even steps from -1 to 1.
    """
    _quantize_scales()(x.data_ptr(), len(x), nearest.data_ptr(), codes.data_ptr(), absmax.data_ptr())


def can_narrow(absmax: Tensor) -> bool:
    """Whether the kernels are there and read these scales as they lie."""
    return absmax.is_cpu and absmax.is_contiguous() and library() is not None


def narrow_scales(absmax: Tensor) -> Tensor | None:
    """Float32 `absmax` [n] as bfloat16 in memory for what lasts; None where a bit would be lost."""
    if not _are_bf16()(absmax.data_ptr(), len(absmax)):
        return None
    narrow = lasting_zeros((len(absmax),), torch.bfloat16)
    _to_bf16()(absmax.data_ptr(), len(absmax), narrow.data_ptr())
    return narrow


def squared_error(table: MatrixTable, source: Tensor) -> float:
    """The sum of `(value - source)^2` over the one quantized matrix of a table; source [rows, columns]."""
    found: float = _squared_error()(table.words.data_ptr(), source.data_ptr(), DTYPE_CODES[source.dtype])
    return found
