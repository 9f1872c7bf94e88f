"""What loading a model takes, said before it is done: a GGUF's blocks become numbers that lie in no file."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmx.api import choose_spec
from lmx.convert.gguf_source import GGUFCheckpoint
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import ResourceError
from lmx.core.files import quoted
from lmx.core.mapped import stored_name
from lmx.core.memory import available_memory_bytes
from lmx.device import Device, choose_device
from lmx.dtypes import choose_dtype

if TYPE_CHECKING:
    import torch

    from lmx.quant.spec import QuantSpec


def made_bytes(
    checkpoint: Checkpoint, dtype: "torch.dtype | str | None" = None, quantize: "str | QuantSpec | None" = None
) -> int:
    """The bytes of the weights of a GGUF that loading makes anew; what is mapped, and other checkpoints, count as none.

    Raises InputError where the GGUF does not fit its own metadata.
    """
    if not isinstance(checkpoint, GGUFCheckpoint):
        return 0
    wanted = choose_dtype(dtype, checkpoint)
    spec = choose_spec(quantize)
    if spec is None:
        return checkpoint.parameters * wanted.itemsize - checkpoint.mapped_bytes(stored_name(wanted))
    from lmx.quant.plan import layout_bytes, plan_source

    weights = plan_source(checkpoint, spec).weights
    return sum(w.parameters * wanted.itemsize if w.kept else layout_bytes(w.layout(spec)) for w in weights)


@dataclass(frozen=True, slots=True)
class Needed:
    """What loading will make in memory: so many bytes, and of which dtype or scheme."""

    nbytes: int
    kind: str


def check_memory(
    checkpoint: Checkpoint,
    dtype: "torch.dtype | str | None" = None,
    quantize: "str | QuantSpec | None" = None,
    device: Device | None = "cpu",
) -> Needed | None:
    """What loading will make, None where all is mapped. Raises ResourceError where it would not fit; InputError.

    To a card all goes one weight at a time, and a plan for the card's memory says what of it stays here.
    """
    if choose_device(device).type == "cuda":
        return None
    needed = made_bytes(checkpoint, dtype, quantize)
    if not needed:
        return None
    free = available_memory_bytes()
    if free is not None and needed > free:
        raise ResourceError(
            f"{quoted(checkpoint.label)} needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            "use --4bit, which quantizes again while loading; or convert it and run the result, which is mapped",
        )
    spec = choose_spec(quantize)
    return Needed(needed, str(choose_dtype(dtype, checkpoint)).removeprefix("torch.") if spec is None else spec.scheme)
