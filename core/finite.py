"""NaN and infinity, which no weight may be."""

from torch import Tensor

from lmx.core.errors import InputError


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinity, which show in the extremes: one pass, and no mask as large as x."""
    if x.numel() == 0 or not x.is_floating_point():
        return True
    numbers = x.half() if x.itemsize == 1 else x  # torch finds no extremes of float8, and float16 holds all of them
    return all(extreme.isfinite().item() for extreme in numbers.aminmax())


def check_finite(x: Tensor, name: str) -> None:
    """Raise InputError where an element is NaN or infinity. name: what the error calls the weight."""
    if not is_finite(x):
        raise InputError(f"{name} holds NaN or infinity", "the source is damaged: verify or download it again")
