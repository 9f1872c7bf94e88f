"""What a quantization did, or would do: bytes before and after, what was kept and why, how far off each matrix is.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.core.shards import Shard

if TYPE_CHECKING:
    from lmx.quant.plan import Plan, PlannedWeight


@dataclass(frozen=True, slots=True)
class Kept:
    """A weight that was not quantized; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    bytes: int
    reason: str

    @classmethod
    def of(cls, weight: "PlannedWeight") -> "Kept":
        """The entry for a weight whose plan gives a reason."""
        return cls(weight.name, weight.dtype, weight.source_bytes, str(weight.kept))


@dataclass(frozen=True)
class Report:
    """The truth about one quantization.

    source_bytes: of all weights; output_bytes: of the weight files, headers included; peak_memory_bytes: of the
    process, mapped pages included; error: for each quantized matrix the root mean square of what it is off by, in the
    weight's own units (empty before it is done).
    """

    source: str
    output: str
    scheme: str
    parameters: int
    quantized_parameters: int
    source_bytes: int
    output_bytes: int
    peak_memory_bytes: int
    kept: tuple[Kept, ...]
    error: Mapping[str, float] = field(default_factory=dict)

    @property
    def quantized_share(self) -> float:
        """The share of parameters that are quantized."""
        return self.quantized_parameters / self.parameters

    @property
    def bits_per_parameter(self) -> float:
        """Of the output, over all parameters."""
        return 8 * self.output_bytes / self.parameters

    def kept_by_reason(self) -> dict[str, tuple[int, int]]:
        """How many weights were kept for each reason, and their bytes; most bytes first."""
        totals: dict[str, tuple[int, int]] = {}
        for kept in self.kept:
            count, size = totals.get(kept.reason, (0, 0))
            totals[kept.reason] = (count + 1, size + kept.bytes)
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The matrices with the largest error."""
        return sorted(self.error.items(), key=lambda item: -item[1])[:count]

    def to_json(self) -> dict[str, object]:
        """The object that `lmx quantize --json` prints."""
        return {
            "source": self.source,
            "output": self.output,
            "scheme": self.scheme,
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "kept": [{"name": k.name, "dtype": k.dtype, "bytes": k.bytes, "reason": k.reason} for k in self.kept],
            "error": dict(self.error),
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """So many of all parameters are written, lately those of `name`; resumed: by an earlier run."""

    name: str
    parameters: int
    total: int
    resumed: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The output has its name."""

    report: Report


@dataclass(frozen=True, slots=True)
class Checked:
    """The output, complete but without its name, was compared with the source: KL(SOURCE || OUTPUT), nats a token."""

    kl_divergence: float


Event = Progress | Checked | Finished


def make_report(
    plan: "Plan",
    shards: Sequence[Shard],
    source: str,
    output: Path,
    peak_memory_bytes: int,
    error: Mapping[str, float] | None = None,
) -> Report:
    """The report of a plan that was carried out, or (without errors) that is about to be."""
    return Report(
        source=source,
        output=str(output),
        scheme=plan.spec.scheme,
        parameters=plan.parameters,
        quantized_parameters=plan.quantized_parameters,
        source_bytes=plan.source_bytes,
        output_bytes=sum(shard.size for shard in shards),
        peak_memory_bytes=peak_memory_bytes,
        kept=tuple(Kept.of(weight) for weight in plan.weights if weight.kept),
        error=error or {},
    )
