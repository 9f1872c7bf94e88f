"""Whether two checkpoints hold the same weights: every one of both, compared after all that the formats change.

A weight is equal bit for bit; or rounded, as its format must (each number of the target is the source's number in the
target's dtype, or within half a step of its block); or different.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmx.convert.events import Progress
from lmx.convert.gguf_layout import BlockLayout
from lmx.convert.gguf_source import GGUFCheckpoint
from lmx.convert.gguf_types import largest_error
from lmx.core.checkpoint import Source
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.loader import build_bound, stored_head
from lmx.core.mapped import Advice
from lmx.core.names import Piece

_TILE_ELEMENTS = 4 << 20
_WRITTEN_BLOCKS = ("Q8_0", "Q4_0")
_DECAY = ".A_log"
_DECAY_ERROR = 4 * torch.finfo(torch.float32).eps  # an exponential and its logarithm, each within an ulp


_HEAD, _EMBEDDING = "head.weight", "decoder.embed.weight"


@dataclass(frozen=True, slots=True)
class Comparison:
    """How many weights are equal, and rounded; which differ; the largest absolute error, and where it is."""

    weights: int
    equal: int
    rounded: int
    different: tuple[str, ...]
    largest_error: float
    worst: str

    @property
    def is_exact(self) -> bool:
        """Whether every weight is equal bit for bit."""
        return self.equal == self.weights


def compare_weights(source: Source, target: Source) -> Iterator[Progress | Comparison]:
    """Compare every weight of two plain checkpoints of one model; yields Progress, and at last a Comparison.

    Raises InputError where their configs, or the weights that they have, are of different models.
    """
    ours, theirs = bound_weights(source), bound_weights(target)
    ours, theirs = _with_head(ours, theirs), _with_head(theirs, ours)
    if ours.keys() != theirs.keys():
        name = min(ours.keys() ^ theirs.keys())
        lacks = target if name in ours else source
        raise InputError(f"{quoted(lacks.label)} has no weight {quoted(name)}", "the two are different models")
    total = sum(_size(piece) for piece in ours.values())
    tally, done = _Tally(), 0
    for name, piece in ours.items():
        tally.add(theirs[name].hub, *_compare(source, piece, target, theirs[name]))
        done += _size(piece)
        yield Progress(name, done, total)
    yield tally.result()


class _Tally:
    def __init__(self) -> None:
        self.verdicts = {"equal": 0, "rounded": 0}
        self.different: list[str] = []
        self.largest, self.worst = 0.0, ""

    def add(self, name: str, verdict: str, error: float) -> None:
        """Count a weight."""
        if verdict in self.verdicts:
            self.verdicts[verdict] += 1
        else:
            self.different.append(name)
        if not error <= self.largest:  # NaN, too
            self.largest, self.worst = error, name

    def result(self) -> Comparison:
        """All of it."""
        equal, rounded = self.verdicts["equal"], self.verdicts["rounded"]
        total = equal + rounded + len(self.different)
        return Comparison(total, equal, rounded, tuple(self.different), self.largest, self.worst)


def bound_weights(source: Source) -> Mapping[str, Piece]:
    """Where each weight of a plain checkpoint's model lies in it. Raises InputError for what does not fit."""
    stored = {name: info.shape for name, info in source.infos.items()}
    return build_bound(source.config, stored, stored_head(source.config, stored))[1]


def _with_head(pieces: Mapping[str, Piece], others: Mapping[str, Piece]) -> Mapping[str, Piece]:
    """A tied head is the embedding: where the other side has a matrix of its own, the two are compared."""
    if _HEAD in others and _HEAD not in pieces and _EMBEDDING in pieces:
        return {**pieces, _HEAD: pieces[_EMBEDDING]}
    return pieces


def _size(piece: Piece) -> int:
    return int(torch.Size(piece.shape).numel())


def _compare(source: Source, piece: Piece, target: Source, other: Piece) -> tuple[str, float]:
    """The verdict on a weight, and its largest error."""
    ours, theirs = piece.of(source.tensor(piece.hub)), other.of(target.tensor(other.hub))
    if ours.shape != theirs.shape:
        return "different", float("nan")
    layout, largest, verdicts = _layout(target, other), 0.0, {"equal"}
    rows = max(1, _TILE_ELEMENTS // max(1, ours[:1].numel()))  # what is made to compare stays small
    for first in range(0, len(ours), rows):
        verdict, error = _compare_rows(ours[first : first + rows], theirs[first : first + rows], layout, other)
        verdicts.add(verdict)
        largest = error if not error <= largest else largest  # NaN, too
    source.advise(piece.hub, Advice.DONT_NEED)
    target.advise(other.hub, Advice.DONT_NEED)
    return next(verdict for verdict in ("different", "rounded", "equal") if verdict in verdicts), largest


def _compare_rows(ours: Tensor, theirs: Tensor, layout: BlockLayout | None, piece: Piece) -> tuple[str, float]:
    wide, got = ours.float(), theirs.float()
    error = (wide - got).abs()
    largest = float(error.max()) if error.numel() else 0.0
    if torch.equal(wide, got):
        return "equal", largest
    is_rounded = torch.equal(ours.to(theirs.dtype), theirs) or _is_within_rounding(wide, error, layout, piece)
    return "rounded" if is_rounded else "different", largest


def _layout(target: Source, piece: Piece) -> BlockLayout | None:
    return target.layout_of(piece.hub) if isinstance(target, GGUFCheckpoint) else None


def _is_within_rounding(wide: Tensor, error: Tensor, layout: BlockLayout | None, piece: Piece) -> bool:
    if piece.hub.endswith(_DECAY):
        return bool((error <= _DECAY_ERROR * wide.abs().clamp(min=1)).all())
    if layout is None or layout.name not in _WRITTEN_BLOCKS:
        return False
    blocks = wide.reshape(-1, layout.elements)
    return bool((error.reshape(blocks.shape) <= largest_error(layout, blocks)).all())
