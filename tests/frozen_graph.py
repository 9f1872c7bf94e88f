"""A CPU's stand-in for a CUDA graph: what Python did while it was captured is all that a replay ever does.

At capture every torch operation is noted with the very tensors and numbers that it was given; a replay runs those
operations again on those tensors. So a number that Python worked out at capture is baked in, as in a CUDA graph, and
whatever would need the host (a value read, a size that depends on values) is refused.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def check_device_alone(func: torch._ops.OpOverload) -> None:
    """Refuse what reads values on the host, has sizes that depend on them, or draws random numbers."""
    # Attention is among those that draw numbers for its dropout, of which there is none in a step.
    draws = torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in func.name()
    if draws or any(tag in func.tags for tag in _HOST) or func is torch.ops.aten.lift_fresh.default:
        raise RuntimeError(f"{func} cannot be captured")


class FrozenGraph:
    """Captures and replays on the CPU."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._calls: list[tuple[torch._ops.OpOverload, tuple, dict, object]] = []

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def capture(self, work: Callable[[], None]) -> None:
        """Note the work; all memory that it wrote to is afterwards as before, and what it made is garbage."""
        recorder = _Recorder(self._calls)
        try:
            with _Reads(), recorder:
                work()
        finally:
            recorder.put_back()

    def replay(self) -> None:
        for func, args, kwargs, made in self._calls:
            result = func(*args, **kwargs)
            for info, old, new in zip(func._schema.returns, _tensors(made), _tensors(result), strict=False):
                if info.alias_info is None:
                    assert old.shape == new.shape, f"{func} changed its shape"
                    old.copy_(new)


class _Reads(TorchFunctionMode):
    """Refuses what reads a tensor's memory without an operation that a dispatch mode would see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            raise RuntimeError(f"{func.__name__} cannot be captured")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list) -> None:
        super().__init__()
        self._calls = calls
        self._made: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        check_device_alone(func)
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._keep_what_is_written(argument, value)
        for argument in func._schema.arguments[len(args) :]:
            self._keep_what_is_written(argument, kwargs.get(argument.name))
        made = func(*args, **kwargs)
        known = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._made[storage._cdata] = storage
        self._calls.append((func, args, kwargs, made))
        return made

    def _keep_what_is_written(self, argument: torch.Argument, value: object) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made and storage._cdata not in self._before:
                self._before[storage._cdata] = storage, storage.clone()

    def put_back(self) -> None:
        for storage, copy in self._before.values():
            storage.copy_(copy)
        for storage in self._made.values():
            storage.fill_(0xFF)  # NaN, or -1: a capture computes nothing


def _tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
