"""A GGUF file as a checkpoint: the hub's names and shapes, config and tokenizer, from its header alone.

Plain tensors (F32, F16, BF16) are views of the mapped file; blocks are dequantized when a tensor is asked for. What
llama.cpp changed (rotary pairs, Mamba's decay, experts in one tensor) is changed back. The tokenizer's files and the
configs are written to a temporary folder that lives as long as the checkpoint, for whoever reads a folder.
Importing this imports no torch.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lmx.convert.gguf_config import Architecture, Metadata, architecture_of, config_of
from lmx.convert.gguf_header import Header, TensorEntry, Value, aligned, read_header
from lmx.convert.gguf_layout import BY_ID, LAYOUTS, UNREAD, BlockLayout
from lmx.convert.gguf_names import Change
from lmx.convert.gguf_vocabulary import generation_config_of, tokenizer_files
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError
from lmx.core.files import open_regular, quoted
from lmx.core.jsonfile import to_json
from lmx.core.mapped import ITEM_SIZES, Advice, FileMap
from lmx.core.safetensors_file import TensorInfo

if TYPE_CHECKING:
    import torch

SUFFIX = ".gguf"
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_SPLITS = 1000
_DAMAGED = "the file is damaged or incomplete: download it again"


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

    @property
    def metadata(self) -> Mapping[str, str]:
        """None in safetensors' sense."""
        return {}


