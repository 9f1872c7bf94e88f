"""What 32-bit words of a stored matrix hold, in Triton: the values, their scales, and the tile of a product.

Every format is read as words, because a thread that owns the words of a row, and the vector's elements that meet them,
needs nothing from its neighbours: 8 four-bit codes a word, 4 int8, 2 bf16 or fp16, 1 float32.
"""

import triton
import triton.language as tl

# `Kind` of lmx.core.native.vector.
FOUR_BIT, INT8, BF16, F32, F16 = (tl.constexpr(number) for number in range(5))
# Columns of a bank's table: addresses of the data, of absmax, of what decodes absmax, and the offset's bits.
FIELDS = tl.constexpr(5)
_INVERSE_127 = tl.constexpr(7.874015718698502e-3)
_NESTED_BLOCK = tl.constexpr(256)


@triton.jit
def open_matrix(row, NESTED: tl.constexpr):
    """What a row of a table points to: data, absmax, and what decodes absmax. Read once, before any loop."""
    data, absmax = tl.load(row).to(tl.pointer_type(tl.int32)), tl.load(row + 1)
    if NESTED:
        decoded, outer = tl.load(row + 2).to(tl.pointer_type(tl.float32)), tl.load(row + 3)
        offset = tl.load(row + 4).to(tl.int32).to(tl.float32, bitcast=True)
        return data, absmax.to(tl.pointer_type(tl.uint8)), decoded, outer.to(tl.pointer_type(tl.float32)), offset
    else:
        return data, absmax.to(tl.pointer_type(tl.float32))


@triton.jit
def open_expert(table, expert, PART: tl.constexpr, NESTED: tl.constexpr):
    """The gate (0), up (1) or down (2) matrix of an expert, by a bank's table."""
    return open_matrix(table + (expert * 3 + PART) * FIELDS, NESTED)


@triton.jit
def _code(words, K: tl.constexpr):
    return (words >> (4 * (K ^ 1))) & 15  # the first of two is in the high nibble


@triton.jit
def _part(words, K: tl.constexpr, KIND: tl.constexpr):
    if KIND == INT8:
        return ((words << (24 - 8 * K)) >> 24).to(tl.float32)
    elif KIND == BF16:
        return (words << 16 if K == 0 else words & -65536).to(tl.float32, bitcast=True)
    else:
        return (words >> (16 * K)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def values(codes, words, KIND: tl.constexpr, PER: tl.constexpr):
    """What words [rows, words] hold: float32 [rows, words, PER], without scales; all of a word in one thread.

    Joined so that the bits of a value's place in its word are the last dimensions, the lowest bit the very last. Codes
    are looked up all at once: in one warp by a shuffle each (its lanes hold the 16 values), in several through shared
    memory. Through global memory each would be an address, which takes two instructions, and a load.
    """
    SHAPE: tl.constexpr = [words.shape[0], words.shape[1], PER]
    if KIND == FOUR_BIT:
        even = tl.join(tl.join(_code(words, 0), _code(words, 4)), tl.join(_code(words, 2), _code(words, 6)))
        odd = tl.join(tl.join(_code(words, 1), _code(words, 5)), tl.join(_code(words, 3), _code(words, 7)))
        return tl.reshape(tl.gather(codes, tl.reshape(tl.join(even, odd), [words.numel * PER]), 0), SHAPE)
    elif KIND == INT8:
        even = tl.join(_part(words, 0, KIND), _part(words, 2, KIND))
        odd = tl.join(_part(words, 1, KIND), _part(words, 3, KIND))
        return tl.reshape(tl.join(even, odd), SHAPE)
    elif PER == 2:
        return tl.join(_part(words, 0, KIND), _part(words, 1, KIND))
    else:
        return tl.expand_dims(words.to(tl.float32, bitcast=True), 2)


@triton.jit
def word_scales(matrix, at, mask, BLOCK: tl.constexpr, NESTED: tl.constexpr):
    """The absmax of the blocks of `BLOCK` elements that words of four-bit codes lie in."""
    block = at // (BLOCK // 8)
    scale = tl.load(matrix[1] + block, mask=mask, other=0)
    if NESTED:
        outer = tl.load(matrix[3] + block // _NESTED_BLOCK, mask=mask, other=0)
        return tl.load(matrix[2] + scale.to(tl.int32), mask=mask, other=0) * outer + matrix[4]
    else:
        return scale


@triton.jit
def row_scales(matrix, rows, mask, KIND: tl.constexpr):
    """What int8 rows are multiplied with; 1 for other formats."""
    if KIND == INT8:
        return tl.load(matrix[1] + rows, mask=mask, other=0) * _INVERSE_127
    else:
        return tl.full(rows.shape, 1.0, tl.float32)


@triton.jit
def load_elements(x, words, mask, PER: tl.constexpr):
    """The elements of a vector that meet each word [words]: float32 [words, PER]."""
    places = x + words[:, None] * PER + tl.arange(0, PER)[None, :]
    return tl.load(places, mask=mask[:, None], other=0).to(tl.float32)


@triton.jit
def _two(v):
    even, odd = tl.split(tl.reshape(v, [v.shape[0], v.shape[1], 1, 2]))  # [rows, words, 1]
    return tl.reshape(even, [v.shape[0], v.shape[1]]), tl.reshape(odd, [v.shape[0], v.shape[1]])


@triton.jit
def _four(v):
    even, odd = tl.split(tl.reshape(v, [v.shape[0], v.shape[1], 2, 2]))
    return _two(even) + _two(odd)


@triton.jit
def _pieces(v):
    """The values of each word [rows, words, PER], as PER tensors [rows, words] in an order that is always the same."""
    if v.shape[2] == 8:
        even, odd = tl.split(tl.reshape(v, [v.shape[0], v.shape[1], 4, 2]))
        return _four(even) + _four(odd)
    elif v.shape[2] == 4:
        return _four(v)
    elif v.shape[2] == 2:
        return _two(v)
    else:
        return (tl.reshape(v, [v.shape[0], v.shape[1]]),)


@triton.jit
def add_products(
    total, codes, matrix, at, mask, x,
    KIND: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """`total` [rows, words] plus, word by word, the products of a matrix's words with the elements x [words, PER]."""
    words = tl.load(matrix[0] + at, mask=mask, other=0)
    v, x = _pieces(values(codes, words, KIND, PER)), _pieces(x[None, :, :])
    part = v[0] * x[0]
    for k in tl.static_range(1, PER):
        part += v[k] * x[k]  # one instruction each, where a sum of products would take three for two
    if KIND == FOUR_BIT:
        return total + word_scales(matrix, at, mask, BLOCK, NESTED) * part
    else:
        return total + part


@triton.jit
def dense_tile(
    codes, matrix, at, mask,
    KIND: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, PER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The values [rows, words * PER] of words [rows, words], for a product on tensor cores; int8 without its scale."""
    words = tl.load(matrix[0] + at, mask=mask, other=0)
    tile = values(codes, words, KIND, PER)
    if KIND == FOUR_BIT:
        tile *= word_scales(matrix, at, mask, BLOCK, NESTED)[:, :, None]
    return tl.reshape(tile.to(DTYPE), [words.shape[0], words.shape[1] * PER])


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The gate's activation, by the numbers of lmx.core.native.vector; NaN stays NaN."""
    if ACTIVATION == 0:
        return x * tl.sigmoid(x)  # SiLU
    elif ACTIVATION == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))  # GELU
    elif ACTIVATION == 2:
        # The tanh form: 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return tl.where(x < 0, 0.0, x)  # ReLU
