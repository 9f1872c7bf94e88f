"""A few tokens through a bank of experts: two kernels, a vector times rows at the speed of the card's memory."""

import triton
import triton.language as tl

from lmx.core.gpu.words import activate, add_products, load_elements, open_expert, row_scales


@triton.jit
def gate_and_up(
    x, ids, table, codes, inner_out,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    KIND: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """`act(gate(x)) * up(x)`, `ROWS` rows of a chosen expert a program: x [tokens, hidden] -> [tokens * top_k, inner].

    Programs for the same rows of other choices are neighbours, so that an expert that several tokens chose is read from
    memory once and from the cache after that.
    """
    slot = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    expert = tl.load(ids + slot)
    expert = tl.where((expert >= 0) & (expert < EXPERTS), expert, 0)  # `down_and_sum` makes NaN of what is no expert
    gate, up = open_expert(table, expert, 0, NESTED), open_expert(table, expert, 1, NESTED)
    sixteen = tl.load(codes + tl.arange(0, 16))
    vector = x + (slot // TOP_K) * HIDDEN
    ROW_WORDS: tl.constexpr = HIDDEN // PER
    gates = tl.zeros([ROWS, WORDS], tl.float32)
    ups = tl.zeros([ROWS, WORDS], tl.float32)
    for first in range(0, ROW_WORDS, WORDS):
        words = first + tl.arange(0, WORDS)
        here = words < ROW_WORDS
        at = rows[:, None] * ROW_WORDS + words[None, :]
        mask = (rows < INNER)[:, None] & here[None, :]
        elements = load_elements(vector, words, here, PER)
        gates = add_products(gates, sixteen, gate, at, mask, elements, KIND, BLOCK, NESTED, PER)
        ups = add_products(ups, sixteen, up, at, mask, elements, KIND, BLOCK, NESTED, PER)
    g = tl.sum(gates, 1) * row_scales(gate, rows, rows < INNER, KIND)
    u = tl.sum(ups, 1) * row_scales(up, rows, rows < INNER, KIND)
    inner = activate(g, ACTIVATION) * u
    tl.store(inner_out + slot * INNER + rows, inner.to(inner_out.dtype.element_ty), mask=rows < INNER)


@triton.jit
def down_and_sum(
    inner, ids, weights, table, codes, out,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    KIND: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The weighted sum of the chosen experts' answers: inner [tokens * top_k, inner] -> [tokens, hidden].

    One program adds up all choices of a token, one after another in float32: the order is always the same.
    """
    token = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sixteen = tl.load(codes + tl.arange(0, 16))
    ROW_WORDS: tl.constexpr = INNER // PER
    total = tl.zeros([ROWS, WORDS], tl.float32)
    for choice in range(TOP_K):
        slot = token * TOP_K + choice
        expert, weight = tl.load(ids + slot), tl.load(weights + slot)
        known = (expert >= 0) & (expert < EXPERTS)
        down = open_expert(table, tl.where(known, expert, 0), 2, NESTED)
        answer = tl.zeros([ROWS, WORDS], tl.float32)
        for first in range(0, ROW_WORDS, WORDS):
            words = first + tl.arange(0, WORDS)
            here = words < ROW_WORDS
            at = rows[:, None] * ROW_WORDS + words[None, :]
            mask = (rows < HIDDEN)[:, None] & here[None, :]
            elements = load_elements(inner + slot * INNER, words, here, PER)
            answer = add_products(answer, sixteen, down, at, mask, elements, KIND, BLOCK, NESTED, PER)
        scale = row_scales(down, rows, rows < HIDDEN, KIND) * tl.where(known, weight, float("nan"))
        total += answer * scale[:, None]
    tl.store(out + token * HIDDEN + rows, tl.sum(total, 1).to(out.dtype.element_ty), mask=rows < HIDDEN)
