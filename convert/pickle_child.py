"""The child process that meets pickles: reads tables of tensors, never a tensor, and says them in lines of JSON.

Run as a script, isolated, with one argument of JSON: `{"files": [descriptor...], "seconds": for each,
"roots": [folder...]}`. It writes `{"ready": true}`, then for each file in turn `{"tensor": ...}` lines and
`{"end": number of them}`, or `{"error": text}`. It imports the standard library and torch alone. Memory, time and
files that can be written are limited before the first pickle is opened.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

if TYPE_CHECKING:
    import torch

_HEADROOM = 1 << 30  # beyond what Python and torch take themselves; tables of tensors are far smaller
_NESTED = ("state_dict", "model_state_dict", "model", "module")
_ERROR_LENGTH = 4000


def main() -> None:
    """Read every file that the argument names."""
    task = json.loads(sys.argv[1])
    sys.path.extend(task["roots"])
    import torch

    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what a library prints must not get between our lines
        read = _loader()
        torch.set_num_threads(1)
        _limit_itself(len(task["files"]) * task["seconds"])
        _say(out, {"ready": True})
        for descriptor in task["files"]:
            signal.setitimer(signal.ITIMER_REAL, task["seconds"] + 1)  # for when the parent is gone
            _report(out, read, descriptor)


def _report(out: TextIO, read: "Loader", descriptor: int) -> None:
    try:
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)  # the position is the parent's too
            rows = [_row(name, tensor) for name, tensor in _tensors(read(file))]
    except MemoryError:
        _say(out, {"error": "it takes more memory to read than any table of tensors needs"})
        return
    except Exception as error:
        _say(out, {"error": f"{type(error).__name__}: {error}"[:_ERROR_LENGTH]})
        return
    for row in rows:
        _say(out, {"tensor": row})
    _say(out, {"end": len(rows)})


class Loader:
    """`torch.load` of the weights-only kind, with storages that know where they lie but have no memory."""

    def __init__(self, guard: "contextlib.AbstractContextManager[object]", location: str | None) -> None:
        self._guard, self._location = guard, location

    def __call__(self, file: BinaryIO) -> object:
        """The object in `file`; its tensors have no data."""
        import torch

        with self._guard:
            return torch.load(file, map_location=self._location, weights_only=True, mmap=False)


def _loader() -> Loader:
    """With newer torch, meta storages keep their offsets; before, only those of fake tensors (slower to import)."""
    import torch

    probe = io.BytesIO()
    torch.save(torch.zeros(1), probe)
    probe.seek(0)
    meta = Loader(contextlib.nullcontext(), "meta")
    tensor = meta(probe)
    if isinstance(tensor, torch.Tensor) and hasattr(tensor.untyped_storage(), "_checkpoint_offset"):
        return meta
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = Loader(FakeTensorMode(), None)
    probe.seek(0)
    fake(probe)  # imports the rest of it, before time counts
    return fake


def _limit_itself(seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    used = resource.getrusage(resource.RUSAGE_SELF)
    processor = int(used.ru_utime + used.ru_stime + seconds) + 2
    limits = [(resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, processor)]
    statm = Path("/proc/self/statm")
    if statm.exists():  # macOS has none, and refuses a limit of the address space
        pages = int(statm.read_text().split()[0])
        limits.append((resource.RLIMIT_AS, pages * resource.getpagesize() + _HEADROOM))
    for kind, limit in limits:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


def _tensors(value: object) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors of a state dict, or of one that stands in the file under a usual name."""
    import torch

    if not isinstance(value, Mapping):
        raise TypeError(f"it holds a {type(value).__name__}, not a dictionary of tensors")
    if not any(isinstance(item, torch.Tensor) for item in value.values()):
        value = next((value[name] for name in _NESTED if isinstance(value.get(name), Mapping)), value)
    for name, item in value.items():
        if not isinstance(name, str):
            raise TypeError(f"it names a tensor by a {type(name).__name__}, not by text")
        if not isinstance(item, torch.Tensor):
            raise TypeError(f"under {name[:200]!r} it holds a value of the type {type(item).__name__}, not a tensor")
        yield name, item


def _row(name: str, tensor: "torch.Tensor") -> list[object]:
    """Name, dtype, shape, strides, first element; of its storage: the offset in the file and the bytes."""
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise TypeError(f"{name[:200]!r} is no plain tensor (sparse, quantized or conjugated)")
    storage = tensor.untyped_storage()
    place: object = getattr(storage, "_checkpoint_offset", None)
    if place is None and storage.nbytes():
        raise TypeError(f"{name[:200]!r} has no bytes in the file")
    shape, strides = list(tensor.shape), list(tensor.stride())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return [name, dtype, shape, strides, tensor.storage_offset(), place or 0, storage.nbytes()]


def _say(out: TextIO, line: dict[str, object]) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
