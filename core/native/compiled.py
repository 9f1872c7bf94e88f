"""Find, check and load the compiled kernels, and say which path they take."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch  # loads the OpenMP library that the kernels then share

from lmx.core.errors import UsageError
from lmx.core.native.build import LIBRARY_NAME

Kernel = Callable[..., Any]
POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
"""The types of the kernels' arguments, and of the fields of their structures."""

_ABI = 10
_LEVELS = {"portable": 0, "avx2": 1, "avx512": 2, "neon": 3, "amx": 4}
_AUTO = -1
_TORCH = "torch"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they were not built, are of another version, or LMX_KERNELS=torch says so.

    Raises UsageError if LMX_KERNELS is a name that no path has.
    """
    asked = os.environ.get("LMX_KERNELS", "")
    if asked and asked != _TORCH and asked not in _LEVELS:
        raise UsageError(
            f"LMX_KERNELS is {asked!r:.40}", f"known are {', '.join((*_LEVELS, _TORCH))}; unset, the best one"
        )
    path = Path(__file__).parent / LIBRARY_NAME
    if asked == _TORCH or not path.is_file():
        return None
    try:
        found = ctypes.CDLL(str(path))
        if found.lmx_abi() != _ABI:
            return None
    except (OSError, AttributeError):  # built for another machine, or no library at all
        return None
    found.lmx_set_threads(torch.get_num_threads())
    found.lmx_set_level(_LEVELS.get(asked, _AUTO))
    return found


def c_function(name: str, *arguments: type, result: type | None = None) -> Callable[[], Kernel]:
    """What returns a function of the compiled kernels, found at its first call.

    arguments, result: its types; a structure is taken by its address. Raises, when called, RuntimeError where the
    kernels are absent: ask `library` first.
    """
    types = [ctypes.POINTER(kind) if issubclass(kind, ctypes.Structure) else kind for kind in arguments]

    @cache
    def find() -> Kernel:
        found = library()
        if found is None:
            raise RuntimeError("the kernels are not there: ask library() first")
        function = getattr(found, name)
        function.argtypes, function.restype = types, result
        return function

    return find


def kernel_path() -> str:
    """Which code multiplies on the CPU: "amx", "avx512", "avx2", "neon", "portable", or "torch" without the kernels."""
    found = library()
    if found is None:
        return _TORCH
    number = found.lmx_level()
    return next(name for name, level in _LEVELS.items() if level == number)


@contextmanager
def forced_path(name: str) -> Iterator[bool]:
    """Let the kernels take another path for a while; yields whether this CPU has it. For tests and measurements."""
    found = library()
    if found is None:
        yield False
        return
    before = found.lmx_level()
    try:
        yield found.lmx_set_level(_LEVELS[name]) == _LEVELS[name]
    finally:
        found.lmx_set_level(before)
