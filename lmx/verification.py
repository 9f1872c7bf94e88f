"""`lmx convert --verify`: both sides opened again, every weight, the vocabulary, and logits where both can run."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lmx.api import load_core, open_checkpoint, open_text
from lmx.conversion import Conversion
from lmx.convert.events import Progress
from lmx.convert.gguf_source import GGUFCheckpoint
from lmx.convert.verify import Comparison, bound_weights, compare_weights
from lmx.core.checkpoint import Checkpoint, Source
from lmx.core.evaluate import Evaluation, evaluate
from lmx.core.loader import DECODER_PREFIX, load_model
from lmx.core.mapped import Advice, stored_name
from lmx.core.memory import available_memory_bytes
from lmx.core.model import LanguageModel
from lmx.dtypes import choose_dtype
from lmx.memory import made_bytes

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: What is 12 times 34? Answer: 408.",
    "def main():\n    print('na\u00efve caf\u00e9')\n",
)
# Rounding to 16 bits, or to Q8_0, moves a trained model by far less; of 4 bits nothing can be promised.
MAX_KL = 0.05
MAX_EXACT_KL = 1e-6  # of equal weights, in float32
_RANDOM_IDS = 24
# Both models in float32 take no more than this; larger ones run as they are stored, a layer of each in memory.
_FLOAT32_BYTES = 1 << 30


@dataclass(frozen=True)
class Logits:
    """How far the target's predictions are from the source's: KL divergence in nats a token, share of same choices.

    dtype: what both were computed in, float32 for small models: in fewer bits the order of a sum shows, and that
    depends on how a file lays a matrix out.
    """

    tokens: int
    dtype: str
    kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True)
class Verification:
    """The report. failures: what is wrong, none if the target is the source's model.

    vocabulary: whether texts become the same ids, None where a side has none; logits: None with `skipped` saying why.
    """

    weights: Comparison
    vocabulary: bool | None
    logits: Logits | None
    skipped: str | None
    failures: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """For scripts."""
        weights = asdict(self.weights)
        logits = None if self.logits is None else asdict(self.logits)
        rest = {"vocabulary": self.vocabulary, "logits": logits, "skipped": self.skipped}
        return {"passed": not self.failures, **weights, **rest, "failures": list(self.failures)}


def verify_conversion(
    model: str, target: Path, *, dtype: str | None = None, revision: str | None = None, offline: bool = False
) -> Iterator[Progress | Verification]:
    """`verify` for a conversion that has just been made, both sides by name. dtype: what was asked for.

    Raises as `lmx.load`.
    """
    checkpoint = open_checkpoint(model, revision=revision, offline=offline)
    source = Conversion(target, dtype=dtype).source(checkpoint)
    yield from verify(checkpoint, source, open_checkpoint(target))


def verify(checkpoint: Checkpoint, source: Source, target: Checkpoint) -> Iterator[Progress | Verification]:
    """Compare a conversion with what it was made from; yields Progress, and at last a Verification.

    checkpoint: the source as it was opened; source: the same as plain weights. Raises InputError where one of the two
    cannot be read, or they are different models.
    """
    weights: Comparison | None = None
    for step in compare_weights(source, target):
        if isinstance(step, Comparison):
            weights = step
        else:
            yield step
    if weights is None:
        raise TypeError("the last event of a comparison is its result")
    vocabulary, sequences = _encode(checkpoint, target)
    small = sum(_converted(side, torch.float32) for side in (checkpoint, target)) <= _FLOAT32_BYTES
    dtype = torch.float32 if small else choose_dtype(None, target)
    skipped = _too_large(checkpoint, target, dtype)
    logits = None if skipped else _compare_logits(source, target, sequences, dtype)
    failures = tuple(_failures(weights, vocabulary, logits, target))
    yield Verification(weights, vocabulary, logits, skipped, failures)


def _encode(source: Checkpoint, target: Checkpoint) -> tuple[bool | None, list[list[int]]]:
    """Whether both vocabularies agree, and token ids to run; fixed ones where there is no vocabulary."""
    ids = [_ids(checkpoint) for checkpoint in (source, target)]
    agree = None if None in ids else ids[0] == ids[1]
    found = [sequence for sequence in ids[0] or () if len(sequence) > 1]
    return agree, found or [list(range(1, _RANDOM_IDS))]


def _ids(checkpoint: Checkpoint) -> list[list[int]] | None:
    if not (checkpoint.folder / "tokenizer.json").exists():
        return None
    with open_text(checkpoint) as text:
        return [text.encode(line) for line in TEXTS]


def _too_large(source: Checkpoint, target: Checkpoint, dtype: torch.dtype) -> str | None:
    free = available_memory_bytes()
    needed = sum(max(made_bytes(side, dtype), _converted(side, dtype)) for side in (source, target))
    if free is None or needed <= free:
        return None
    return f"both together need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"


def _converted(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """The bytes of weights that are not stored in the dtype."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return 0
    packed = 2 if checkpoint.is_quantized else 1  # a byte of two codes
    sizes = (info.parameters for info in checkpoint.infos.values() if info.dtype != stored_name(dtype))
    return sum(sizes) * dtype.itemsize * packed