class GGUFCheckpoint(Checkpoint):
    """A GGUF, or all files of a split one, opened by its header; implements `Source`.

    A tensor of blocks is returned in float32, unless `read_blocks_as` says otherwise. `main_dtype` is what to run or
    write the model in.
    """

    def __init__(self, files: Sequence[GGUFFile], metadata: Metadata, architecture: Architecture) -> None:
        """Use `GGUFCheckpoint.open`."""
        self._temporary = tempfile.TemporaryDirectory(prefix="lmx-gguf-")
        super().__init__(Path(self._temporary.name), files)
        self.architecture, self.header = architecture, metadata
        self._block_dtype = "F32"
        self._parts = {name: (file.data, part) for file in files for name, part in file.parts.items()}
        self._write_small_files()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a `.gguf` file; of a split one, any of its files.

        Raises:
            NotFoundError: there is no such file, or we may not read it.
            InputError: it is damaged, hostile, of another architecture or in a type that lmx does not read.

        """
        opened = [_open(path) for path in split_paths(folder)]
        metadata = opened[0].header.metadata
        where = quoted(str(folder))
        _check_splits(opened, where)
        architecture = architecture_of(metadata, where)
        files = [_file(item, architecture, metadata) for item in opened]
        if not any(file.tensors for file in files):
            raise InputError(f"{where} holds a vocabulary and no weights", "give the model's GGUF")
        _check_counts(opened, architecture, where)
        return cls(files, metadata, architecture)

    @property
    def label(self) -> str:
        """The (first) file's path."""
        return str(self.files[0])

    @property
    def main_dtype(self) -> str:
        """The stored dtype of most bytes; bfloat16 where most are blocks, whose numbers are made when read."""
        counted: dict[str, int] = {}
        for _, part in self._parts.values():
            kind = part.layout.plain or "BF16"
            counted[kind] = counted.get(kind, 0) + part.nbytes
        return max(counted, key=lambda kind: counted[kind])

    @property
    def layouts(self) -> dict[str, int]:
        """How many bytes of the file are of which of GGML's types."""
        counted: dict[str, int] = {}
        for _, part in self._parts.values():
            counted[part.layout.name] = counted.get(part.layout.name, 0) + part.nbytes
        return counted

    @property
    def quantization(self) -> str | None:
        """What a GGUF of blocks is called by: the type of most of them; None for plain weights."""
        blocks = {name: size for name, size in self.layouts.items() if LAYOUTS[name].plain is None}
        return f"{max(blocks, key=lambda name: blocks[name])} (GGUF)" if blocks else None

    def mapped_bytes(self, dtype: str) -> int:
        """The bytes that stay where they lie in the file when the model runs in a dtype; all others are made anew."""
        kept = (part for _, part in self._parts.values() if part.layout.plain == dtype)
        return sum(part.nbytes for part in kept if part.change in (Change.NOTHING, Change.CONVOLUTION))

    def read_blocks_as(self, dtype: str) -> None:
        """From now on return dequantized tensors in another dtype than F32, and say so in `infos`."""
        blocks = {name for name, (_, part) in self._parts.items() if part.layout.plain is None}
        self._block_dtype = dtype
        self.infos = {
            name: replace(info, dtype=dtype, nbytes=info.parameters * ITEM_SIZES[dtype]) if name in blocks else info
            for name, info in self.infos.items()
        }

    def layout_of(self, name: str) -> BlockLayout:
        """How a tensor is stored. Raises InputError for an unknown name."""
        return self._parts[self._info(name).name][1].layout

    def tensor(self, name: str) -> "torch.Tensor":
        """A tensor by the hub's name: a view of the file where it is plain and nothing is to undo, else a new one."""
        from lmx.convert.gguf_tensors import read_part

        data, part = self._parts[self._info(name).name]
        tensor = read_part(data, part, self._block_dtype, f"{self.label}: {quoted(name)}")
        if part.layout.plain is None:  # its bytes are not needed again
            data.advise(Advice.DONT_NEED, part.offset, part.nbytes)
        return tensor

    def advise(self, name: str, advice: Advice) -> None:
        """Tell the kernel what will happen to a tensor's bytes (`FileMap.advise`)."""
        data, part = self._parts[self._info(name).name]
        data.advise(advice, part.offset, part.nbytes)

    def _write_small_files(self) -> None:
        """The files that a folder of the hub has beside the weights."""
        where, names = quoted(self.label), self.infos
        table = self.architecture.table
        embedding = next(rule.hub for rule in table.rules if rule.gguf == "token_embd.weight")
        if embedding not in names:
            raise InputError(f"{where} has no tensor 'token_embd.weight'", _DAMAGED)
        config = config_of(
            self.header,
            vocab_size=names[embedding].shape[0],
            tied="lm_head.weight" not in names,
            dtype={"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[self.main_dtype],
            where=where,
        )
        small: dict[str, bytes] = {"config.json": to_json(config)}
        generation = generation_config_of(self.header, where)
        if generation:
            small["generation_config.json"] = to_json(generation)
        small |= tokenizer_files(self.header, self.architecture.model_type, names[embedding].shape[0], where)
        for name, data in small.items():
            (self.folder / name).write_bytes(data)


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
            raise InputError(f"{quoted(str(path))} is empty", _DAMAGED)
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
            raise InputError(f"{where}: {found}", _DAMAGED)


def _file(item: _Opened, architecture: Architecture, metadata: Metadata) -> GGUFFile:
    where = quoted(str(item.path))
    infos: dict[str, TensorInfo] = {}
    parts: dict[str, Part] = {}
    for entry, layout, offset in _places(item, where):
        for name, shape, part in _parts_of(entry, layout, offset, architecture, metadata, where):
            kind = layout.plain or "F32"
            if name in parts:
                raise InputError(f"{where}: two tensors are {quoted(name)}", _DAMAGED)
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
            raise InputError(f"{where}: tensor {name} has rows that are no whole blocks of {layout.name}", _DAMAGED)
        if entry.offset != end:
            raise InputError(f"{where}: tensor {name} does not begin where the one before it ends", _DAMAGED)
        yield entry, layout, item.header.data_start + end
        end = aligned(end + entry.elements // layout.elements * layout.block_bytes, item.header.alignment)
    # The last padding may be missing; bytes after it belong to nothing
    if not end - item.header.alignment < item.size - item.header.data_start <= end and item.header.tensors:
        raise InputError(
            f"{where} has {item.size:,} bytes, its header tells of {item.header.data_start + end:,}", _DAMAGED
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
            raise InputError(
                f"{where}: {quoted(entry.name)} has the shape {list(shape)}, not that of experts", _DAMAGED
            )
        each = nbytes // shape[0]
        for expert in range(shape[0]):
            yield match.hub(expert), shape[1:], Part(layout, shape[1:], offset + expert * each, each)
        return
    if change is Change.CONVOLUTION:
        if len(shape) != 2:
            raise InputError(f"{where}: {quoted(entry.name)} has the shape {list(shape)}", _DAMAGED)
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
        raise InputError(f"{what} has the shape {list(shape)}, which are not {heads!r:.40} heads", _DAMAGED)
    return heads


def find_gguf(folder: Path) -> Path | None:
    """The one GGUF of a folder that has no other weights, or None. Raises InputError where there are several."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except (OSError, ValueError):
        return None
    if any(name.endswith((".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json")) for name in names):
        return None
    found = sorted(split_siblings({name for name in names if name.endswith(SUFFIX)}))
    if len(found) > 1:
        raise InputError(f"{quoted(str(folder))} holds {len(found)} GGUFs", f"name one: {folder / found[0]}")
    return folder / found[0] if found else None
