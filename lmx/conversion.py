"""`lmx.convert`: from what a user calls a model to a plain checkpoint in the hub's layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.api import check_runnable, open_checkpoint, open_headers
from lmx.convert.events import Finished, Progress
from lmx.convert.pull_events import Watcher, unwatched
from lmx.core.checkpoint import Checkpoint, Source
from lmx.core.errors import UsageError
from lmx.core.files import quoted
from lmx.quantization import companion_files

if TYPE_CHECKING:
    import torch

    from lmx.convert.plain import Options

__all__ = ["Finished", "Progress", "convert", "predict_conversion"]


def convert(
    model: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    force: bool = False,
    revision: str | None = None,
    offline: bool = False,
    watch: Watcher = unwatched,
) -> Iterator[Progress | Finished]:
    """Write a model as a plain checkpoint under the hub's names; a quantized one is dequantized matrix by matrix.

    dtype: "bf16", "fp16" or "fp32"; None keeps plain weights as they are and gives quantized ones the dtype that they
    had before. Yields Progress and at last Finished. Raises as `lmx.load`, and ConflictError for a target that exists.
    """
    from lmx.convert.plain import write_plain

    kind = _torch_dtype(dtype)
    checkpoint = open_checkpoint(model, revision=revision, offline=offline, watch=watch)
    options = _options(checkpoint, kind, max_shard_bytes, force)
    yield from write_plain(_plain_source(checkpoint, kind), Path(target), options)


def predict_conversion(
    model: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    force: bool = False,
    revision: str | None = None,
    offline: bool = False,
) -> Finished:
    """What `convert` would write, from headers alone: of a model on the hub that is not here, only those are fetched.

    Raises as `convert`.
    """
    from lmx.convert.plain import predict_plain

    kind = _torch_dtype(dtype)
    checkpoint = open_headers(model, revision=revision, offline=offline)
    check_runnable(checkpoint)
    options = _options(checkpoint, kind, max_shard_bytes, force)
    return predict_plain(_plain_source(checkpoint, kind), Path(target), options)


def _options(
    checkpoint: Checkpoint, dtype: "torch.dtype | None", max_shard_bytes: int | None, force: bool
) -> "Options":
    from lmx.convert.plain import Options
    from lmx.core.shards import DEFAULT_SHARD_BYTES

    companions = tuple(companion_files(checkpoint.folder))
    return Options(dtype, max_shard_bytes or DEFAULT_SHARD_BYTES, force, companions)


def _plain_source(checkpoint: Checkpoint, dtype: "torch.dtype | None") -> Source:
    if not checkpoint.is_quantized:
        return checkpoint
    from lmx.quant.stored import DequantizedSource

    return DequantizedSource(checkpoint, dtype)


def _torch_dtype(name: str | None) -> "torch.dtype | None":
    if name is None:
        return None
    if name not in ("bf16", "fp16", "fp32"):
        raise UsageError(f"dtype {quoted(name)} is unknown", "give bf16, fp16 or fp32")
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
