"""Which of torch's kernels answers, and that the later parts of a prompt see what they must.

The kernels' own numbers are held to transformers in `tests/parity`, and on a card to the CPU in `tests/gpu`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmx.core.errors import UsageError
from lmx.core.kv_cache import KVCache, WindowKVCache
from lmx.core.layers import attention
from lmx.core.layers.attention import Implementation, Visibility, attend
from lmx.core.state import Span
from lmx.core.visibility import causal_visibility

HEADS, KV_HEADS, WIDTH = 4, 2, 16


def projected(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
    query, key, value = (torch.randn(1, count, length, WIDTH, generator=generator) for count, length in heads)
    return query, key, value


def later_part(start: int, length: int) -> Visibility:
    cache = KVCache.empty(1, KV_HEADS, WIDTH, torch.float32, torch.device("cpu"))
    return cache.visibility(Span(start, length))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 7), (5, 1), (5, 3), (1, 8)])
def test_a_part_of_a_prompt_sees_what_stands_before_it(start: int, length: int, implementation: Implementation) -> None:
    query, key, value = projected(length, start + length)
    whole, _ = attend(query, key, value, later_part(start, length), implementation)
    whole = whole.unflatten(2, (HEADS, WIDTH))
    repeated = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
    keys, values = repeated
    for number in range(length):
        seen = start + number + 1
        alone = F.scaled_dot_product_attention(query[:, :, number : number + 1], keys[:, :, :seen], values[:, :, :seen])
        torch.testing.assert_close(whole[:, number], alone[:, :, 0])


def test_what_needs_no_mask_says_so() -> None:
    """Kernels that take none may serve these; padding and windows that are narrower than a prompt need theirs."""
    assert later_part(0, 7) == Visibility(None, causal=True)
    assert later_part(5, 1) == Visibility(None)
    later = later_part(5, 3)
    assert later.causal
    assert later.mask is not None
    assert later.mask[0, 0].tolist() == torch.ones(3, 8).tril(5).bool().tolist()
    padded = Span(0, 2, torch.tensor([[-1, 0]]), torch.tensor([0]), whole=False)
    assert not causal_visibility(padded, None, torch.device("cpu")).causal
    ring = WindowKVCache.empty(1, 1, WIDTH, torch.float32, torch.device("cpu"), window=4)
    assert not ring.visibility(Span(5, 3)).causal


class Elsewhere(Tensor):
    """A tensor that says it is on a card."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]


def on_card(*tensors: Tensor) -> list[Tensor]:
    return [each.as_subclass(Elsewhere) for each in tensors]


REFUSED: list[tuple[str, Callable[[], Any]]] = [
    ("needs CUDA, and this runs on cpu", lambda: (*projected(3, 3), Visibility(None, True))),
    ("takes no mask", lambda: (*on_card(*projected(3, 3)), Visibility(torch.ones(1, 1, 3, 3, dtype=torch.bool)))),
    ("the model is in float32", lambda: (*on_card(*projected(3, 8)), later_part(5, 3))),
    ("16 channels", lambda: (*on_card(*(x.bfloat16() for x in projected(3, 8))), later_part(5, 3))),
]


@pytest.mark.parametrize(("reason", "call"), REFUSED, ids=[reason for reason, _ in REFUSED])
def test_flash_says_why_it_cannot_serve(reason: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda params: False)
    monkeypatch.setattr(attention, "SDPAParams", lambda *parts: parts)
    with pytest.raises(UsageError, match=reason) as refused:
        attend(*call(), "flash")
    assert "--attention sdpa" in str(refused.value.hint)


def test_on_a_card_later_parts_go_to_flash_without_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chosen implementation; heads of an odd width keep the mask."""
    given = []
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda params: True)
    monkeypatch.setattr(attention, "SDPAParams", lambda *parts: parts)
    monkeypatch.setattr(attention, "_flash_end", lambda query, *rest: given.append(query.shape) or query)
    query, key, value = on_card(*(x.bfloat16() for x in projected(3, 8)))
    attend(query, key, value, later_part(5, 3), "sdpa")
    attend(query, key, value, later_part(5, 3), "flash")
    assert given == [(1, HEADS, 3, WIDTH)] * 2
    with_mask, _ = attend(query[..., :12], key[..., :12], value[..., :12], later_part(5, 3), "sdpa")
    assert len(given) == 2
    assert with_mask.shape == (1, 3, HEADS * 12)
