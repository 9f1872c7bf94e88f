"""A checkpoint folder whose weights are pickles of `torch.save`: `pytorch_model.bin`, its shards, or one `.pt`.

The pickles are read in a limited child process (`pickle_table`); the tensors' bytes are mapped where they lie in the
archive, so that opening one costs its table, and reading a tensor its own pages. Importing this imports no torch.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lmx.convert.pickle_table import Archive, StridedTensor, read_tables
from lmx.convert.zip_entries import damaged, read_entries
from lmx.core.checkpoint import Checkpoint, check_index, read_index
from lmx.core.errors import InputError, NotFoundError
from lmx.core.files import names_in, open_regular, quoted, read_range
from lmx.core.mapped import ITEM_SIZES, FileMap
from lmx.core.safetensors_file import TensorInfo

if TYPE_CHECKING:
    import torch

SINGLE_BIN = "pytorch_model.bin"
INDEX_BIN = "pytorch_model.bin.index.json"
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80"  # a bare pickle, protocol 2 or later; torch wrote these before 1.6
_HEAD = "lm_head.weight"
# What training leaves beside the weights, and the formats of others
_NO_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|rng_state|scaler|consolidated).*")
_PULL_AGAIN = "the download is incomplete or damaged: get it again from its publisher"


@dataclass(frozen=True, slots=True)
class PickleFile:
    """An open archive, checked: a `WeightFile`, and the tensors of it whose elements do not lie side by side."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    strided: Mapping[str, StridedTensor]
    data: FileMap


class PickleCheckpoint(Checkpoint):
    """A folder of pickled weights with a config.json, opened by their tables alone; implements `Source`.

    Tensors that share a storage are views of the same bytes. An output matrix that is the embedding itself under its
    second name is left out where config.json ties the two, as safetensors of such a model leave it out.
    """

    def __init__(self, folder: Path, files: Sequence[PickleFile]) -> None:
        """Use `PickleCheckpoint.open`."""
        super().__init__(folder, files)
        self._strided = {name: (file.data, tensor) for file in files for name, tensor in file.strided.items()}

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a folder of pickles: `pytorch_model.bin`, else the shards of its index, else the only other one.

        Raises:
            NotFoundError: a file may not be read.
            InputError: there are no such weights, or they are damaged, hostile or in a form that lmx does not read.

        """
        weight_map = _weight_map(folder)
        checkpoint = cls.of_files(folder, _paths(folder, weight_map))
        if weight_map is not None:
            check_index(folder / INDEX_BIN, weight_map, checkpoint.infos)
        checkpoint._leave_tied_head_out()
        return checkpoint

    @classmethod
    def of_files(cls, folder: Path, paths: Sequence[Path]) -> Self:
        """Open these files as they are, whatever config they belong to. Raises as `open`."""
        return cls(folder, _open_files(paths))

    def tensor(self, name: str) -> "torch.Tensor":
        """A tensor by name: a view of the mapped file where it is dense and aligned, else a dense copy."""
        if name not in self._strided:
            return super().tensor(name)
        data, info = self._strided[name]
        flat = data.view(info.dtype, (info.span,), info.offset, info.span * ITEM_SIZES[info.dtype])
        return flat.as_strided(info.shape, info.strides).contiguous()

    def _leave_tied_head_out(self) -> None:
        head = self.infos.get(_HEAD)
        if head is None or not any(_is_same(info, head) for info in self.infos.values()):
            return
        from lmx.core.registry import family_of

        config = self.config
        if family_of(config).parse(config).tie_word_embeddings:
            self.infos = {name: info for name, info in self.infos.items() if name != _HEAD}


def holds_pickles_only(folder: Path) -> bool:
    """Whether a folder has pickled weights and no safetensors. Raises nothing: opening says what is wrong with it."""
    names = names_in(folder)
    if any(
        name.endswith((".safetensors", ".safetensors.index.json")) and not _NO_WEIGHTS.match(name) for name in names
    ):
        return False
    return bool({SINGLE_BIN, INDEX_BIN} & names or _candidates(names))


def weight_files(folder: Path) -> list[Path]:
    """The pickles that `PickleCheckpoint.open` takes. Raises InputError where there are none, or too many."""
    return _paths(folder, _weight_map(folder))


def _weight_map(folder: Path) -> dict[str, str] | None:
    return read_index(folder / INDEX_BIN, ".bin") if _is_sharded(folder) else None


def _paths(folder: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    return [folder / name for name in (sorted(set(weight_map.values())) if weight_map else [_single(folder)])]


def _is_same(info: TensorInfo, head: TensorInfo) -> bool:
    return info.name != head.name and (info.file, info.offset, info.shape) == (head.file, head.offset, head.shape)


def _is_sharded(folder: Path) -> bool:
    return (folder / INDEX_BIN).exists() and not (folder / SINGLE_BIN).exists()


def _single(folder: Path) -> str:
    if (folder / SINGLE_BIN).exists():
        return SINGLE_BIN
    found = _candidates({entry.name for entry in folder.iterdir()})
    if len(found) != 1:
        what = f"{len(found)} files of pickled weights, but no {INDEX_BIN} to join them"
        raise InputError(f"{quoted(str(folder))} holds {what}", _PULL_AGAIN)
    return found[0]


def _candidates(names: set[str]) -> list[str]:
    return sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")) and not _NO_WEIGHTS.match(name))


def _open_files(paths: Sequence[Path]) -> list[PickleFile]:
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(path)) for path in paths]
        archives = [archive for archive, _ in opened]
        tables = read_tables(archives)
        return [_file(archive, data, table) for (archive, data), table in zip(opened, tables, strict=True)]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Archive, FileMap]]:
    try:
        with open_regular(path) as fd:
            size = os.fstat(fd).st_size
            _check_format(read_range(fd, min(size, len(_ZIP)), 0, path), path)
            yield Archive(path, fd, read_entries(fd, size, path)), FileMap(fd, size, path)
    except NotFoundError as error:
        raise InputError(f"{quoted(str(path))}: {error.message}", _PULL_AGAIN) from error


def _check_format(start: bytes, path: Path) -> None:
    if start == _ZIP:
        return
    if start.startswith(_LEGACY):
        raise InputError(
            f"{quoted(str(path))} is in the format of torch before 1.6, which lmx does not read",
            "get safetensors from the model's publisher; or, if you trust the file, load and save it with torch again",
        )
    if start.startswith(b"vers"):
        raise InputError(f"{quoted(str(path))} is a Git LFS pointer, not the weights", "run git lfs pull")
    raise damaged(path, "it is no archive of torch's")


def _file(archive: Archive, data: FileMap, table: list[StridedTensor]) -> PickleFile:
    table = sorted(table, key=lambda tensor: (tensor.offset, tensor.nbytes))
    infos = {t.name: TensorInfo(t.name, t.dtype, t.shape, archive.path, t.offset, t.nbytes) for t in table}
    return PickleFile(archive.path, infos, {t.name: t for t in table if not t.is_contiguous}, data)
