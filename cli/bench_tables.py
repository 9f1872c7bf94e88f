"""The forms of `lmx bench`'s results, row by row as they come, and what an earlier run wrote to compare with."""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal

from lmx.cli.console import write, write_json
from lmx.cli.facts import human_bytes, human_count
from lmx.core.errors import InputError
from lmx.core.files import quoted, read_bounded
from lmx.core.jsonfile import parse_json, parse_value
from lmx.core.text.safe import safe_line
from lmx.measurement import Result

_LIMIT_BYTES = 64 << 20
_HINT = "give a file that lmx bench -o json or -o jsonl wrote"

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Earlier:
    """Speeds of an earlier run: by model, test and depth, and the scheme too."""

    speeds: Mapping[tuple[Key, str], float]

    @classmethod
    def read(cls, path: Path) -> "Earlier":
        """A file of `-o json` or `-o jsonl`. Raises InputError, NotFoundError."""
        where = quoted(str(path))
        data = read_bounded(path, _LIMIT_BYTES).strip()
        if data.startswith(b"["):
            rows = parse_value(data, where)
        else:  # an object a line
            lines = enumerate(data.splitlines(), 1)
            rows = [parse_json(line, f"{where}, line {number}") for number, line in lines if line.strip()]
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{where} holds no results", _HINT)
        return cls(dict(_speed(row, where) for row in rows))

    def ratio(self, result: Result) -> float | None:
        """How many times as fast a result is as it was then; None where it was not measured.

        One of the same scheme counts; else the only one that there is of the model, test and depth.
        """
        key = (result.model, result.test, result.depth)
        found = {scheme: speed for (other, scheme), speed in self.speeds.items() if other == key}
        before = found.get(result.scheme) or (next(iter(found.values())) if len(found) == 1 else None)
        return result.tokens_per_second_mean / before if before else None


def _speed(row: object, where: str) -> tuple[tuple[Key, str], float]:
    if not isinstance(row, dict):
        raise InputError(f"{where} holds something other than results", _HINT)
    model, test, depth, scheme = (row.get(name) for name in ("model", "test", "depth", "scheme"))
    speed = row.get("tokens_per_second_mean")
    if not (isinstance(model, str) and isinstance(test, str) and isinstance(scheme, str) and isinstance(depth, int)):
        raise InputError(f"{where}: a result lacks its model, test, depth or scheme", _HINT)
    if not isinstance(speed, int | float) or isinstance(speed, bool) or not speed > 0:
        raise InputError(f"{where}: {test!r:.40} has no tokens_per_second_mean above 0", _HINT)
    return ((model, test, depth), scheme), float(speed)


class Printer(ABC):
    """Writes results to stdout, each as soon as its form allows."""

    def __init__(self, earlier: Earlier | None) -> None:
        self._earlier = earlier

    def fields(self, result: Result) -> dict[str, object]:
        """The object of the contract, and `ratio` where an earlier run was given."""
        fields = result.to_json()
        return fields if self._earlier is None else fields | {"ratio": self._earlier.ratio(result)}

    @abstractmethod
    def row(self, result: Result) -> None:
        """Take one result."""

    def finish(self) -> None:  # noqa: B027
        """Show what could not be shown before, if anything."""


class JsonLines(Printer):
    """One object a line, each as soon as it is known."""

    def row(self, result: Result) -> None:
        """Write the object."""
        write_json(self.fields(result))


class JsonList(Printer):
    """A list of objects, at the end."""

    def __init__(self, earlier: Earlier | None) -> None:
        super().__init__(earlier)
        self._rows: list[dict[str, object]] = []

    def row(self, result: Result) -> None:
        """Keep it for the end."""
        self._rows.append(self.fields(result))

    def finish(self) -> None:
        """Write the list. ASCII with escapes, like every JSON of lmx."""
        write(json.dumps(self._rows, indent=2) + "\n")


