"""The dtype that weights have once they are loaded, as a user names it or as most of a checkpoint is stored."""

from typing import TYPE_CHECKING

from lmx.convert.gguf_source import GGUFCheckpoint
from lmx.core.checkpoint import Checkpoint, Source
from lmx.core.errors import UsageError
from lmx.core.files import quoted

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}
RUNNABLE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def choose_dtype(dtype: "torch.dtype | str | None", checkpoint: Checkpoint) -> "torch.dtype":
    """The dtype of all weights once loaded. Raises UsageError for an unknown name.

    None is the one that they are stored in; of several, that of most bytes: a product of two dtypes is not defined.
    """
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        return dtype_by_name(dtype)
    if checkpoint.is_quantized:
        from lmx.quant.stored import common_dtype, find_matrices, plain_infos

        return common_dtype(plain_infos(checkpoint, find_matrices(checkpoint)))
    return dtype_by_name(RUNNABLE[main_dtype(checkpoint)])


def dtype_by_name(name: str) -> "torch.dtype":
    """The dtype for "bf16", "bfloat16" and so on. Raises UsageError for an unknown name."""
    import torch

    if name not in _DTYPES:
        raise UsageError(f"dtype {quoted(name)} is unknown", "give bf16, fp16 or fp32")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[_DTYPES[name]]


def main_dtype(checkpoint: Source) -> str:
    """The dtype of most bytes of a plain checkpoint, in safetensors' spelling; of a quantized GGUF, BF16."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return checkpoint.main_dtype
    stored = stored_bytes(checkpoint)
    return max(stored, key=lambda name: stored[name])


def stored_bytes(checkpoint: Source) -> dict[str, int]:
    """How many bytes of a checkpoint are of which dtype, in safetensors' spelling."""
    counted: dict[str, int] = {}
    for info in checkpoint.infos.values():
        counted[info.dtype] = counted.get(info.dtype, 0) + info.nbytes
    return counted
