import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmx.core.layers.conv import causal_conv
from lmx.core.layers.linear_recurrence import rg_lru
from lmx.core.layers.padding import Compaction
from lmx.core.layers.scan import selective_scan

INNER, N, KERNEL = 12, 4, 4
State = tuple[Tensor, Tensor]


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def mamba(x: Tensor, state: State, pads: Compaction | None) -> tuple[Tensor, State]:
    """A mixer in small: its biases make even a row of zeros move the state, unless pads are skipped."""
    x, conv = causal_conv(x, weights(INNER, KERNEL), weights(INNER), state[0], None if pads is None else pads.lengths)
    x = F.silu(x)
    B, C = F.linear(x, weights(2 * N, INNER)).chunk(2, -1)
    delta = F.softplus(F.linear(x, weights(INNER, INNER) * 0.2))
    if pads is not None:
        delta = pads.fill_tail(delta, 0)
    y, ssm = selective_scan(x, delta, -weights(INNER, N).exp(), B, C, state[1])
    return y, (conv, ssm)


def griffin(x: Tensor, state: State, pads: Compaction | None) -> tuple[Tensor, State]:
    x, conv = causal_conv(x, weights(INNER, KERNEL), weights(INNER), state[0], None if pads is None else pads.lengths)
    a = torch.sigmoid(F.linear(x, weights(INNER, INNER)))
    x = torch.sqrt(1 - a * a) * x
    if pads is not None:
        a, x = pads.fill_tail(a, 1), pads.fill_tail(x, 0)
    h, lru = rg_lru(a, x, state[1])
    return h, (conv, lru)


def start(layer: object, batch: int) -> State:
    recurrent = (batch, INNER, N) if layer is mamba else (batch, INNER)
    return torch.zeros(batch, INNER, KERNEL - 1), torch.zeros(recurrent)


MASKS = {
    "left": ["0001111111", "1111111111", "0000000001", "0111111111"],
    "right": ["1111111000", "1111111111", "1000000000", "1111111110"],
    "holes": ["0110010111", "1010101010", "0000100000", "1111100001"],
    "an empty row": ["0000000000", "1111111111", "0011001100", "1111111111"],
}


def parse(rows: list[str]) -> Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


@pytest.mark.parametrize("layer", [mamba, griffin])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("second", MASKS)
def test_padded_rows_equal_unpadded_ones_across_two_chunks(layer: type(mamba), name: str, second: str) -> None:  # type: ignore[valid-type]
    masks = [parse(MASKS[name]), parse(MASKS[second])]
    chunks = [torch.randn(4, 10, INNER), torch.randn(4, 10, INNER)]
    state, outputs = start(layer, 4), []
    for x, mask in zip(chunks, masks, strict=True):
        pads = Compaction.of(mask)
        assert pads is not None
        poisoned = x.masked_fill(~mask[..., None], torch.nan)  # what stands at pads must not matter
        y, state = layer(pads.pack(poisoned), state, pads)
        outputs.append(pads.unpack(y))
    for row in range(4):
        real = [x[row][mask[row]] for x, mask in zip(chunks, masks, strict=True)]
        expected, end = layer(torch.cat(real)[None], start(layer, 1), None)
        actual = torch.cat([y[row][mask[row]] for y, mask in zip(outputs, masks, strict=True)])
        torch.testing.assert_close(actual, expected[0], rtol=1e-5, atol=1e-6)
        for ours, alone in zip(state, end, strict=True):
            torch.testing.assert_close(ours[row], alone[0], rtol=1e-5, atol=1e-6)
    for y, mask in zip(outputs, masks, strict=True):
        assert not y[~mask].any()


def test_the_docstrings_example() -> None:
    letters = torch.tensor([[0, 1, 2, 0, 3], [4, 5, 6, 7, 8], [9, 10, 0, 0, 0]])
    pads = Compaction.of(parse(["01101", "11111", "11000"]))
    assert pads is not None
    packed = pads.pack(letters)
    assert packed.tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 10, 0, 0, 0]]
    assert pads.lengths.tolist() == [3, 5, 2]
    assert torch.equal(pads.real, parse(["11100", "11111", "11000"]))
    assert torch.equal(pads.unpack(packed), letters)
    assert pads.fill_tail(packed, -1)[0].tolist() == [1, 2, 3, -1, -1]


def test_nothing_to_do_without_pads() -> None:
    assert Compaction.of(torch.ones(2, 5, dtype=torch.bool)) is None
    assert Compaction.of(torch.ones(2, 0, dtype=torch.bool)) is None


@pytest.mark.parametrize("tail", [(), (3,), (2, 3)])
def test_pack_and_unpack_any_rank_and_their_gradients(tail: tuple[int, ...]) -> None:
    mask = parse(MASKS["holes"])
    pads = Compaction.of(mask)
    assert pads is not None
    x = torch.randn(4, 10, *tail, requires_grad=True)
    back = pads.unpack(pads.pack(x))
    assert torch.equal(back[mask], x[mask])
    back.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, mask.reshape(4, 10, *[1] * len(tail)).expand_as(x))


def test_packing_is_one_graph() -> None:
    pads = Compaction.of(parse(MASKS["holes"]))
    assert pads is not None
    x, state, filters = torch.randn(4, 10, INNER), start(griffin, 4), weights(INNER, KERNEL)

    def run(x: Tensor, state: State) -> Tensor:
        y, _ = causal_conv(pads.pack(x), filters, None, state[0], pads.lengths)
        return pads.unpack(pads.fill_tail(y, 0))

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x, state), run(x, state))
