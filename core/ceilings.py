"""What a machine can do at most: bytes of memory read and matrix products, a second, on torch's threads or a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F

from lmx.core.errors import ResourceError
from lmx.core.large_pages import lasting_zeros
from lmx.core.native.compiled import library
from lmx.core.native.read import BLOCK_BYTES, read

READ_BYTES = 1 << 30
"""Much more than any cache holds."""

MATRIX_WIDTH = 4096
"""Of the square matrix that is multiplied, as wide as those of a model of 7 billion parameters."""

BESIDE_BYTES = 256 << 20
"""As much, read between the tokens of a test: what the memory gives changes by the second where others share it.

Of half as much, a tenth came out of a cache of 32 MB.
"""

GPU_READ_BYTES = 4 << 30
GPU_MATRIX_WIDTH = 8192
"""More of both for a GPU, where a launch would count otherwise; of a small one's free memory an eighth is read."""

_VECTORS = 512
_ROUNDS = 5
_ROUNDS_BESIDE = 2
_GPU_ROUNDS = 20


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes of memory read a second; flops: operations of a matrix product a second."""

    bandwidth: float
    flops: float


def measure_ceilings(
    device: torch.device, *, read_bytes: int | None = None, width: int | None = None, rounds: int | None = None
) -> Ceilings:
    """Measure both, the best of some rounds each. Raises ResourceError where there is no memory to do it in.

    Read: the sum, and the largest, of float32 numbers, and on the CPU, where the kernels are there, all their bits in
    eight pages side by side; nothing is written. Multiply: 512 vectors by a square matrix, in bfloat16 and in float32,
    which is the quicker one on a CPU without instructions for the other. On CUDA: two square matrices of normal numbers
    in bfloat16 (equal numbers would cost less power, and so run faster than a model can). None: as much as the device
    is worth.
    """
    try:
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            nbytes, side = read_bytes or min(GPU_READ_BYTES, free // 8), width or GPU_MATRIX_WIDTH
            count = rounds or _GPU_ROUNDS
            return Ceilings(_bandwidth(device, nbytes, count), _gpu_flops(device, side, count))
        count = rounds or _ROUNDS
        return Ceilings(
            _bandwidth(device, read_bytes or READ_BYTES, count), _flops(device, width or MATRIX_WIDTH, count)
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(
            "there is no memory to measure the machine's ceilings in", "close other programs"
        ) from error


def bandwidth_beside(device: torch.device) -> float:
    """Bytes of the CPU's memory read a second just now. Raises ResourceError where there is no memory to do it in."""
    try:
        return _bandwidth(device, BESIDE_BYTES, _ROUNDS_BESIDE)
    except MemoryError as error:
        raise ResourceError("there is no memory to measure the bandwidth in", "close other programs") from error


def _bandwidth(device: torch.device, nbytes: int, rounds: int) -> float:
    on_host = device.type == "cpu"
    count = nbytes // BLOCK_BYTES * BLOCK_BYTES // 4
    # In the large pages that weights lie in: less than they can have would be no ceiling.
    numbers = lasting_zeros((count,), torch.float32) if on_host else torch.empty(count, device=device)
    numbers.fill_(1)
    readers: list[Callable[[], object]] = [numbers.sum, numbers.amax]
    if on_host and library() is not None:
        readers.append(lambda: read(numbers))
    return numbers.nbytes / min(best_seconds(reader, device, rounds) for reader in readers)


def _flops(device: torch.device, width: int, rounds: int) -> float:
    return max(_product(device, width, dtype, rounds) for dtype in (torch.bfloat16, torch.float32))


def _gpu_flops(device: torch.device, width: int, rounds: int) -> float:
    x, weight = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * width**3 / best_seconds(lambda: F.linear(x, weight), device, rounds)


def _product(device: torch.device, width: int, dtype: torch.dtype, rounds: int) -> float:
    x, weight = (torch.ones(rows, width, dtype=dtype, device=device) for rows in (_VECTORS, width))
    return 2 * _VECTORS * width * width / best_seconds(lambda: F.linear(x, weight), device, rounds)


def best_seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The shortest of some runs, after one that does not count."""
    work()
    return min(_timed(work, device) for _ in range(rounds))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return timed_by_events(work, device)
    synchronize(device)
    start = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - start


def timed_by_events(work: Callable[[], object], device: torch.device) -> float:
    """The seconds that a CUDA device needs for some work, by its own clock: launching it from Python is not in them."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given; the CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