class Csv(Printer):
    """The fields in columns under their names; samples with spaces between them, nothing for null."""

    def __init__(self, earlier: Earlier | None) -> None:
        super().__init__(earlier)
        self._has_header = False

    def row(self, result: Result) -> None:
        """Write the names first, once."""
        fields = self.fields(result) | {"samples": " ".join(f"{sample:.6g}" for sample in result.samples)}
        text = StringIO()
        table = csv.DictWriter(text, fieldnames=list(fields), lineterminator="\n")
        if not self._has_header:
            table.writeheader()
        self._has_header = True
        table.writerow(fields)
        write(text.getvalue())


class Markdown(Printer):
    """A table for people, a row a test, and below it what does not differ between the tests of a model."""

    _WIDTHS = (32, 16, 9, 8, 18, 16, 14, 11)

    def __init__(self, earlier: Earlier | None) -> None:
        super().__init__(earlier)
        self._last: dict[str, Result] = {}

    def row(self, result: Result) -> None:
        """Write a row, and before the first one the head of the table."""
        if not self._last:
            titles = ["model", "scheme", "size", "params", "test", "tokens/s", "of the ceiling", "first token"]
            self._line(titles + ["times before"] * (self._earlier is not None))
            write("|" + "|".join(":" + "-" * (width + 1) for width in self._widths()) + "|\n")
        self._last[f"{result.model} {result.scheme}"] = result
        cells = [*_cells(result)]
        if self._earlier is not None:
            ratio = self._earlier.ratio(result)
            cells.append("" if ratio is None else f"{ratio:.3f}")
        self._line(cells)

    def finish(self) -> None:
        """Write the ceilings, and each model's load time and memory."""
        for result in self._last.values():
            on_gpu = result.peak_gpu_memory_bytes
            gpu = "" if on_gpu is None else f" and {human_bytes(on_gpu)} of the GPU's"
            write(
                f"\n{safe_line(result.model)}: loaded in {result.load_seconds:.2f} s, peak memory "
                f"{human_bytes(result.peak_memory_bytes)}{gpu}; ceilings of {safe_line(result.gpu or result.cpu)} "
                f"({_on(result)}): {result.memory_bandwidth / 1e9:.1f} GB/s read, "
                f"{result.matrix_flops / 1e12:.3f} TFLOP/s in matrix products\n"
            )

    def _widths(self) -> list[int]:
        return [*self._WIDTHS, *([12] if self._earlier is not None else [])]

    def _line(self, cells: list[str]) -> None:
        write("| " + " | ".join(c.ljust(width) for c, width in zip(cells, self._widths(), strict=True)) + " |\n")


def _on(result: Result) -> str:
    threads = f"{result.threads} thread{'s' * (result.threads > 1)}"
    return f"{result.kernels} kernels, {threads}" if result.device == "cpu" else result.device


def _cells(result: Result) -> tuple[str, ...]:
    depth = f" @ d{result.depth}" if result.depth else ""
    if result.bandwidth_utilization is not None:
        share = f"{result.bandwidth_utilization:.0%} of memory"
    else:
        share = "" if result.flops_utilization is None else f"{result.flops_utilization:.0%} of matrix"
    return (
        safe_line(result.model).replace("|", "\\|"),
        result.scheme,
        human_bytes(result.bytes),
        human_count(result.parameters),
        result.test + depth,
        f"{result.tokens_per_second_mean:.2f} ± {result.tokens_per_second_stddev:.2f}",
        share,
        f"{result.first_token_seconds:.3f} s",
    )


def make_printer(form: Literal["md", "json", "jsonl", "csv"], earlier: Earlier | None) -> Printer:
    """The printer of a form; with `earlier`, each result has its ratio beside it."""
    forms: dict[str, Callable[[Earlier | None], Printer]] = {
        "md": Markdown,
        "json": JsonList,
        "jsonl": JsonLines,
        "csv": Csv,
    }
    return forms[form](earlier)
