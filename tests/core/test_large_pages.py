"""Memory for what lasts: zeros, apart from each other, given back with the last tensor, in large pages if possible."""

import gc
import mmap
import os
import re
import weakref
from pathlib import Path

import pytest
import torch

from lmx.core import large_pages
from lmx.core.large_pages import fresh_memory, lasting, lasting_zeros
from lmx.core.mapped import FileMap

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_large_pages = pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this system gives no large pages"
)


def large_bytes(address: int) -> int:
    """How much of the mapping at an address lies in large pages (proc(5), smaps)."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if begins := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(begins[1], 16) <= address < int(begins[2], 16)
        elif inside and (kilobytes := re.match(r"AnonHugePages: +(\d+) kB", line)):
            found += int(kilobytes[1]) << 10
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_tensors_are_zeros_apart_from_each_other(dtype: torch.dtype) -> None:
    sizes = [(1,), (7, 9), (0, 4), (3, 5, 2), (1 << 20,), (20 << 20,)]
    tensors = [lasting_zeros(size, dtype) for size in sizes]
    assert [tuple(t.shape) for t in tensors] == sizes
    assert all(t.dtype == dtype and t.is_contiguous() and not t.any() for t in tensors)
    assert all(t.data_ptr() % 64 == 0 for t in tensors if t.numel())
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    assert all((t == number + 1).all() for number, t in enumerate(tensors))


def test_many_small_ones_share_a_region_and_the_next_begins_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(large_pages, "fresh_memory", lambda nbytes: (made.append(nbytes), fresh_memory(nbytes))[1])
    monkeypatch.setattr(large_pages, "_regions", large_pages._Regions())
    kept = [lasting_zeros((1 << 20,), torch.uint8) for _ in range(65)]
    assert made == [64 << 20] * 2
    kept.append(lasting_zeros((17 << 20,), torch.uint8))
    assert made == [64 << 20, 64 << 20, 17 << 20]
    assert len({t.data_ptr() for t in kept}) == len(kept)


def test_a_region_goes_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    regions: list[weakref.ref[mmap.mmap]] = []

    def watched(nbytes: int) -> mmap.mmap:
        memory = fresh_memory(nbytes)
        regions.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(large_pages, "fresh_memory", watched)
    monkeypatch.setattr(large_pages, "_regions", large_pages._Regions())
    first, second = (lasting_zeros((5,), torch.float32) for _ in range(2))
    del first
    gc.collect()
    assert regions[0]() is not None
    del second
    gc.collect()
    assert regions[0]() is None
    assert not lasting_zeros((5,), torch.float32).any()
    assert len(regions) == 2


def test_a_copy_is_the_same_and_other_devices_stay_as_they_are() -> None:
    x = torch.randn(33, 5)
    copy = lasting(x.T)
    assert torch.equal(copy, x.T)
    assert copy.is_contiguous()
    assert copy.data_ptr() != x.data_ptr()
    elsewhere = torch.empty(3, device="meta")
    assert lasting(elsewhere) is elsewhere


@needs_large_pages
def test_it_lies_in_large_pages() -> None:
    many = [lasting_zeros((1 << 20,), torch.uint8).fill_(1) for _ in range(64)]
    one = lasting_zeros((32 << 20,), torch.uint8).fill_(1)
    assert large_bytes(one.data_ptr()) >= 30 << 20
    assert max(large_bytes(tensor.data_ptr()) for tensor in many) >= 32 << 20


def test_files_are_mapped_with_the_same_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("lmx.core.mapped.advise_large", lambda memory: asked.append(len(memory)))
    (tmp_path / "file").write_bytes(bytes(5000))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        FileMap(fd, 5000, tmp_path / "file")
    finally:
        os.close(fd)
    assert asked == [5000]


def test_what_cannot_be_had_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="cannot be had"):
        lasting_zeros((1 << 60,), torch.uint8)
