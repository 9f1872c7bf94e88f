import threading

import pytest
import torch

from lmx.quant.chunks import for_chunks
from lmx.quant.four_bit import dequantize_4bit, quantize_4bit
from lmx.quant.int8 import dequantize_int8, quantize_int8


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("total", "chunk"), [(0, 4), (1, 4), (8, 4), (11, 4), (3, 100)])
def test_every_element_is_worked_on_once(threads, total, chunk):
    seen = torch.zeros(total, dtype=torch.int64)

    def work(start, stop):
        assert 0 < stop - start <= chunk
        seen[start:stop] += 1

    for_chunks(total, chunk, work)
    assert seen.eq(1).all()


def test_the_threads_of_torch_stay_as_they_were(threads):
    for_chunks(100, 1, lambda start, stop: None)
    found = [torch.get_num_threads()]
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [threads, threads]


def test_pieces_run_on_as_many_threads_as_torch_has(threads):
    barrier, used = threading.Barrier(threads), set()

    def work(start, stop):
        used.add((threading.get_ident(), torch.get_num_threads()))
        barrier.wait(timeout=10)

    for_chunks(threads, 1, work)
    assert len(used) == threads
    assert {count for _, count in used} == {1}


@pytest.mark.usefixtures("threads")
def test_an_error_reaches_the_caller():
    def work(start, stop):
        if start == 5:
            raise ValueError("piece 5")

    with pytest.raises(ValueError, match="piece 5"):
        for_chunks(10, 1, work)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_bits_do_not_depend_on_threads_or_on_the_grad_mode(threads, mode):
    x = (torch.randn(1030, 1027, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    with mode():
        four, eight = quantize_4bit(x, "nf4"), quantize_int8(x.requires_grad_())
        values = dequantize_4bit(four), dequantize_int8(eight)
    torch.set_num_threads(1)
    expected = quantize_4bit(x, "nf4"), quantize_int8(x)
    assert torch.equal(four.packed, expected[0].packed)
    assert torch.equal(four.absmax, expected[0].absmax)
    assert torch.equal(eight.weight, expected[1].weight)
    assert torch.equal(values[0], dequantize_4bit(expected[0]))
    assert torch.equal(values[1], dequantize_int8(expected[1]))
    assert not eight.weight.requires_grad
