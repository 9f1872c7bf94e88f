"""A checkpoint in the layout of its makers as a checkpoint of the hub: names, config and tokenizer.

A layout says which of the hub's tensors lie in which of the file's (`original_names`) and what its own configs mean;
tensors are views of the mapped files where nothing must be moved. The configs and the tokenizer's files are made in a
temporary folder that lives as long as the checkpoint, beside links to what else the folder holds, for whoever reads a
folder. Importing this imports no torch.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.convert.original_names import Part, Table
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.jsonfile import JSON, to_json
from lmx.core.mapped import ITEM_SIZES, Advice
from lmx.core.names import split_numbers
from lmx.core.safetensors_file import MAX_TENSORS, TensorInfo

if TYPE_CHECKING:
    import torch

_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json")
_MISMATCH = "weights and config belong to different models, or a file is missing: download it again"


@dataclass(frozen=True)
class Layout:
    """What a folder says, in the hub's words.

    title: what it is, and by which files that was seen. config: config.json; it is given the dtype of the weights.
    parts: the hub's tensors, or None where the names are the hub's own. small: other files, by name.
    """

    title: str
    config: Mapping[str, JSON]
    parts: Mapping[str, Part] | None = None
    small: Mapping[str, bytes] = field(default_factory=dict)


class OriginalCheckpoint(Checkpoint):
    """A folder of its makers' layout, opened by its headers; implements `Source`."""

    def __init__(self, stored: Checkpoint, layout: Layout) -> None:
        """Take the weights of `stored`, by the names that they have there.

        Raises InputError where there are more tensors than any model has.
        """
        self._temporary = tempfile.TemporaryDirectory(prefix="lmx-original-")
        super().__init__(Path(self._temporary.name), ())
        self._stored, self.title = stored, layout.title
        self._parts = layout.parts
        self.infos = stored.infos if layout.parts is None else _infos(stored, layout.parts)
        self._write_small_files(layout)

    @property
    def home(self) -> Path:
        """The folder that the user knows."""
        return self._stored.folder

    @property
    def label(self) -> str:
        """Its path."""
        return self._stored.label

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        return self._stored.files

    def tensor(self, name: str) -> "torch.Tensor":
        """A tensor by the hub's name: a view of the mapped file where nothing is to be moved, else a copy."""
        if self._parts is None:
            return self._stored.tensor(name)
        from lmx.convert.original_tensors import read_part

        part = self._parts[self._info(name).name]
        return read_part(self._stored.tensor(part.stored), part)

    def advise(self, name: str, advice: Advice) -> None:
        """Tell the kernel what will happen to the bytes of the file's tensor (`FileMap.advise`)."""
        stored = self._info(name).name if self._parts is None else self._parts[self._info(name).name].stored
        self._stored.advise(stored, advice)

    def _write_small_files(self, layout: Layout) -> None:
        """The files that a folder of the hub has beside the weights: made ones, and links to those that are there."""
        made = {"config.json": to_json(with_dtype(layout.config, self.infos)), **layout.small}
        for path in self.home.iterdir():
            if path.name not in made and path.is_file() and not path.name.endswith(_OTHER_WEIGHTS):
                (self.folder / path.name).symlink_to(path.resolve())
        for name, data in made.items():
            (self.folder / name).write_bytes(data)


def find_parts(stored: Checkpoint, table: Table, layers: int) -> dict[str, Part]:
    """Where each of the hub's tensors lies. layers: what the config says.

    Raises InputError for tensors that the layout does not know, that are given twice or do not fit the config.
    """
    _check_layers(stored, layers)
    parts: dict[str, Part] = {}
    for info in stored.infos.values():
        for name, part in table.parts(info.name, info.shape):
            if name in parts:
                both = f"{quoted(parts[name].stored)} and {quoted(info.name)}"
                raise InputError(f"{quoted(stored.label)}: {both} are the same weight", _MISMATCH)
            parts[name] = part
            if len(parts) > MAX_TENSORS:
                raise InputError(f"{quoted(stored.label)} has more than {MAX_TENSORS:,} matrices", _MISMATCH)
    return parts


def stored_shape(stored: Checkpoint, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that a layout cannot do without. Raises InputError where it is absent or not of `rank`."""
    info = stored.infos.get(name)
    if info is None or len(info.shape) != rank or 0 in info.shape:
        found = "is missing" if info is None else f"has the shape {list(info.shape)}"
        raise InputError(f"{quoted(stored.label)}: tensor {quoted(name)} {found}", _MISMATCH)
    return info.shape


def size_in(config: Mapping[str, JSON], key: str) -> int:
    """A whole number of a config that a layout has made. Raises TypeError for anything else."""
    value = config[key]
    if not isinstance(value, int):
        raise TypeError(f"{key} was read as a whole number")
    return value


def with_dtype(config: Mapping[str, JSON], infos: Mapping[str, TensorInfo]) -> dict[str, JSON]:
    """The config with the dtype of most of the weights' bytes, where it names none."""
    counted = dict.fromkeys(_STORED, 0)
    for info in infos.values():
        counted[info.dtype] = counted.get(info.dtype, 0) + info.nbytes
    main = _STORED.get(max(counted, key=lambda kind: counted[kind]))
    named = main is None or "dtype" in config or "torch_dtype" in config
    return dict(config) if named else {**config, "dtype": main}


def _infos(stored: Checkpoint, parts: Mapping[str, Part]) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for name, part in parts.items():
        info = stored.infos[part.stored]
        row = info.shape[-1] * ITEM_SIZES[info.dtype] if info.shape else 0
        first = 0 if part.rows is None else part.rows.start * row
        nbytes = prod(part.shape) * ITEM_SIZES[info.dtype]
        infos[name] = TensorInfo(name, info.dtype, part.shape, info.file, info.offset + first, nbytes)
    return infos


def _check_layers(stored: Checkpoint, layers: int) -> None:
    """Raise InputError where the config tells of more layers than there are: building them would take long."""
    numbers = [split_numbers(name)[1] for name in stored.infos]
    found = 1 + max((indices[0] for indices in numbers if indices), default=-1)
    if found != layers:
        raise InputError(f"{quoted(stored.label)}: its config tells of {layers} layers, there are {found}", _MISMATCH)
