"""What the makers of a model call its tensors, as tables: a row says which of the hub's tensors lie in one of theirs.

`{}` stands for a number: a layer, an expert. Imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.names import Shape, split_numbers

_MISMATCH = "it was made for another model, or by another version: lmx does not guess at a model"


class Change(Enum):
    """What stands in the file in place of the hub's numbers.

    TRANSPOSED: [in, out]. PAIRS: rows of each head reordered, so that the two channels that turn together are
    neighbours. CONVOLUTION: [width, channels] instead of [channels, 1, width]. FLAT: dimensions of one, that are left
    out.
    """

    NOTHING = "nothing"
    TRANSPOSED = "transposed"
    PAIRS = "pairs"
    CONVOLUTION = "convolution"
    FLAT = "flat"


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of the file, and the hub's tensors in it, one after another along its rows.

    hub: their names, none for a tensor that no maths needs. shares: how the rows divide among several, equally where
    it is empty. heads: of a rotary projection.
    """

    theirs: str
    hub: tuple[str, ...]
    change: Change = Change.NOTHING
    heads: int = 1
    shares: tuple[int, ...] = ()

    def parts(self, stored: str, indices: tuple[int, ...], shape: Shape) -> "Iterator[tuple[str, Part]]":
        """The hub's names, and where in the stored tensor each lies. Raises InputError for a shape that cannot be."""
        if len(self.hub) == 1:
            yield self.hub[0].format(*indices), Part(stored, self._final(shape, stored), None, self.change, self.heads)
            return
        first = 0
        for name, rows in zip(self.hub, self._rows(stored, shape), strict=True):
            final = self._final((rows, shape[-1]), stored)
            yield name.format(*indices), Part(stored, final, slice(first, first + rows), self.change, self.heads)
            first += rows

    def _rows(self, stored: str, shape: Shape) -> tuple[int, ...]:
        total = prod(shape[:-1])
        each = self.shares or (total // len(self.hub),) * len(self.hub)
        if len(shape) < 2 or not total or sum(each) != total or min(each) < 1:
            wanted = f"{len(self.hub)} matrices" if not self.shares else f"{' + '.join(map(str, each))} rows"
            raise InputError(f"{quoted(stored)}: shape {list(shape)} does not hold {wanted}", _MISMATCH)
        return each

    def _final(self, shape: Shape, stored: str) -> Shape:
        match self.change:
            case Change.TRANSPOSED if len(shape) == 2:
                return shape[1], shape[0]
            case Change.CONVOLUTION if len(shape) == 2:
                return shape[1], 1, shape[0]
            case Change.PAIRS if len(shape) == 2 and shape[0] % (2 * self.heads) == 0:
                return shape
            case Change.FLAT if prod(shape) == shape[-1]:
                return shape[-1:]
            case Change.NOTHING:
                return shape
        raise InputError(f"{quoted(stored)}: shape {list(shape)} cannot be {self.change.value}", _MISMATCH)


@dataclass(frozen=True, slots=True)
class Part:
    """Where a tensor of the hub lies: in which one of the file, in which rows of it, and what to undo."""

    stored: str
    shape: Shape
    rows: slice | None
    change: Change
    heads: int


class Table:
    """The rows of one layout, looked up by the file's names."""

    def __init__(self, *rows: Row) -> None:
        self.rows = rows
        self._by_name = {row.theirs: row for row in rows}

    def parts(self, stored: str, shape: Shape) -> Iterator[tuple[str, Part]]:
        """The hub's tensors in one of the file. Raises InputError for a name that is not in the table."""
        name, indices = split_numbers(stored)
        row = self._by_name.get(name)
        if row is None:
            raise InputError(f"{quoted(stored)}: unknown tensor", _MISMATCH)
        if row.hub:
            yield from row.parts(stored, indices, shape)
