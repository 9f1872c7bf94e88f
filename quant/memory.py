"""How much memory quantizing takes, predicted from a plan."""

from collections.abc import Sequence
from dataclasses import dataclass

from lmx.core.errors import ResourceError
from lmx.core.memory import peak_memory_bytes as peak_memory_bytes
from lmx.core.memory import reset_peak_memory as reset_peak_memory
from lmx.core.memory import resident_memory_bytes
from lmx.quant.plan import Plan, PlannedWeight, layout_bytes

# Kept weights pass through in pieces of this size.
PIECE_BYTES = 32 << 20
# A kept piece in work: its pages, what the check for NaN makes of them, and what is being written.
_KEPT_BYTES = 4 * PIECE_BYTES
# What the allocator keeps of earlier matrices for later ones, as benchmarks/quantize_published.py shows it.
_ALLOCATOR_BYTES = 60 << 20
# What a worker needs beside its matrix: float32 blocks, codes and their copies, a quarter million elements each.
_SCRATCH_BYTES = 12 << 20


def predict_peak(plan: Plan, workers: int) -> int:
    """The peak of a run that starts now: what this process has, and what the largest matrices in flight will add."""
    return max(peak_memory_bytes(), resident_memory_bytes() + working_bytes(plan, workers))


def working_bytes(plan: Plan, workers: int) -> int:
    """What the job itself holds at most: sources in work with their scratch, and results on their way out.

    Weights are taken in their order, so that only neighbours are in flight together: one being written and some ahead
    of it, of which each worker has one in work.
    """
    costs = [_Cost.of(weight, plan) for weight in plan.weights]
    span = results_in_flight(workers)
    windows = (costs[first : first + span] for first in range(max(1, len(costs) - span + 1)))
    return _ALLOCATOR_BYTES + max(_window_bytes(window, workers) for window in windows)


@dataclass(frozen=True, slots=True)
class _Cost:
    """Bytes of one weight: its source while it is in work, its result until it is written."""

    source: int
    result: int

    @classmethod
    def of(cls, weight: PlannedWeight, plan: Plan) -> "_Cost":
        if weight.kept:
            return cls(0, min(weight.source_bytes, _KEPT_BYTES))
        return cls(_source_pages(weight) + _SCRATCH_BYTES, layout_bytes(weight.layout(plan.spec)))


def _window_bytes(costs: Sequence[_Cost], workers: int) -> int:
    in_work = sorted((cost.source for cost in costs[1:]), reverse=True)[:workers]
    return sum(in_work) + sum(cost.result for cost in costs)


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
