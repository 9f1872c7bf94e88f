"""A decode step as the list of kernels that it calls: noted once, then called again without the Python between them.

A step of generation runs the same kernels on the same addresses as the step before: weights and states lie where they
lay, and what passes between the kernels may lie there again. Where nothing but kernels touches a number, calling them
again in order is the whole step.
"""

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmx.core.native.compiled import LONG, POINTER, Kernel, c_function

_aten = torch.ops.aten
# What touches no number: it makes tensors that kernels then fill, or looks at others from another side.
_HARMLESS = frozenset(
    (
        *(_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided),
        *(_aten.view, _aten._unsafe_view, _aten._reshape_alias, _aten.as_strided, _aten.alias, _aten.detach),
        *(_aten.select, _aten.slice, _aten.split, _aten.split_with_sizes, _aten.chunk, _aten.unbind),
        *(_aten.transpose, _aten.t, _aten.permute, _aten.expand, _aten.squeeze, _aten.unsqueeze),
    )
)

_Noted = tuple[Kernel, tuple[object, ...]]


# The structure of src/play.cpp.
class _Call(ctypes.Structure):
    _fields_ = (("kernel", POINTER), ("structure", POINTER))


_play = c_function("lmx_play", POINTER, LONG)


class Tape:
    """Kernels in the order of their calls, with all that their addresses point to."""

    def __init__(self) -> None:
        self.foreign: str | None = None
        """The first operation that was none of ours: what it computed would be missing."""
        self._calls: list[_Noted] = []
        self._played: list[_Noted] | None = None
        self._kept: list[object] = []

    def __len__(self) -> int:
        return len(self._calls)

    def note(self, kernel: Kernel, arguments: tuple[object, ...]) -> None:
        """Remember a call."""
        self._calls.append((kernel, arguments))
        self._played = None

    def append(self, tape: "Tape") -> None:
        """Let the calls of another tape follow."""
        self._calls += tape._calls
        self._kept.append(tape)
        self._played = None

    def keep(self, made: object) -> None:
        """Let something live as long as the tape."""
        self._kept.append(made)

    def replay(self) -> None:
        """Call all kernels again, on what now lies where their arguments lay.

        Those that take one structure in one call for all that follow each other: between two of them the interpreter
        would have to come back into caches that the weights have just passed.
        """
        if self._played is None:
            self._played = list(_joined(self._calls))
        for kernel, arguments in self._played:
            kernel(*arguments)


def _joined(calls: Sequence[_Noted]) -> Iterator[_Noted]:
    for by_structure, some in groupby(calls, _takes_one_structure):
        if not by_structure:
            yield from some
            continue
        entries = [_entry(kernel, structure) for kernel, (structure,) in some]
        yield _play(), ((_Call * len(entries))(*entries), len(entries))


def _entry(kernel: Any, structure: Any) -> _Call:
    return _Call(ctypes.cast(kernel, POINTER), ctypes.addressof(structure))


def _takes_one_structure(noted: _Noted) -> bool:
    return len(noted[1]) == 1 and isinstance(noted[1][0], ctypes.Structure)


class _Local(threading.local):
    tape: Tape | None = None


_local = _Local()


def call(kernel: Kernel, *arguments: object) -> int | None:
    """Call a kernel of the library, and note it on the tape that is being recorded, if any."""
    tape = _local.tape
    if tape is not None:
        tape.note(kernel, arguments)
    result: int | None = kernel(*arguments)
    return result


@contextmanager
def recording() -> Iterator[Tape]:
    """Note all kernels that this thread calls inside. The tape serves where `foreign` is still None afterwards."""
    tape = Tape()
    _local.tape = tape
    try:
        with _Watch(tape):
            yield tape
    finally:
        _local.tape = None


class _Watch(TorchDispatchMode):
    """Keeps every tensor that is made alive, and finds out which torch operations touch numbers."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: the wrapper that torch would put around this class imports its compiler, seconds at the first step."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if self._tape.foreign is None and func.overloadpacket not in _HARMLESS:
            self._tape.foreign = str(func)
        made: object = func(*args, **(kwargs or {}))
        self._tape.keep(made)
        return made
