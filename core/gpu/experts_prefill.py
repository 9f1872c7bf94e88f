"""Many tokens through a bank of experts: tiles of tokens of one expert times tiles that are dequantized on the way."""

import triton
import triton.language as tl

from lmx.core.gpu.words import activate, dense_tile, open_expert, row_scales


@triton.jit
def _tile_of(tile, starts, first_tiles, EXPERTS: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr):
    """Whose tile this is: the expert, and the sorted places from first up to last of its tokens.

    starts [experts + 1]: where each expert's choices begin among the sorted ones; first_tiles [experts + 1]: the number
    of its first tile. The grid has room for the worst case, so that nobody must wait to learn how many tiles there are;
    one beyond the last gets no places.
    """
    experts = tl.arange(0, PADDED)
    before = tl.load(first_tiles + experts, mask=experts < EXPERTS, other=1 << 30)
    expert = tl.sum((before <= tile).to(tl.int32)) - 1
    first = tl.load(starts + expert) + (tile - tl.load(first_tiles + expert)) * TOKENS
    return expert.to(tl.int64), first, tl.load(starts + expert + 1)


@triton.jit
def gate_and_up(
    x, order, starts, first_tiles, table, codes, inner_out,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    KIND: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    PADDED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`act(gate(x)) * up(x)` for choices sorted by expert: x [tokens, hidden] -> [choices, inner], in sorted order.

    order [choices]: which choice (token * top_k + number) stands at each sorted place. Programs of one tile of rows and
    all tiles of tokens are neighbours: a tile of weights is read from memory once.
    """
    expert, first, last = _tile_of(tl.program_id(0), starts, first_tiles, EXPERTS, PADDED, TOKENS)
    if first >= last:
        return
    places = first + tl.arange(0, TOKENS)
    here = places < last
    tokens = tl.load(order + places, mask=here, other=0) // TOP_K
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    gate, up = open_expert(table, expert, 0, NESTED), open_expert(table, expert, 1, NESTED)
    sixteen = tl.load(codes + tl.arange(0, 16))
    ROW_WORDS: tl.constexpr = HIDDEN // PER
    gates = tl.zeros([TOKENS, ROWS], tl.float32)
    ups = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, HIDDEN, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inputs = x + tokens[:, None] * HIDDEN + columns[None, :]
        tile = tl.load(inputs, mask=here[:, None] & (columns < HIDDEN)[None, :], other=0).to(DTYPE)
        words = start // PER + tl.arange(0, COLUMNS // PER)
        at = rows[:, None] * ROW_WORDS + words[None, :]
        mask = (rows < INNER)[:, None] & (words < ROW_WORDS)[None, :]
        weights = dense_tile(sixteen, gate, at, mask, KIND, BLOCK, NESTED, PER, DTYPE)
        gates = tl.dot(tile, tl.trans(weights), gates, input_precision="ieee")
        weights = dense_tile(sixteen, up, at, mask, KIND, BLOCK, NESTED, PER, DTYPE)
        ups = tl.dot(tile, tl.trans(weights), ups, input_precision="ieee")
    gates *= row_scales(gate, rows, rows < INNER, KIND)[None, :]
    ups *= row_scales(up, rows, rows < INNER, KIND)[None, :]
    out = inner_out + places[:, None] * INNER + rows[None, :]
    inner = activate(gates, ACTIVATION) * ups
    tl.store(out, inner.to(inner_out.dtype.element_ty), mask=here[:, None] & (rows < INNER)[None, :])


@triton.jit
def down(
    inner, order, weights, starts, first_tiles, table, codes, out,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr,
    KIND: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    PADDED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Each choice's answer times its weight, back in the order of the tokens: inner [choices, inner] (sorted) ->
    [choices, hidden].
    """
    expert, first, last = _tile_of(tl.program_id(0), starts, first_tiles, EXPERTS, PADDED, TOKENS)
    if first >= last:
        return
    places = first + tl.arange(0, TOKENS)
    here = places < last
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    matrix = open_expert(table, expert, 2, NESTED)
    sixteen = tl.load(codes + tl.arange(0, 16))
    ROW_WORDS: tl.constexpr = INNER // PER
    answers = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, INNER, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inputs = inner + places[:, None] * INNER + columns[None, :]
        tile = tl.load(inputs, mask=here[:, None] & (columns < INNER)[None, :], other=0).to(DTYPE)
        words = start // PER + tl.arange(0, COLUMNS // PER)
        at = rows[:, None] * ROW_WORDS + words[None, :]
        mask = (rows < HIDDEN)[:, None] & (words < ROW_WORDS)[None, :]
        dense = dense_tile(sixteen, matrix, at, mask, KIND, BLOCK, NESTED, PER, DTYPE)
        answers = tl.dot(tile, tl.trans(dense), answers, input_precision="ieee")
    answers *= row_scales(matrix, rows, rows < HIDDEN, KIND)[None, :]
    choices = tl.load(order + places, mask=here, other=0)
    answers *= tl.load(weights + choices, mask=here, other=0)[:, None]
    places_out = out + choices[:, None] * HIDDEN + rows[None, :]
    tl.store(places_out, answers.to(out.dtype.element_ty), mask=here[:, None] & (rows < HIDDEN)[None, :])
