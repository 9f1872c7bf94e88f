"""`lmx.convert`: from what a user calls a model to a plain checkpoint in the hub's layout, or a GGUF."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lmx.api import check_runnable, open_checkpoint, open_headers
from lmx.convert.events import Finished, Progress
from lmx.convert.gguf_source import GGUFCheckpoint
from lmx.convert.original_source import OriginalCheckpoint
from lmx.convert.pull_events import Watcher, unwatched
from lmx.core.checkpoint import Checkpoint, Source
from lmx.core.errors import UsageError
from lmx.core.files import quoted
from lmx.dtypes import dtype_by_name, main_dtype
from lmx.quantization import companion_files, model_stem

if TYPE_CHECKING:
    import torch

    from lmx.convert import gguf_target, plain

__all__ = ["Conversion", "Finished", "Format", "Progress", "convert", "convert_events", "predict_conversion"]

Format = Literal["hf", "gguf", "mistral"]
_DTYPES = ("bf16", "fp16", "fp32")
_MISTRAL_COMPANIONS = ("tokenizer.model", "chat_template", "README", "LICEN", "NOTICE", "USE_POLICY")
_GGUF_KINDS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "q8_0": "Q8_0", "q4_0": "Q4_0"}


def convert(
    model: str | Path,
    target: str | Path,
    *,
    to: Format | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    force: bool = False,
    revision: str | None = None,
    offline: bool = False,
    watch: Watcher = unwatched,
) -> Finished:
    """Write a model in another form, and say what was written; a quantized one is dequantized matrix by matrix.

    A run that was stopped goes on where it stopped when it is called again.

    model: as for `load`. to: "hf", a plain checkpoint under the hub's names, "gguf", one file for llama.cpp, or
    "mistral", a Mixtral in Mistral's own files; None goes by the target's name, and is "hf" where that says nothing.
    dtype: "bf16", "fp16" or "fp32", and for a GGUF also "q8_0" or "q4_0"; None keeps plain weights as they are and
    gives quantized ones the dtype that they had before, those of a GGUF bfloat16.

    Raises:
        UsageError: options that do not go together.
        InputError: the source is damaged or unsupported, or a value does not fit the dtype.
        ConflictError: the target exists and `force` is not set, or another process works on it.
        NotFoundError, NetworkError: there is no such model, or it could not be pulled.
        ResourceError: disk or memory would not suffice, or did not.

    """
    job = Conversion(Path(target), to, dtype, max_shard_bytes, force)
    *_, last = convert_events(model, job, revision=revision, offline=offline, watch=watch)
    if not isinstance(last, Finished):
        raise TypeError("the last event of a conversion says what was written")
    return last


def convert_events(
    model: str | Path,
    job: "Conversion",
    *,
    revision: str | None = None,
    offline: bool = False,
    watch: Watcher = unwatched,
) -> Iterator[Progress | Finished]:
    """Convert, and tell how it goes: Progress for each tensor, and at last Finished. Raises as `convert`."""
    checkpoint = open_checkpoint(model, revision=revision, offline=offline, watch=watch)
    for event in job.run(checkpoint, model_stem(model, checkpoint, revision)):
        yield _explained(event, checkpoint) if isinstance(event, Finished) else event


def predict_conversion(
    model: str | Path, job: "Conversion", *, revision: str | None = None, offline: bool = False
) -> Finished:
    """What `convert` would write, from headers alone: of a model on the hub that is not here, only those are fetched.

    Raises as `convert`.
    """
    checkpoint = open_headers(model, revision=revision, offline=offline)
    check_runnable(checkpoint)
    return _explained(job.predict(checkpoint, model_stem(model, checkpoint, revision)), checkpoint)


def _explained(finished: Finished, checkpoint: Checkpoint) -> Finished:
    return replace(finished, read_as=checkpoint.title) if isinstance(checkpoint, OriginalCheckpoint) else finished


@dataclass(frozen=True)
class Conversion:
    """What to write, and how. Raises UsageError for options that do not go together."""

    target: Path
    to: Format | None = None
    dtype: str | None = None
    max_shard_bytes: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _GGUF_KINDS:
            raise UsageError(f"dtype {quoted(self.dtype)} is unknown", f"give {', '.join(_GGUF_KINDS)}")
        if self.format != "gguf" and self.dtype is not None and self.dtype not in _DTYPES:
            raise UsageError(f"{self.dtype} is a type of GGUFs", "use --to gguf, or lmx quantize")

    @property
    def format(self) -> Format:
        """The format, by the target's name where it is not given."""
        return self.to or ("gguf" if self.target.suffix == ".gguf" else "hf")

    def run(self, checkpoint: Checkpoint, name: str) -> Iterator[Progress | Finished]:
        """Write it. name: what a GGUF says that the model is called."""
        if self.format == "gguf":
            from lmx.convert.gguf_target import write_gguf

            yield from write_gguf(self.source(checkpoint), self.target, self._gguf_options(checkpoint, name))
        elif self.format == "mistral":
            from lmx.convert.mistral_target import write_mistral

            yield from write_mistral(self.source(checkpoint), self.target, self._mistral_options(checkpoint))
        else:
            from lmx.convert.plain import write_plain

            yield from write_plain(self.source(checkpoint), self.target, self._plain_options(checkpoint))

    def predict(self, checkpoint: Checkpoint, name: str) -> Finished:
        """What `run` would write."""
        if self.format == "gguf":
            from lmx.convert.gguf_target import predict_gguf

            return predict_gguf(self.source(checkpoint), self.target, self._gguf_options(checkpoint, name))
        if self.format == "mistral":
            from lmx.convert.mistral_target import predict_mistral

            return predict_mistral(self.source(checkpoint), self.target, self._mistral_options(checkpoint))
        from lmx.convert.plain import predict_plain

        return predict_plain(self.source(checkpoint), self.target, self._plain_options(checkpoint))

    def source(self, checkpoint: Checkpoint) -> Source:
        """The checkpoint as plain weights."""
        if not checkpoint.is_quantized:
            return checkpoint
        from lmx.quant.stored import DequantizedSource

        return DequantizedSource(checkpoint, self._torch_dtype(checkpoint) if self.format != "gguf" else None)

    def _plain_options(self, checkpoint: Checkpoint) -> "plain.Options":
        from lmx.convert.plain import Options
        from lmx.core.shards import DEFAULT_SHARD_BYTES

        companions = tuple(companion_files(checkpoint.folder))
        shard_bytes = self.max_shard_bytes or DEFAULT_SHARD_BYTES
        return Options(self._torch_dtype(checkpoint), shard_bytes, self.force, companions)

    def _mistral_options(self, checkpoint: Checkpoint) -> "plain.Options":
        options = self._plain_options(checkpoint)
        kept = tuple(path for path in options.companions if path.name.startswith(_MISTRAL_COMPANIONS))
        return replace(options, companions=kept)

    def _gguf_options(self, checkpoint: Checkpoint, name: str) -> "gguf_target.Options":
        from lmx.convert.gguf_target import Options

        stored = main_dtype(self.source(checkpoint) if checkpoint.is_quantized else checkpoint)
        kind = stored if self.dtype is None else _GGUF_KINDS[self.dtype]
        return Options(kind, checkpoint.folder, name, self.force)

    def _torch_dtype(self, checkpoint: Checkpoint) -> "torch.dtype | None":
        """The dtype of all weights, or None for that of each. A GGUF mixes them; the hub's checkpoints have one."""
        kind = self.dtype
        if kind is None and isinstance(checkpoint, GGUFCheckpoint):
            kind = str(checkpoint.config["dtype"])
        return None if kind is None else dtype_by_name(kind)
