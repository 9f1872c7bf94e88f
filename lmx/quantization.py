"""Quantizing by name: from what a user calls a model to a new checkpoint folder. Importing this imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.api import open_folder, open_headers
from lmx.convert.gguf_source import GGUFCheckpoint
from lmx.convert.hub import HubId, find_model
from lmx.convert.pull_events import Watcher, unwatched
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, UsageError
from lmx.core.shards import DEFAULT_SHARD_BYTES
from lmx.evaluation import check_quantized, read_text
from lmx.quant.report import Checked, Event, Finished, Progress, Report

if TYPE_CHECKING:
    from lmx.quant.quantize import Options
    from lmx.quant.spec import QuantSpec
    from lmx.quant.spec import Scheme as Scheme

__all__ = ["Checked", "Event", "Finished", "Progress", "Quantization", "Report", "companion_files", "quantize"]

# What stands beside the weights and belongs to the model, quantized or not. config.json and the index are made anew.
_COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken"),
    *("chat_template*", "generation_config.json", "README*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)


def quantize(
    model: str | Path,
    output: str | Path | None = None,
    *,
    scheme: "Scheme" = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    skip: Sequence[str] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_memory_bytes: int | None = None,
    check: Path | None = None,
    max_kl: float | None = None,
    force: bool = False,
) -> Report:
    """Quantize a model into a new checkpoint folder, and say what was done.

    model: as for `load`. output: without it, NAME-SCHEME in the working folder. scheme: "nf4", "fp4" or "int8" in the
    bitsandbytes serialization; "qint8", "qint4", "qint2" or "qfloat8" in optimum-quanto's. skip: module names or globs
    that stay as they are. check: a text on which the complete output is compared with the source, before it gets its
    name; past a KL divergence of `max_kl` nats a token it does not get it. A run that was stopped goes on where it was.

    Raises:
        UsageError: the scheme does not exist, or not with these settings.
        InputError: the source is damaged (NaN and infinity included), unsupported, or quantized already; or the check
            failed.
        ConflictError: the output exists and `force` is not set, or another process works on it.
        NotFoundError, NetworkError: there is no such model, or it could not be pulled.
        ResourceError: disk or memory would not suffice, or did not.

    """
    job = Quantization.open(
        model,
        output,
        scheme=scheme,
        block_size=block_size,
        double_quant=double_quant,
        skip=skip,
        max_shard_bytes=max_shard_bytes,
        max_memory_bytes=max_memory_bytes,
        check=check,
        max_kl=max_kl,
        force=force,
    )
    *_, last = job.run()
    if not isinstance(last, Finished):
        raise TypeError("the last event of a quantization is its report")
    return last.report


@dataclass(frozen=True)
class Quantization:
    """A quantization that can be predicted or run: the source found and its headers checked, the target named."""

    source: Checkpoint
    target: Path
    spec: "QuantSpec"
    options: "Options"

    @classmethod
    def open(
        cls,
        model: str | Path,
        output: str | Path | None = None,
        *,
        scheme: "Scheme" = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        skip: Sequence[str] = (),
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        max_memory_bytes: int | None = None,
        check: Path | None = None,
        max_kl: float | None = None,
        force: bool = False,
        revision: str | None = None,
        offline: bool = False,
        watch: Watcher = unwatched,
        headers_only: bool = False,
    ) -> "Quantization":
        """Find the model, or pull it. headers_only: fetch no weights, which is enough to `predict`.

        Raises as `quantize`.
        """
        from lmx.quant.quantize import Options

        spec = _spec(scheme, block_size, double_quant, tuple(skip))
        if max_kl is not None and check is None:
            raise UsageError("--max-kl needs a text to measure on", "add --check TEXTFILE")
        if check is not None:
            read_text(check)  # now, and not when all the work is done
        if headers_only:
            source = open_headers(model, revision=revision, offline=offline)
        else:
            source = open_folder(find_model(model, revision=revision, offline=offline, watch=watch))
        if isinstance(source, GGUFCheckpoint):
            source.read_blocks_as("BF16")  # what is kept, the new checkpoint holds in 16 bits, too
        folder = source.folder
        target = Path(output) if output is not None else Path(f"{model_stem(model, source, revision)}-{scheme}")
        options = Options(
            max_shard_bytes,
            max_memory_bytes,
            force=force,
            companions=tuple(companion_files(folder)),
            check=None if check is None else partial(check_quantized, base=source, text=check, max_kl=max_kl),
        )
        return cls(source, target, spec, options)

    def predict(self) -> Report:
        """What `run` would do, from headers alone; writes nothing. Raises InputError, ResourceError."""
        from lmx.quant.quantize import predict

        return predict(self.source, self.target, self.spec, self.options)

    def check_target(self) -> None:
        """Raise what `run` would for the name of its output: UsageError, ConflictError."""
        from lmx.core.job import check_job

        check_job(self.source, self.target, force=self.options.force)

    def run(self) -> Iterator[Event]:
        """Progress for each weight, and at last Finished with the report. Raises as `quantize`."""
        from lmx.quant.quantize import quantize

        return quantize(self.source, self.target, self.spec, self.options)


def companion_files(folder: Path) -> list[Path]:
    """The files beside the weights that a derived model needs too: tokenizer, template, licence and the like."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in _COMPANIONS)
    )


def _spec(scheme: "Scheme", block_size: int, double_quant: bool, skip: tuple[str, ...]) -> "QuantSpec":
    from lmx.quant.spec import QuantSpec

    try:
        return QuantSpec(scheme, block_size, double_quant, skip)
    except InputError as error:  # here it is the arguments that are wrong, not a file
        raise UsageError(error.message, error.hint) from error


def model_stem(model: str | Path, source: Checkpoint, revision: str | None = None) -> str:
    """What to call the output after: the hub's name for the model, or the folder's, or the GGUF's."""
    hub_id = HubId.parse(model, revision) if isinstance(model, str) and not Path(model).exists() else None
    if hub_id:
        return hub_id.repo.rpartition("/")[2]
    return source.files[0].stem if isinstance(source, GGUFCheckpoint) else source.home.resolve().name
