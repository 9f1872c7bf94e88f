"""Weight names as a table: how a checkpoint on the hub calls a tensor, and how our modules do.

`{}` stands for a number: a layer, an expert. Every tensor of the file must be in the table and every weight of the
model must be found exactly once; what does not fit is an error that names the tensor. Imports no torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lmx.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

_NUMBER = re.compile(r"(?:0|[1-9][0-9]{0,5})")


def split_numbers(name: str) -> tuple[str, tuple[int, ...]]:
    """`layers.3.experts.7.w` -> (`layers.{}.experts.{}.w`, (3, 7))."""
    # A checkpoint may have ten thousand names: splitting them is several times faster than a search for ".7.".
    first, *rest = name.split(".")
    numbers = [part for part in rest if _NUMBER.fullmatch(part)]
    if not numbers:
        return name, ()
    template = ("{}" if _NUMBER.fullmatch(part) else part for part in rest)
    return ".".join((first, *template)), tuple(map(int, numbers))


@dataclass(frozen=True)
class Rename:
    """One tensor of the file is one weight of the model."""

    hub: str
    ours: str

    def pieces(self, indices: tuple[int, ...], shape: Shape) -> Iterator[tuple[str, "Piece"]]:
        """The weight that the tensor with these indices is."""
        hub = self.hub.format(*indices)
        yield self.ours.format(*indices), Piece(hub, shape)

    def stored(self, shapes: Mapping[tuple[int, ...], Shape]) -> Iterator[tuple[str, Shape]]:
        """Names and shapes in a file, from the weights' indices and shapes."""
        for indices, shape in shapes.items():
            yield self.hub.format(*indices), shape


@dataclass(frozen=True)
class ExpertStack:
    """One tensor of the file holds all experts of a layer, each the named matrices one after another.

    Its shape is [experts, parts * rows, columns], or, `flat`, [experts * rows, columns]. `transposed`: a matrix is
    stored as [in, out] and the model's weight is the transposed view of it.
    """

    hub: str
    ours: tuple[str, ...]
    flat_experts: int | None = None
    transposed: bool = False

    def pieces(self, indices: tuple[int, ...], shape: Shape) -> Iterator[tuple[str, "Piece"]]:
        """The weights inside the tensor with these indices."""
        hub = self.hub.format(*indices)
        if len(shape) != (2 if self.flat_experts else 3):
            raise InputError(f"{hub}: shape {list(shape)} does not hold experts", _MISMATCH)
        experts, parts = self.flat_experts or shape[0], len(self.ours)
        total = shape[0] if self.flat_experts else shape[0] * shape[1]
        if not experts or total % (experts * parts):
            raise InputError(f"{hub}: shape {list(shape)} does not hold {experts} experts", _MISMATCH)
        rows = total // (experts * parts)
        final = (shape[-1], rows) if self.transposed else (rows, shape[-1])
        for expert in range(experts):
            for part, ours in enumerate(self.ours):
                cut = slice((expert * parts + part) * rows, (expert * parts + part + 1) * rows)
                yield ours.format(*indices, expert), Piece(hub, final, cut, self.transposed)

    def stored(self, shapes: Mapping[tuple[int, ...], Shape]) -> Iterator[tuple[str, Shape]]:
        """Names and shapes in a file, from the first part's indices (the expert last) and shapes."""
        groups: dict[tuple[int, ...], list[Shape]] = {}
        for indices, shape in shapes.items():
            groups.setdefault(indices[:-1], []).append(shape)
        for indices, members in groups.items():
            rows, columns = reversed(members[0]) if self.transposed else members[0]
            rows *= len(self.ours)
            shape = (len(members) * rows, columns) if self.flat_experts else (len(members), rows, columns)
            yield self.hub.format(*indices), shape


@dataclass(frozen=True)
class Piece:
    """Where a weight lies: a whole tensor of the file, or `rows` of it (its leading dimensions taken as one)."""

    hub: str
    shape: Shape
    rows: slice | None = None
    transposed: bool = False

    def renamed(self, hub: str) -> "Piece":
        """The same cut of a tensor by another name."""
        return replace(self, hub=hub)

    def of(self, tensor: "Tensor") -> "Tensor":
        """The weight as a view of the file's tensor."""
        if self.rows is None:
            return tensor
        view = tensor.reshape(-1, tensor.shape[-1])[self.rows]
        return view.t() if self.transposed else view


