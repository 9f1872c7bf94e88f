"""The two ends of a step of generation on the CPU: tokens to embeddings, logits to the likeliest token."""

import ctypes

from torch import Tensor

from lmx.core.native.compiled import FLOAT, INT, LONG, POINTER, c_function, library
from lmx.core.native.norm import WORKING_DTYPES, serves
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.tape import call


# The structure of src/pick.cpp.
class _Embedding(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("weight", "ids", "out")),
        *(("rows", LONG), ("width", LONG), ("dtype", INT), ("scale", FLOAT)),
    )


_embed = c_function("lmx_embed", _Embedding)
_pick = c_function("lmx_pick", POINTER, INT, LONG, POINTER, result=LONG)


def can_embed(weight: Tensor) -> bool:
    """Whether `embed_rows` takes this matrix [tokens, width]."""
    return serves(weight) and weight.is_contiguous()


def embed_rows(weight: Tensor, ids: Tensor, scale: float | None) -> Tensor:
    """`weight[ids] * scale`: contiguous int64 ids [rows, columns], all in range -> [rows, columns, width]."""
    out = weight.new_empty(*ids.shape, weight.shape[1])
    places = weight.data_ptr(), ids.data_ptr(), out.data_ptr(), ids.numel(), weight.shape[1]
    call(_embed(), _Embedding(*places, DTYPE_CODES[weight.dtype], 1.0 if scale is None else scale))
    return out


def can_pick(logits: Tensor) -> bool:
    """Whether `pick` and `pick_with_sum` take these logits [vocab]."""
    return (
        logits.is_cpu
        and logits.dtype in WORKING_DTYPES
        and logits.is_contiguous()
        and logits.numel() > 0
        and library() is not None
    )


def pick(logits: Tensor) -> int:
    """The first of the largest, or of the NaN: `int(logits.argmax())`, many times faster in large vocabularies."""
    found: int = _pick()(logits.data_ptr(), DTYPE_CODES[logits.dtype], logits.shape[0], None)
    return found


def pick_with_sum(logits: Tensor) -> tuple[int, float, float]:
    """The same, its logit, and `logits.logsumexp(0)`; what is summed together does not depend on threads."""
    values = (ctypes.c_double * 2)()
    found: int = _pick()(logits.data_ptr(), DTYPE_CODES[logits.dtype], logits.shape[0], ctypes.addressof(values))
    return found, values[0], values[1]


def likeliest(logits: Tensor) -> int:
    """The first of the largest logits [vocab], on any device; waits for it."""
    # In bf16 torch takes twice as long on a CPU.
    return pick(logits) if can_pick(logits) else int(logits.float().argmax())
