"""A decode step under torch.compile: one graph, the same tokens, and no new compilation as the state grows."""

from collections.abc import Callable

import pytest
import torch
from parity.families import FAMILIES, FamilyRow, padded, pair, random_ids
from torch import Tensor

from lmx.core.model import AnyState

# Counting lines makes the compiler, all of it Python, three times as slow; other tests run the lines that it reads.
pytestmark = pytest.mark.no_cover
STEPS = 14
PROMPT = padded([random_ids(7), random_ids(4)], "left")

CASES = [(row, index, 1) for row in FAMILIES for index in sorted({0, row.windowed or 0})] + [
    (row, row.windowed or 0, 2) for row in FAMILIES
]


class Compiled:
    """`torch.compile`'s graphs, run as they are: what inductor makes of them is torch's affair."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize(("row", "index", "batch"), CASES, ids=str)
def test_decode_step(row: FamilyRow, index: int, batch: int) -> None:
    model = pair(row, index).ours
    compiled = Compiled()
    ids, mask = (PROMPT[0], PROMPT[1]) if batch == 2 else (PROMPT[0][:1], PROMPT[1][:1])

    def step(token: Tensor, state: AnyState) -> Tensor:
        return model(token, state=state).logits

    def run(step_once: Callable[[Tensor, AnyState], Tensor]) -> Tensor:
        state = model.make_state(batch)
        model(ids, attention_mask=mask, state=state)
        return torch.cat([step_once(token, state) for token in random_ids(batch, STEPS).split(1, 1)], 1)

    torch.compiler.reset()
    with torch.inference_mode():
        expected, answer = run(step), run(torch.compile(step, fullgraph=True, backend=compiled))
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(answer.argmax(-1), expected.argmax(-1))
    # The first graph may have the first step's length in it, the second none.
    assert 1 <= compiled.graphs <= 2


@pytest.mark.slow
@pytest.mark.parametrize("row", FAMILIES, ids=str)
def test_decode_step_with_inductor(row: FamilyRow) -> None:
    model = pair(row, 0).ours

    def logits(token: Tensor, state: AnyState) -> Tensor:
        return model(token, state=state).logits

    torch.compiler.reset()
    compiled = torch.compile(logits, fullgraph=True)
    ids = random_ids(1, 7)
    with torch.inference_mode():
        plain, fast = model.make_state(), model.make_state()
        expected = answer = model(ids, state=plain).logits
        model(ids, state=fast)
        for _ in range(STEPS):
            token = expected[:, -1:].argmax(-1)
            expected, answer = logits(token, plain), compiled(token, fast)
            assert (answer - expected).abs().max() < 1e-4
            assert torch.equal(answer.argmax(-1), expected.argmax(-1))
