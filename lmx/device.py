"""Where a model runs, and how much of the machine it may take. Importing this imports no torch."""

from typing import TYPE_CHECKING, Literal

from lmx.core.errors import UsageError
from lmx.core.files import quoted

if TYPE_CHECKING:
    import torch

    from lmx.core.placement import Budget

Device = Literal["auto", "cpu", "cuda", "mps"]

# Activations of a prompt's chunk, workspaces of the libraries, a matrix that is being quantized.
_FOR_ACTIVATIONS = 1 << 30


def choose_device(device: Device | None) -> "torch.device":
    """The device by name; None and "auto" take CUDA, else MPS, else the CPU. Raises UsageError for an absent one."""
    import torch

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None or device == "auto":
        return torch.device(next(name for name, is_here in here.items() if is_here))
    if device not in here:
        raise UsageError(f"device {quoted(str(device))} is unknown", "give auto, cpu, cuda or mps")
    if not here[device]:
        raise UsageError(f"this machine, or this build of torch, has no {device} device", "use --device auto or cpu")
    return torch.device(device)


def limit_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; None leaves its own choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def choose_budgets(device: Device | None, gpu_memory: int | None = None) -> "tuple[Budget, ...]":
    """How much of each card weights and states may take; nothing where a model runs on no card.

    gpu_memory: the most that lmx takes of a card; None for what is free. An eighth of either, a gigabyte at most, stays
    for what is computed. Raises UsageError where `gpu_memory` is given and there is no CUDA device to run on.
    """
    if choose_device(device).type == "cuda":
        return tuple(card_budget(card, free if gpu_memory is None else min(free, gpu_memory)) for card, free in _free())
    if gpu_memory is not None:
        raise UsageError("--gpu-memory is for CUDA, and this runs elsewhere", "leave it out, or use --device cuda")
    return ()


def planned_budgets(gpu_memory: int | None = None) -> "tuple[Budget, ...]":
    """Those of the cards that are here; for a given `gpu_memory`, of one card of that size where there is none."""
    import torch

    if torch.cuda.is_available():
        return choose_budgets("cuda", gpu_memory)
    return () if gpu_memory is None else (card_budget(0, gpu_memory),)


def card_budget(number: int, nbytes: int) -> "Budget":
    """What weights and states may take of so many bytes of a card."""
    import torch

    from lmx.core.placement import Budget

    return Budget(torch.device("cuda", number), nbytes - min(nbytes // 8, _FOR_ACTIVATIONS))


def _free() -> list[tuple[int, int]]:
    """The free bytes of each card that this process sees."""
    import torch

    return [(card, torch.cuda.mem_get_info(card)[0]) for card in range(torch.cuda.device_count())]


def reset_gpu_memory() -> None:
    """Let `peak_gpu_memory` count from now on, and give back what is cached."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        for card in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(card)


def peak_gpu_memory() -> int:
    """The most that torch has taken of all cards together so far; the few hundred MB of CUDA itself are not in it."""
    import torch

    return sum(torch.cuda.max_memory_reserved(card) for card in range(torch.cuda.device_count()))
