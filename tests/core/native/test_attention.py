"""Attention of one token a row in one native call, on every path that this CPU has, against torch's own functions."""

import math

import pytest
import torch
import torch.nn.functional as F
from native_cases import PATHS, random, relative_error
from support import needs_kernels

from lmx.core.kv_cache import KVCache, WindowKVCache
from lmx.core.layers.norm import RMSNorm
from lmx.core.layers.rope import rotary_tables, rotate
from lmx.core.native.attention import AttentionStep, can_attend
from lmx.core.native.compiled import forced_path
from lmx.core.state import Span

pytestmark = needs_kernels

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-3}
# heads, key heads, head width, channels that turn: published ones, groups that are no multiple of four, odd widths.
HEADS = [(16, 16, 128, 128), (8, 2, 128, 128), (10, 1, 256, 128), (6, 1, 128, 128), (7, 1, 20, 12), (2, 2, 3, 2)]


@pytest.fixture(params=PATHS)
def path(request):
    with forced_path(request.param) as there:
        if not there:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


class Case:
    """Rows of one new token each, over caches that hold `counts` keys, the new one's slot included."""

    def __init__(self, heads, counts, slots=None, dtype=torch.float32, room=3):
        self.heads, self.kv_heads, self.width, turning = heads
        rows = len(counts)
        self.counts, self.slots = torch.tensor(counts), torch.tensor(slots or [count - 1 for count in counts])
        shapes = [(rows, 1, n * self.width) for n in (self.heads, self.kv_heads, self.kv_heads)]
        self.projected = [random(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
        cache = (rows, self.kv_heads, max(counts) + room, self.width)
        self.keys, self.values = random(*cache, seed=3).to(dtype), random(*cache, seed=4).to(dtype)
        self.rotary = rotary_tables(self.counts[:, None] + 5, turning, 1e4)

    def native(self, norms=None, limit=None):
        step = AttentionStep(*self.rotary, self.slots, self.counts)
        scales = None if norms is None else tuple(norm.scale for norm in norms)
        with torch.no_grad():
            assert can_attend(*self.projected, self.keys, self.values, scales)
            return step.attend(*self.projected, self.keys, self.values, scales, limit)

    @torch.no_grad()
    def expected(self, norms=None, limit=None):
        """The answers in float64 from states that torch shaped, and the buffers as they must be afterwards."""
        query, key, value = self.projected
        if norms is not None:
            query, key = (
                norm.weight * F.rms_norm(x, x.shape[-1:], None, norm.eps)
                for norm, x in zip(norms, (query, key), strict=True)
            )
        split = (x if limit is None else x.clamp(-limit, limit) for x in (query, key, value))
        query, key, value = (x.unflatten(-1, (-1, self.width)).transpose(1, 2) for x in split)
        query, key = rotate(query, self.rotary), rotate(key, self.rotary)
        keys, values, answers = self.keys.clone(), self.values.clone(), []
        for row, (slot, count) in enumerate(zip(self.slots.tolist(), self.counts.tolist(), strict=True)):
            if slot >= 0:
                keys[row, :, slot], values[row, :, slot] = key[row, :, 0], value[row, :, 0]
            seen = [x[row : row + 1, :, :count].double() for x in (keys, values)]
            answer = F.scaled_dot_product_attention(query[row : row + 1].double(), *seen, enable_gqa=True)
            answers.append(answer.transpose(1, 2).flatten(2))
        return torch.cat(answers), keys, values

    def check(self, **shaping):
        answer, keys, values = self.expected(**shaping)
        got = self.native(**shaping)
        dtype = got.dtype
        assert dtype == self.keys.dtype
        assert relative_error(got, answer) < TOLERANCE[dtype]
        assert relative_error(self.keys, keys.double()) < TOLERANCE[dtype] / 10
        assert torch.equal(self.values, values)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("count", [1, 5, 128, 700])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("path")
def test_answer_is_torchs(heads, count, dtype):
    Case(heads, [count], dtype=dtype).check()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("path")
def test_norms_and_limits_come_before_the_heads(dtype):
    case = Case((6, 2, 36, 36), [300, 40], dtype=dtype)
    norms = [RMSNorm(n * 36, 1e-5) for n in (6, 2)]
    for seed, norm in enumerate(norms):
        norm.weight.data.copy_(random(len(norm.weight), seed=seed) + 1)
        norm.to(dtype)
    case.check(norms=norms, limit=0.75)


@pytest.mark.usefixtures("path")
def test_rows_see_their_own_keys_and_padding_writes_none():
    Case((4, 2, 64, 32), [1, 260, 17, 129], slots=[-1, 259, 3, 128]).check()


@pytest.mark.usefixtures("path")
def test_fused_projections_are_read_where_they_lie():
    case = Case((4, 2, 32, 32), [9, 5])
    fused = torch.cat(case.projected, dim=-1)
    case.projected = fused.split([x.shape[-1] for x in case.projected], dim=-1)
    assert not case.projected[1].is_contiguous()
    case.check()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.usefixtures("path")
def test_what_is_not_finite_stays_so_and_in_its_row(bad):
    case = Case((4, 2, 64, 64), [150, 150])
    case.projected[0][1, 0, 64 + 5] = bad  # of head 1
    got = case.native().unflatten(-1, (4, 64))
    assert got[0].isfinite().all()
    assert got[1, 0, 1].isnan().all()
    assert got[1, 0, [0, 2, 3]].isfinite().all()


@pytest.mark.usefixtures("path")
def test_scores_far_apart_do_not_overflow():
    case = Case((4, 2, 64, 64), [400])
    case.projected[0] *= 1e4
    case.check()


@pytest.mark.usefixtures("path")
def test_threads_change_no_bit():
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(Case((8, 2, 128, 128), [1500, 333], dtype=torch.bfloat16).native())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_other_tensors_are_left_to_torch():
    case = Case((4, 2, 32, 32), [9])
    query, key, value = case.projected
    assert can_attend(query, key, value, case.keys, case.values, None)
    assert not can_attend(query.half(), key.half(), value.half(), case.keys.half(), case.values.half(), None)
    assert not can_attend(query.bfloat16(), key, value, case.keys, case.values, None)
    assert not can_attend(query, key, value, case.keys.mT.contiguous().mT, case.values, None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [KVCache, WindowKVCache])
def test_caches_name_the_slots_that_update_writes(kind, padded):
    """A kernel told by `step` must leave the cache as `update` does, and see what `update` returns and allows."""
    shape = (2, 1, 4, torch.float32, torch.device("cpu"))
    cache = kind.empty(*shape, **({"window": 4} if kind is WindowKVCache else {}))
    held = torch.zeros(2, dtype=torch.int64)
    for start in range(7):
        mask = torch.tensor([True, start % 3 != 0]) if padded else torch.ones(2, dtype=torch.bool)
        ordinals = torch.where(mask, held, -1)[:, None] if padded else None
        span = Span(start, 1, ordinals, held if padded else None)
        cache.make_room(span)
        slots, counts = cache.step(span)
        before = cache.keys.clone()
        mark = torch.full((2, 1, 1, 4), start + 1.0)
        visibility = cache.visibility(span)
        keys, _ = cache.update(mark, mark, span)
        seen = torch.ones(2, keys.shape[2], dtype=torch.bool)
        if visibility.mask is not None:
            seen = visibility.mask[:, 0, 0].expand(2, -1)
        for row in range(2):
            expected = before[row].clone()
            if slots[row] >= 0:
                expected[:, slots[row]] = mark[row, :, 0]
            assert torch.equal(cache.keys[row], expected)
            assert seen[row].nonzero()[:, 0].tolist() == list(range(int(counts[row])))
        held = held + mask
