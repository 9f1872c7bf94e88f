"""Whether Triton's kernels can run, and why not. Importing this imports no Triton: asking for a CUDA device does.

A module with kernels imports triton at its top, so it is imported inside functions, after `can_launch` said yes.
"""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from subprocess import CalledProcessError

import torch
from torch import Tensor

_INSTALL = "install lmx with its extra `gpu`"
# bf16 products on tensor cores, and asynchronous copies, begin with it.
_CAPABILITY = (8, 0)


@cache
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors: TRITON_INTERPRET=1, set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_launch(x: Tensor) -> bool:
    """Whether Triton's kernels take a tensor that lies where this one does; else torch serves."""
    if x.is_cuda:
        return why_not(x.device) is None
    return x.is_cpu and interpreted() and _installed()


@cache
def why_not(device: torch.device) -> str | None:
    """What keeps Triton's kernels from a CUDA device, in words; None where they run.

    The first question for a device compiles and launches a kernel of one line: Triton needs more than its own package,
    a C compiler with Python's headers among it. So ask before a CUDA graph is captured.
    """
    if not _installed():
        return f"Triton is not installed: {_INSTALL}"
    if interpreted():
        return "TRITON_INTERPRET=1 keeps Triton on the CPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _CAPABILITY:
        return f"the card's compute capability is {capability[0]}.{capability[1]}, and Triton's kernels begin at 8.0"
    try:
        import_module("lmx.core.gpu.trial").launch(device)
    except (RuntimeError, OSError, ImportError, AssertionError, CalledProcessError) as error:
        return f"Triton cannot launch a kernel here: {str(error).strip().partition(chr(10))[0]}"
    return None


def cuda_path() -> str | None:
    """Which code runs banks of experts and scans on the CUDA device, in words; None where there is no device."""
    if not torch.cuda.is_available():
        return None
    obstacle = why_not(torch.device("cuda", torch.cuda.current_device()))
    return "triton" if obstacle is None else f"torch ({obstacle})"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
