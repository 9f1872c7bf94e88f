"""How much memory quantizing takes: measured, and predicted from a plan."""

import resource
import sys
from pathlib import Path

from lmx.core.errors import ResourceError
from lmx.quant.plan import Plan, PlannedWeight, layout_bytes

# Kept weights pass through in pieces of this size.
PIECE_BYTES = 32 << 20
# What a worker needs beside its matrix: float32 blocks, codes and their copies, a quarter million elements each.
_SCRATCH_BYTES = 12 << 20


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far, mapped pages included."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def predict_peak(plan: Plan, workers: int) -> int:
    """The peak of a run that starts now: what this process has, and what the largest matrices in flight will add."""
    return max(peak_memory_bytes(), _resident_bytes() + working_bytes(plan, workers))


def working_bytes(plan: Plan, workers: int) -> int:
    """What the job itself holds at most: a source matrix and scratch for each worker, and results on their way out."""
    quantized = [weight for weight in plan.weights if weight.kept is None]
    source = max((_source_pages(weight) for weight in quantized), default=0)
    result = max((layout_bytes(w.layout(plan.spec)) for w in quantized), default=0)
    kept = max((min(w.source_bytes, 3 * PIECE_BYTES) for w in plan.weights if w.kept), default=0)
    busy = min(workers, len(quantized))
    return busy * (source + _SCRATCH_BYTES) + min(results_in_flight(workers), len(quantized)) * result + kept


def results_in_flight(workers: int) -> int:
    """How many matrices are in work, done and waiting, or being written, at most."""
    return workers + 2


def choose_workers(plan: Plan, workers: int, max_memory_bytes: int | None) -> int:
    """As many of the workers as the memory is enough for. Raises ResourceError where it is not for one."""
    if max_memory_bytes is None:
        return workers
    for count in range(workers, 0, -1):
        if predict_peak(plan, count) <= max_memory_bytes:
            return count
    raise ResourceError(
        f"quantizing this model takes about {predict_peak(plan, 1) / 1e9:.1f} GB of memory, more than allowed",
        "raise --max-memory",
    )


def _source_pages(weight: PlannedWeight) -> int:
    """A matrix as the source has it, and once more where it must be turned around first."""
    return weight.source_bytes * (2 if weight.piece.transposed else 1)


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak_memory_bytes()
