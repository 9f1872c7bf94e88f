"""What a conversion reports while it runs. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Progress:
    """So many of all parameters are written, lately those of `name`."""

    name: str
    parameters: int
    total: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The output has its name. read_as: what a source in a layout of its makers was taken for, and by which files."""

    output: Path
    parameters: int
    output_bytes: int
    read_as: str | None = None