def _compare_logits(
    source: Source, target: Checkpoint, sequences: Sequence[Sequence[int]], dtype: torch.dtype
) -> Logits:
    here = torch.device("cpu")
    base = load_model(source, dtype=dtype, device=here)
    model = load_core(target, None, "causal", None, dtype, here)
    _let_go_of_layers(base, source)
    _let_go_of_layers(model, target)
    *_, result = evaluate(model, sequences, base)
    if not isinstance(result, Evaluation) or result.kl_divergence is None or result.top1_agreement is None:
        raise TypeError("the last event of a comparison is its result")
    return Logits(result.tokens, str(dtype).removeprefix("torch."), result.kl_divergence, result.top1_agreement)


def _let_go_of_layers(model: LanguageModel, source: Source) -> None:
    """Drop the pages of a layer's weights when it has run: of a model that is read once, no more need be in memory."""
    pieces = bound_weights(source)
    for path, layer in model.decoder.layers.named_children():
        prefix = f"{DECODER_PREFIX}layers.{path}."
        names = {piece.hub for name, piece in pieces.items() if name.startswith(prefix)}

        def let_go(*_: object, names: frozenset[str] = frozenset(names)) -> None:
            for name in names:
                source.advise(name, Advice.DONT_NEED)

        layer.register_forward_hook(let_go)


def _failures(weights: Comparison, vocabulary: bool | None, logits: Logits | None, target: Checkpoint) -> Iterator[str]:
    if weights.different:
        more = f" and {len(weights.different) - 1} more" if len(weights.different) > 1 else ""
        yield f"weight {weights.different[0]}{more} differ by up to {weights.largest_error:g}"
    if vocabulary is False:
        yield "the vocabularies give different ids"
    if logits is None:
        return
    if weights.is_exact and logits.dtype == "float32" and not logits.kl_divergence <= MAX_EXACT_KL:
        yield f"equal weights give logits that are {logits.kl_divergence:g} nats apart"
    elif not logits.kl_divergence <= MAX_KL and not _has_four_bits(target):
        yield f"the logits are {logits.kl_divergence:.4f} nats a token apart, more than {MAX_KL}"


def _has_four_bits(target: Checkpoint) -> bool:
    return isinstance(target, GGUFCheckpoint) and "Q4_0" in target.layouts


def describe(report: Verification, target: str) -> str:
    """The report in a line."""
    w = report.weights
    parts = [f"{w.equal} of {w.weights} weights equal"]
    if w.rounded:
        parts.append(f"{w.rounded} rounded (by up to {w.largest_error:.3g})")
    if report.vocabulary is not None:
        parts.append("same ids" if report.vocabulary else "other ids")
    if report.logits is not None:
        kl, top1 = report.logits.kl_divergence, report.logits.top1_agreement
        parts.append(f"logits {kl:.2g} nats a token apart, {top1:.1%} of top tokens the same")
    else:
        parts.append(f"logits not compared: {report.skipped}")
    return f"{target}: verified: {', '.join(parts)}"
