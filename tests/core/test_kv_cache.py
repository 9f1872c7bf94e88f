"""Both caches against a list of all keys and values, read by the definition of attention."""

from random import Random

import pytest
import torch
from torch import Tensor

from lmx.core.errors import InputError
from lmx.core.kv_cache import AttentionCache, KVCache, WindowKVCache
from lmx.core.layers.attention import Visibility, attend
from lmx.core.state import Span, State, StateError
from lmx.core.visibility import causal_visibility

BATCH, KV_HEADS, HEADS, WIDTH = 3, 2, 4, 4
CPU = torch.device("cpu")


def empty(window: int | None) -> AttentionCache:
    if window is None:
        return KVCache.empty(BATCH, KV_HEADS, WIDTH, torch.float64, CPU)
    return WindowKVCache.empty(BATCH, KV_HEADS, WIDTH, torch.float64, CPU, window)


class Lists:
    """What a cache stands for: every row's keys and values, one after another."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.keys: list[list[Tensor]] = [[] for _ in range(BATCH)]
        self.values: list[list[Tensor]] = [[] for _ in range(BATCH)]

    def attend(self, row: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One token's answer [heads, width], after it has been remembered."""
        self.keys[row].append(key)
        self.values[row].append(value)
        last = slice(None) if self.window is None else slice(-self.window, None)
        keys, values = (torch.stack(kept[last], 1) for kept in (self.keys[row], self.values[row]))
        group = HEADS // KV_HEADS
        answers = []
        for head in range(HEADS):
            scores = keys[head // group] @ query[head] / WIDTH**0.5
            answers.append(scores.softmax(0) @ values[head // group])
        return torch.cat(answers)


def call(state: State[AttentionCache], qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None) -> Tensor:
    """One call of one attention layer, as a decoder makes it."""
    query, key, value = qkv
    span = state.span(query.shape[2], mask)
    visibility = state.layers[0].visibility(span)
    keys, values = state.layers[0].update(key, value, span)
    answer, _ = attend(query, keys, values, visibility, "sdpa")
    state.advance(span)
    return answer


def random_call(columns: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((BATCH, HEADS), (BATCH, KV_HEADS), (BATCH, KV_HEADS))
    query, key, value = (torch.randn(*shape, columns, WIDTH, dtype=torch.float64) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 8])
def test_any_chunking(window: int | None, padding: bool) -> None:
    torch.manual_seed(0)
    for seed in range(25):
        random = Random(seed)
        state, lists = State("test", [empty(window)], BATCH), Lists(window)
        while state.length < 30:
            columns = random.choice([1, 1, 1, 2, 3, 7, 13])
            mask = torch.rand(BATCH, columns) < random.choice([0.3, 0.7, 1.0]) if padding else None
            qkv = random_call(columns)
            answer = call(state, qkv, mask)
            assert torch.isfinite(answer).all()
            for row in range(BATCH):
                for column in range(columns):
                    if mask is None or mask[row, column]:
                        token = (states[row, :, column] for states in qkv)
                        expected = lists.attend(row, *token)
                        assert (answer[row, column] - expected).abs().max() < 1e-12
            assert state.length == max(map(len, lists.keys))
        if padding:
            assert state.lengths is not None
            assert state.lengths.tolist() == [len(keys) for keys in lists.keys]
        if window is not None:
            assert state.layers[0].keys.shape[2] == window


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("window", [None, 3, 8])
def test_without_a_state(window: int | None, padding: bool) -> None:
    torch.manual_seed(1)
    query, key, value = random_call(12)
    mask = torch.rand(BATCH, 12) < 0.6 if padding else None
    visibility = causal_visibility(Span.stateless(12, mask), window, CPU)
    answers = {kind: attend(query, key, value, visibility, kind)[0] for kind in ("eager", "sdpa")}
    lists = Lists(window)
    for row in range(BATCH):
        for column in range(12):
            if mask is None or mask[row, column]:
                expected = lists.attend(row, query[row, :, column], key[row, :, column], value[row, :, column])
                assert (answers["sdpa"][row, column] - expected).abs().max() < 1e-12
                assert (answers["eager"][row, column] - expected).abs().max() < 1e-6  # its softmax is in float32


@pytest.mark.parametrize("window", [None, 6])
def test_truncate_and_overwrite(window: int | None) -> None:
    torch.manual_seed(2)
    state = State("test", [empty(window)], BATCH)
    call(state, random_call(2), None)
    kept = state.clone()
    call(state, random_call(3), None)
    state.truncate(2)
    after = random_call(4)
    assert torch.equal(call(state, after, None), call(kept, after, None))
    assert state.length == 6


def test_a_ring_that_went_round_cannot_be_cut() -> None:
    state = State("test", [empty(4)], BATCH)
    call(state, random_call(4), None)
    state.truncate(3)
    call(state, random_call(2), None)
    assert state.length == 5
    with pytest.raises(StateError, match="sliding window of 4"):
        state.truncate(3)
    state.truncate(5)
    for length in (-1, 6):
        with pytest.raises(StateError, match="cannot cut"):
            state.truncate(length)


def test_a_full_cache_grows_by_half() -> None:
    state = State("test", [empty(None)], BATCH)
    sizes = set()
    for _ in range(60):
        call(state, random_call(20), None)
        sizes.add(state.layers[0].keys.shape[2])
    assert state.length == 1200
    assert len(sizes) < 6
    assert state.nbytes == 2 * BATCH * KV_HEADS * WIDTH * 8 * max(sizes)
    assert state.clone().nbytes == 2 * BATCH * KV_HEADS * WIDTH * 8 * 1200


def test_saved_tensors_must_fit() -> None:
    keys = torch.zeros(1, 2, 3, 4)
    for kind in (KVCache, WindowKVCache):
        for tensors in ({"keys": keys}, {"keys": keys, "values": keys[0]}, {"keys": keys, "values": keys[:, :1]}):
            with pytest.raises(InputError, match="saved state"):
                kind.restore(tensors)


def test_padding_queries_have_something_to_see() -> None:
    """A row of softmax over nothing would be NaN, and spread."""
    mask = torch.zeros(BATCH, 5, dtype=torch.bool)
    visibility: Visibility = causal_visibility(Span.stateless(5, mask), None, CPU)
    for implementation in ("eager", "sdpa"):
        answer, _ = attend(*random_call(5), visibility, implementation)
        assert torch.isfinite(answer).all()
