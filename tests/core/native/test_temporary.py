"""Memory that is handed out again: never while anybody looks at it, always where nobody does any more."""

import gc
import threading

import pytest
import torch
from support import needs_kernels

from lmx.core.native import temporary as module
from lmx.core.native.add import add
from lmx.core.native.tape import recording
from lmx.core.native.temporary import KEPT_BYTES, LEAST_BYTES, temporary

LARGE = LEAST_BYTES // 4
"""Elements of float32."""


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> module._Blocks:
    fresh = module._Blocks()
    monkeypatch.setattr(module, "_blocks", fresh)
    return fresh


@pytest.mark.parametrize("shape", [(), (0, 5), (3, 7), (LARGE,), (2, 1025, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_it_is_a_tensor_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = temporary(shape, dtype)
    assert x.shape == shape
    assert x.dtype == dtype
    assert x.is_contiguous()
    assert torch.equal(x.fill_(3) + 1, torch.full(shape, 4, dtype=dtype))


def test_what_was_handed_back_is_handed_out_again() -> None:
    x = temporary((LARGE,), torch.float32)
    place = x.data_ptr()
    del x
    again = temporary((LARGE // 2, 2), torch.float32)
    assert again.data_ptr() == place
    assert temporary((LARGE,), torch.float32).data_ptr() != place


def test_a_view_keeps_it() -> None:
    x = temporary((4, LARGE), torch.float32)
    x[2].fill_(7)
    row = x[2, :5]
    del x
    others = [temporary((4, LARGE), torch.float32).fill_(1) for _ in range(3)]
    assert row.tolist() == [7] * 5
    del others


def test_layers_of_a_prompt_take_no_more_than_one() -> None:
    places, stream = set(), torch.zeros(512, 4096)
    for _ in range(64):
        wide = temporary((512, 16384), torch.bfloat16)
        inner = [temporary((512, 8192), torch.bfloat16) for _ in range(3)]
        places.update(x.data_ptr() for x in (wide, *inner))
        del wide, inner
        stream = temporary((512, 4096), torch.float32)
        places.add(stream.data_ptr())
    assert len(places) <= 6


def test_no_more_is_kept_than_was_promised(blocks: module._Blocks) -> None:
    many = [temporary((16 << 20,), torch.uint8) for _ in range(12)]
    del many
    assert 0 < sum(map(len, blocks._free)) <= KEPT_BYTES
    del_me = temporary((2 * KEPT_BYTES,), torch.uint8)
    del del_me
    assert all(len(block) < KEPT_BYTES for block in blocks._free)


def test_a_small_one_does_not_take_a_large_block() -> None:
    large = temporary((32 * LARGE,), torch.float32)
    place = large.data_ptr()
    del large
    assert temporary((LARGE,), torch.float32).data_ptr() != place


def test_threads_do_not_share() -> None:
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            x = temporary((LARGE,), torch.float32).fill_(number)
            y = temporary((LARGE,), torch.float32).fill_(-number)
            if not (bool((x == number).all()) and bool((y == -number).all())):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong


@needs_kernels
def test_a_tape_keeps_it() -> None:
    x = torch.randn(300, 1024)
    with recording() as tape:
        out = add(add(x, x, x.dtype), x, x.dtype)
    assert tape.foreign is None
    others = [temporary((300, 1024), torch.float32).fill_(torch.nan) for _ in range(3)]
    tape.replay()
    assert torch.equal(out, x + x + x)
    del others
