"""The files of a GGUF, checked: which weights lie in which tensor, where, and what llama.cpp did to them.

Importing this imports no torch.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from lmx.convert.gguf_config import Architecture, Metadata, architecture_of
from lmx.convert.gguf_header import DAMAGED, Header, TensorEntry, Value, aligned, read_header
from lmx.convert.gguf_layout import BY_ID, UNREAD, BlockLayout
from lmx.convert.gguf_names import Change
from lmx.core.errors import InputError
from lmx.core.files import open_regular, quoted
from lmx.core.mapped import ITEM_SIZES, FileMap
from lmx.core.safetensors_file import TensorInfo

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_SPLITS = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """A weight in a GGUF: bytes of a tensor, its shape there, and what to undo. heads: of a rotary projection."""

    layout: BlockLayout
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    change: Change = Change.NOTHING
    heads: int = 1


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open file, checked: a `WeightFile`, and the parts that its weights are made of."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    parts: Mapping[str, Part]
    data: FileMap


@dataclass(frozen=True)
class GGUFParts:
    """All files of a GGUF, its metadata, and the architecture that it names."""

    files: tuple[GGUFFile, ...]
    metadata: Metadata
    architecture: Architecture


def open_files(path: Path) -> GGUFParts:
    """Open a `.gguf` file; of a split one, whose first this is, all. Raises as `GGUFCheckpoint.open`."""
    opened = [_open(each) for each in split_paths(path)]
    metadata, where = opened[0].header.metadata, quoted(str(path))
    _check_splits(opened, where)
    architecture = architecture_of(metadata, where)
    files = tuple(_file(item, architecture, metadata) for item in opened)
    if not any(file.tensors for file in files):
        raise InputError(f"{where} holds a vocabulary and no weights", "give the model's GGUF")
    _check_counts(opened, architecture, where)
    return GGUFParts(files, metadata, architecture)


@dataclass(frozen=True, slots=True)
class _Opened:
    path: Path
    header: Header
    size: int
    data: FileMap


def _open(path: Path) -> _Opened:
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        if not size:
            raise InputError(f"{quoted(str(path))} is empty", DAMAGED)
        return _Opened(path, read_header(fd, path), size, FileMap(fd, size, path))


def split_siblings(names: set[str]) -> set[str]:
    """The names that are first files: a file that is not split, or the first of several."""
    return {name for name in names if not (match := _SPLIT.fullmatch(name)) or int(match[2]) == 1}


def split_paths(path: Path) -> list[Path]:
    """All files of a GGUF whose first one is `path`, by its name."""
    match = _SPLIT.fullmatch(path.name)
    if match is None or not 1 <= int(match[3]) <= _MAX_SPLITS:
        return [path]
    return [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]


def _check_splits(opened: Sequence[_Opened], where: str) -> None:
    """Raise InputError unless every file says that it is the one of so many that its name says."""
    for number, item in enumerate(opened):
        count = item.header.metadata.get("split.count", 1)
        if count != len(opened) or item.header.metadata.get("split.no", 0) != number:
            what = f"says that it is one of {count!r:.20} files, its name says {len(opened)}"
            raise InputError(f"{where}: {quoted(item.path.name)} {what}", "keep the names that the files came with")


def _check_counts(opened: Sequence[_Opened], architecture: Architecture, where: str) -> None:
    """Raise InputError where the keys tell of more layers or experts than there are: building them would take long."""
    entries = [entry for item in opened for entry in item.header.tensors]
    layers = 1 + max((int(entry.name.split(".")[1]) for entry in entries if entry.name.startswith("blk.")), default=-1)
    experts = {entry.shape[0] for entry in entries if entry.name.endswith("_exps.weight")}
    metadata = opened[0].header.metadata
    for key, counts in (("block_count", {layers}), ("expert_count", experts)):
        value = metadata.get(f"{architecture.name}.{key}")
        if counts and counts != {value}:
            found = f"{architecture.name}.{key} is {value!r:.40}, there are {sorted(counts)}"
            raise InputError(f"{where}: {found}", DAMAGED)


def _file(item: _Opened, architecture: Architecture, metadata: Metadata) -> GGUFFile:
    where = quoted(str(item.path))
    infos: dict[str, TensorInfo] = {}
    parts: dict[str, Part] = {}
    for entry, layout, offset in _places(item, where):
        for name, shape, part in _parts_of(entry, layout, offset, architecture, metadata, where):
            kind = layout.plain or "F32"
            if name in parts:
                raise InputError(f"{where}: two tensors are {quoted(name)}", DAMAGED)
            parts[name] = part
            infos[name] = TensorInfo(name, kind, shape, item.path, part.offset, prod(shape) * ITEM_SIZES[kind])
    return GGUFFile(item.path, infos, parts, item.data)


def _places(item: _Opened, where: str) -> Iterator[tuple[TensorEntry, BlockLayout, int]]:
    """Every tensor with its type and where in the file it begins. ggml, too, wants them one after another, no holes."""
    end = 0
    for entry in item.header.tensors:
        layout = BY_ID.get(entry.type_id)
        name = quoted(entry.name)
        if layout is None:
            kind = UNREAD.get(entry.type_id, f"the unknown type {entry.type_id}")
            hint = f"lmx reads {', '.join(sorted(layout.name for layout in BY_ID.values()))}: get one of those"
            raise InputError(f"{where}: tensor {name} is stored as {kind}", hint)
        if entry.shape[-1] % layout.elements:
            raise InputError(f"{where}: tensor {name} has rows that are no whole blocks of {layout.name}", DAMAGED)
        if entry.offset != end:
            raise InputError(f"{where}: tensor {name} does not begin where the one before it ends", DAMAGED)
        yield entry, layout, item.header.data_start + end
        end = aligned(end + entry.elements // layout.elements * layout.block_bytes, item.header.alignment)
    # The last padding may be missing; bytes after it belong to nothing
    if not end - item.header.alignment < item.size - item.header.data_start <= end and item.header.tensors:
        raise InputError(
            f"{where} has {item.size:,} bytes, its header tells of {item.header.data_start + end:,}", DAMAGED
        )


def _parts_of(
    entry: TensorEntry, layout: BlockLayout, offset: int, architecture: Architecture, metadata: Metadata, where: str
) -> Iterator[tuple[str, tuple[int, ...], Part]]:
    """The weights in a tensor: the hub's name and shape, and where it lies."""
    match = architecture.table.match(entry.name)
    nbytes = entry.elements // layout.elements * layout.block_bytes
    shape, change = entry.shape, match.change
    if change is Change.EXPERTS:
        if len(shape) != 3:
            raise InputError(f"{where}: {quoted(entry.name)} has the shape {list(shape)}, not that of experts", DAMAGED)
        each = nbytes // shape[0]
        for expert in range(shape[0]):
            yield match.hub(expert), shape[1:], Part(layout, shape[1:], offset + expert * each, each)
        return
    if change is Change.CONVOLUTION:
        if len(shape) != 2:
            raise InputError(f"{where}: {quoted(entry.name)} has the shape {list(shape)}", DAMAGED)
        yield match.hub(), (shape[0], 1, shape[1]), Part(layout, shape, offset, nbytes, change)
        return
    heads = _heads(change, metadata, architecture, shape, f"{where}: {quoted(entry.name)}")
    yield match.hub(), shape, Part(layout, shape, offset, nbytes, change, heads)


def _heads(change: Change, metadata: Metadata, architecture: Architecture, shape: tuple[int, ...], what: str) -> int:
    if change not in (Change.QUERY_PAIRS, Change.KEY_PAIRS):
        return 1
    all_heads: Value | None = metadata.get(f"{architecture.name}.attention.head_count")
    few: Value | None = metadata.get(f"{architecture.name}.attention.head_count_kv", all_heads or 0)
    heads = all_heads if change is Change.QUERY_PAIRS else few
    if type(heads) is not int or heads < 1 or len(shape) != 2 or shape[0] % (2 * heads):
        raise InputError(f"{what} has the shape {list(shape)}, which are not {heads!r:.40} heads", DAMAGED)
    return heads
