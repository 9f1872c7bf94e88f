"""What pages of 2 MB bring to whoever reads gigabytes: fresh memory and a file, read with and without them.

    python benchmarks/large_pages.py [--threads 2] [--megabytes 1024] [--file /somewhere/on/the/disk]

GB/s, medians of rounds in turn: torch's sum of numbers, and by lmx's kernels all their bits, eight pages of 4 KB side
by side, and one vector times an NF4 matrix. --file names a file to make, read and remove again; without it only memory
is read. The first column says how much of each really lies in large pages: 0% where the system has none to give.
"""

import argparse
import mmap
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lmx.core.large_pages import advise_large
from lmx.core.native.read import read
from lmx.core.native.vector import Kind, MatrixTable, StoredMatrix

COLUMNS = 4096
BLOCK = 64


def main() -> None:
    """Print the table."""
    options = _options()
    torch.set_num_threads(options.threads)
    nbytes = options.megabytes << 20
    ways = {
        "memory, small pages": _memory(nbytes, large=False),
        "memory, large pages": _memory(nbytes, large=True),
    }
    if options.file is not None:
        for name, large in (("file, small pages", False), ("file, large pages", True)):
            ways[name] = _file(options.file.with_suffix(f".{int(large)}"), nbytes, large=large)
    readers = {name: _readers(pages, nbytes) for name, pages in ways.items()}
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for name, several in readers.items():
            for i, reader in enumerate(several):
                seconds.setdefault((name, i), []).append(_time(reader))
    print(f"{'GB/s':22}{'large':>8}{'sum':>8}{'eight':>8}{'NF4':>8}")
    for name, pages in ways.items():
        speeds = [nbytes / statistics.median(seconds[name, i]) / 1e9 for i in range(3)]
        print(f"{name:22}{_large_share(pages, nbytes):8.0%}" + "".join(f"{speed:8.1f}" for speed in speeds))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--file", type=Path, help="a file to make and read; it is removed again")
    return parser.parse_args()


def _memory(nbytes: int, *, large: bool) -> mmap.mmap:
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(pages, large=large)
    torch.frombuffer(pages, dtype=torch.uint8).fill_(ord("Z"))
    return pages


def _file(path: Path, nbytes: int, *, large: bool) -> mmap.mmap:
    """A file that is no longer in the page cache when it is mapped, as lmx maps a checkpoint's."""
    numbers = b"Z" * (1 << 20)  # as in memory: finite ones, as scales and as codes
    try:
        with path.open("wb") as file:
            for _ in range(nbytes >> 20):
                file.write(numbers)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        path.unlink(missing_ok=True)
    _advise(pages, large=large)
    return pages


def _advise(pages: mmap.mmap, *, large: bool) -> None:
    if large:
        advise_large(pages)
    else:
        pages.madvise(mmap.MADV_NOHUGEPAGE)


def _readers(pages: mmap.mmap, nbytes: int) -> tuple[Callable[[], object], ...]:
    """The sum of all of it; all its bits; a product with its first eight ninths as codes and the rest as scales."""
    numbers = torch.frombuffer(pages, dtype=torch.int64)
    rows = nbytes // (COLUMNS // 2 + COLUMNS // BLOCK * 4)
    codes = torch.frombuffer(pages, dtype=torch.uint8, count=rows * COLUMNS // 2)
    scales = torch.frombuffer(pages, dtype=torch.float32, count=rows * COLUMNS // BLOCK, offset=codes.nbytes)
    matrix = StoredMatrix(Kind.FOUR_BIT, codes, rows, COLUMNS, absmax=scales, code=torch.linspace(-1, 1, 16))
    table, x = MatrixTable([matrix]), torch.ones(COLUMNS, dtype=torch.bfloat16)
    return numbers.sum, lambda: read(numbers), lambda: table.multiply(x)


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _large_share(pages: mmap.mmap, nbytes: int) -> float:
    """How much of a mapping is in large pages, by smaps (proc(5))."""
    address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    found = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if begins := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(begins[1], 16) <= address < int(begins[2], 16)
        elif inside and (kilobytes := re.match(r"(?:AnonHugePages|FilePmdMapped): +(\d+) kB", line)):
            found += int(kilobytes[1]) << 10
    return found / nbytes


if __name__ == "__main__":
    main()
