"""What a linear layer shows of itself to kernels that multiply by its matrix on their own."""

from abc import abstractmethod

from torch import nn

from lmx.core.native.mixer import Affine


class Projection(nn.Module):
    """A linear layer `x @ weight.T + bias`, whatever its weight is made of."""

    @abstractmethod
    def affine(self) -> Affine | None:
        """Matrix and bias as the CPU's kernels read them; None where they cannot."""

    @property
    def capturable(self) -> bool:
        """Whether its product can be captured in a CUDA graph: the device never waits for the host in it."""
        return True


def affine(layer: nn.Module) -> Affine | None:
    """What a kernel must know of a linear layer; None where it cannot read it."""
    return layer.affine() if isinstance(layer, Projection) else None


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see a module or one inside it called: a kernel that fuses them would call none."""
    return any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules())
