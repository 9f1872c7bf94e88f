"""Devices that are not there: tensors keep their numbers on the CPU, and say that they are elsewhere.

Inside `PretendDevices`, `x.to(CARD)` copies, `torch.zeros(…, device=CARD)` makes, and an operation on tensors of two
devices fails as it would on real ones, so that a model over several devices can be run, and held to the bits of one on
the CPU, on a machine without any of them. Kernels that ask where a tensor is see the pretended device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmx.core.layers import rope
from lmx.quant.codebook import rank_table

CARD, OTHER_CARD = (torch.device("xpu", number) for number in range(2))
CPU = torch.device("cpu")
_REAL = ("cpu", "meta")


class PretendDevices(TorchFunctionMode):
    """moves: (from, to) of each tensor that went to another device, with at least as many dimensions as a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[tuple[torch.device, torch.device]] = []
        self._places: dict[int, torch.device] = {}

    def __enter__(self):
        _forget()
        return super().__enter__()

    def __exit__(self, *exc):
        _forget()
        super().__exit__(*exc)

    def where(self, tensor: Tensor) -> torch.device:
        """The device that a tensor says it is on."""
        if tensor.is_meta:
            return tensor.device
        own: torch.device | None = tensor.__dict__.get("pretended")
        return own or self._places.get(tensor.untyped_storage().data_ptr(), CPU)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return self.where(args[0])
        if func == Tensor.is_cpu.__get__:
            return self.where(args[0]).type == "cpu"
        if func in (Tensor.to, Tensor.cpu):
            return self._move(*args, **kwargs) if func is Tensor.to else self._move(args[0], CPU)
        given = [tensor for tensor in _tensors((args, kwargs)) if tensor.dim() and not tensor.is_meta]
        met = {self.where(tensor) for tensor in given}
        if len(met) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {met}")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type not in _REAL:
            met = {torch.device(kwargs.pop("device"))}
        elif device is not None:
            met = set()
        return self._put(func(*args, **kwargs), *met)

    def _move(self, tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        device = next((each for each in (*args, kwargs.pop("device", None)) if isinstance(each, torch.device)), None)
        rest = [each for each in args if not isinstance(each, torch.device)]
        before = self.where(tensor)
        moved = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        if device is None or device == before:
            return self._put(moved, before)
        if device.type == "meta":
            return moved.to(device)
        if tensor.dim() > 1:
            self.moves.append((before, device))
        return self._put(moved.clone(), device)

    def _put(self, made: object, device: torch.device = CPU) -> object:
        for tensor in _tensors(made):
            if not tensor.is_meta:
                self._places[tensor.untyped_storage().data_ptr()] = device
                if not tensor.numel():
                    tensor.__dict__["pretended"] = device
        return made


def _forget() -> None:
    """Tables that are kept for each device: those of a pretended one mean nothing afterwards."""
    for kept in (rope._kept_frequencies, rank_table):
        kept.cache_clear()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