Rule = Rename | ExpertStack


class NameTable:
    """The rules of one family. Of several rules for the same weight the first is the canonical one.

    ignored: tensors that old files carry and no maths needs; base_prefix: what stands before the decoder's names, and
    is absent in a file saved without a head.
    """

    def __init__(self, *rules: Rule, ignored: Iterable[str] = (), base_prefix: str = "model.") -> None:
        self.rules = rules
        self.base_prefix = base_prefix
        self._by_hub = {rule.hub: rule for rule in rules}
        self._ignored = frozenset(ignored)

    def bind(self, stored: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, Piece]:
        """Find every wanted weight in a file.

        stored: names and shapes in the file; wanted: those of the model.
        Raises InputError for a tensor unknown, missing, given twice or of the wrong shape.
        """
        found: dict[str, Piece] = {}
        for hub, shape in stored.items():
            for ours, piece in self.pieces(hub, shape):
                if ours not in wanted:
                    raise InputError(f"{hub}: the model of config.json has no such weight", _MISMATCH)
                if ours in found:
                    raise InputError(f"{hub}: gives {ours} a second time, after {found[ours].hub}", _MISMATCH)
                if piece.shape != wanted[ours]:
                    raise InputError(
                        f"{hub}: shape {list(piece.shape)} where config.json asks for {list(wanted[ours])}", _MISMATCH
                    )
                found[ours] = piece
        missing = next((name for name in wanted if name not in found), None)
        if missing is not None:
            raise InputError(f"the checkpoint lacks {self.hub_name(missing)} (our {missing})", _MISMATCH)
        return found

    def pieces(self, hub: str, shape: Shape) -> Iterator[tuple[str, Piece]]:
        """Our weights that a tensor of the file holds, and where in it; none for one that no maths needs.

        Raises InputError for an unknown name and for a shape that cannot be.
        """
        skeleton, indices = split_numbers(hub)
        rule = self._by_hub.get(skeleton)
        if rule is None:
            if skeleton in self._ignored:
                return
            raise InputError(f"{hub}: unknown tensor", _MISMATCH)
        yield from rule.pieces(indices, shape)

    def hub_name(self, ours: str) -> str:
        """What the hub's checkpoints call the tensor that holds one of our weights."""
        skeleton, indices = split_numbers(ours)
        for rule in self.rules:
            if isinstance(rule, Rename) and rule.ours == skeleton:
                return rule.hub.format(*indices)
            if isinstance(rule, ExpertStack) and skeleton in rule.ours:
                return rule.hub.format(*indices[:-1])
        raise KeyError(ours)

    def matrix_name(self, ours: str) -> str:
        """The hub's name for a tensor that holds this one weight and no other; raises KeyError where it has none.

        Differs from `hub_name` where the canonical file stacks experts: quantized files hold each by itself.
        """
        skeleton, indices = split_numbers(ours)
        for rule in self.rules:
            if isinstance(rule, Rename) and rule.ours == skeleton:
                return rule.hub.format(*indices)
        raise KeyError(ours)

    def hub_shapes(self, wanted: Mapping[str, Shape]) -> dict[str, Shape]:
        """Names and shapes of the canonical file of a model with these weights."""
        first: dict[str, Rule] = {}
        for rule in self.rules:
            for ours in (rule.ours,) if isinstance(rule, Rename) else rule.ours:
                first.setdefault(ours, rule)
        grouped: dict[Rule, dict[tuple[int, ...], Shape]] = {}
        for name, shape in wanted.items():
            skeleton, indices = split_numbers(name)
            rule = first[skeleton]
            if isinstance(rule, Rename) or rule.ours[0] == skeleton:
                grouped.setdefault(rule, {})[indices] = shape
        return dict(item for rule, shapes in grouped.items() for item in rule.stored(shapes))


_MISMATCH = "Weights and config.json belong to different models, or the download is incomplete: download it again."
