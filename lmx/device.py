"""Where a model runs, and how much of the machine it may take. Importing this imports no torch."""

from typing import TYPE_CHECKING, Literal

from lmx.core.errors import UsageError
from lmx.core.files import quoted

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda", "mps"]


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


def limit_gpu_memory(nbytes: int | None, device: Device | None) -> None:
    """Let this process take no more than so much of a GPU's memory. Raises UsageError where there is no CUDA device."""
    if nbytes is None:
        return
    import torch

    if choose_device(device).type != "cuda":
        raise UsageError("--gpu-memory is for CUDA, and this runs elsewhere", "leave it out, or use --device cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total))
