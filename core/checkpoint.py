"""A checkpoint folder in the Hugging Face layout, and `Source`: what converting and quantizing read weights from."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from lmx.core.errors import InputError, NotFoundError
from lmx.core.files import is_plain_name, quoted
from lmx.core.jsonfile import JSON, read_json
from lmx.core.mapped import Advice, FileMap
from lmx.core.safetensors_file import TensorInfo, open_safetensors

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG_LIMIT_BYTES = 4 << 20  # the longest published ones, with a list of modules kept from quantization, take 0.1 MB
INDEX_LIMIT_BYTES = 16 << 20  # 20,000 tensors of long names take 3 MB

_PULL_AGAIN = "the download is incomplete or damaged: download it again"
_OTHER_FORMATS = re.compile(r"\.(bin|pt|pth|gguf)$|^consolidated.*\.safetensors$")


class Source(Protocol):
    """Named tensors and the config they belong to, whatever the files look like.

    A tensor may be made when asked for (a pickle's, a transposed one); its `TensorInfo` says what `tensor` will return.
    """

    @property
    def label(self) -> str:
        """What errors and reports call it: a path as the user knows it."""
        ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, file by file in the order of their bytes: reading in this order is sequential."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files: their names, sizes and times tell a resumed job whether the source is still the same."""
        ...

    @property
    def config(self) -> dict[str, JSON]:
        """The model's config in the hub's spelling (config.json). Raises InputError where there is none."""
        ...

    @property
    def generation_config(self) -> dict[str, JSON] | None:
        """The defaults for generation (generation_config.json), if any."""
        ...

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor, on the CPU, possibly a view of a mapped file. Raises InputError for an unknown name."""
        ...

    def advise(self, name: str, advice: Advice) -> None:
        """Say that a tensor will be read soon, in order, or no more; may do nothing."""
        ...


class WeightFile(Protocol):
    """An open file of tensors, its table checked: a `SafetensorsFile`, or a pickle's archive."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors by name, in the order of their bytes."""
        ...

    @property
    def data(self) -> FileMap:
        """The map that views are made of."""
        ...


class Checkpoint:
    """A folder of safetensors with a config.json, opened by its headers alone; implements `Source`.

    Trust: every header is checked (`open_safetensors`), shard names are plain names within the folder, and the index
    and the shards must agree exactly on which tensor lies where.
    """

    def __init__(self, folder: Path, files: Sequence[WeightFile]) -> None:
        """Use `Checkpoint.open`; here, tensors of the same name in two files are refused (InputError)."""
        self.folder = folder
        self._files = {file.path: file for file in files}
        self.infos: Mapping[str, TensorInfo] = _merge(files)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a checkpoint folder; reads headers only, no config and no tensor, and imports no torch.

        The weights are `model.safetensors`, else the shards that `model.safetensors.index.json` names, else the only
        other `*.safetensors`. `consolidated*.safetensors` is Mistral's own format and never chosen.

        Raises:
            NotFoundError: there is no such folder, or we may not read it.
            InputError: it holds no weights in this layout, or a file of it is missing, damaged or hostile.

        """
        names = _list(folder)
        if SINGLE in names:
            return cls(folder, (open_safetensors(folder / SINGLE),))
        if INDEX in names:
            weight_map = read_index(folder / INDEX)
            checkpoint = cls(folder, tuple(_open_shard(folder, shard) for shard in sorted(set(weight_map.values()))))
            check_index(folder / INDEX, weight_map, checkpoint.infos)
            return checkpoint
        return cls(folder, (open_safetensors(folder / _only_weights(folder, names)),))

    @property
    def home(self) -> Path:
        """The folder that the user knows; `folder` is another one where the configs had to be made."""
        return self.folder

    @property
    def label(self) -> str:
        """The folder's path."""
        return str(self.folder)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in the order of their names."""
        return tuple(self._files)

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors, headers not counted."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def parameters(self) -> int:
        """The elements of all tensors as stored: of a packed (4-bit) weight, its bytes."""
        return sum(info.parameters for info in self.infos.values())

    @cached_property
    def config(self) -> dict[str, JSON]:
        """config.json. Raises InputError where it is missing or no valid JSON object."""
        config = _read_optional(self.folder / "config.json")
        if config is None:
            raise InputError(f"{quoted(self.label)} has no config.json", _PULL_AGAIN)
        return config

    @cached_property
    def generation_config(self) -> dict[str, JSON] | None:
        """generation_config.json, or None. Raises InputError where it is no valid JSON object."""
        return _read_optional(self.folder / "generation_config.json")

    @property
    def quantization_config(self) -> dict[str, JSON] | None:
        """How the stored weights are quantized, or None. Raises InputError where config.json gives no object."""
        value = self.config.get("quantization_config")
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{quoted(self.label)}: quantization_config in config.json is no object", _PULL_AGAIN)
        return value

    @property
    def is_quantized(self) -> bool:
        """Whether config.json says so or, as optimum-quanto leaves it unsaid, the names of the tensors."""
        return self.quantization_config is not None or any(name.endswith("._data") for name in self.infos)

    def tensor(self, name: str) -> "torch.Tensor":
        """A tensor by name: a view of the mapped file where it is aligned, else a copy.

        Writing to it changes this process's copy of the page, never the file. Raises InputError for an unknown name.
        """
        info = self._info(name)
        return self._files[info.file].data.view(info.dtype, info.shape, info.offset, info.nbytes)

    def advise(self, name: str, advice: Advice) -> None:
        """Tell the kernel that a tensor will be read soon, in order, or no more (`FileMap.advise`)."""
        info = self._info(name)
        self._files[info.file].data.advise(advice, info.offset, info.nbytes)

    def _info(self, name: str) -> TensorInfo:
        info = self.infos.get(name)
        if info is None:
            raise InputError(f"{quoted(self.label)} has no tensor {quoted(name)}", _PULL_AGAIN)
        return info


def _list(folder: Path) -> set[str]:
    where = quoted(str(folder))
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError as error:
        raise NotFoundError(f"{where} does not exist", "check the path") from error
    except PermissionError as error:
        raise NotFoundError(f"{where} may not be read", "check the folder's permissions") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where} is not a checkpoint folder", "give the folder that holds config.json") from error


def _only_weights(folder: Path, names: set[str]) -> str:
    """The one other `*.safetensors`; InputError says what the folder holds instead."""
    where = quoted(str(folder))
    weights = [name for name in sorted(names) if name.endswith(".safetensors") and not _OTHER_FORMATS.search(name)]
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise InputError(f"{where} holds {len(weights)} safetensors files, but no {INDEX} to join them", _PULL_AGAIN)
    others = [name for name in sorted(names) if _OTHER_FORMATS.search(name)]
    if others:
        found = f"{where} holds no weights in the Hugging Face layout, but {quoted(others[0])}"
        raise InputError(found, f"convert it first: lmx convert {folder} DST")
    hint = "give the folder of a model; if it is one, its download is incomplete: download it again"
    raise InputError(f"{where} holds no weights (no *.safetensors)", hint)


def read_index(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """The `weight_map` of an index: tensor -> shard. Every shard is a plain name (`is_plain_name`) with the suffix.

    Raises InputError for anything else.
    """
    where = quoted(str(path))
    weight_map = read_json(path, INDEX_LIMIT_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{where} has no weight_map", _PULL_AGAIN)
    shards: dict[str, str] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise InputError(f"{where} names no file for tensor {quoted(tensor)}", _PULL_AGAIN)
        shards[tensor] = shard
    for shard in set(shards.values()):
        if not is_plain_name(shard) or not shard.endswith(suffix):
            raise InputError(
                f"{where} names {quoted(shard)}, which is not a plain *{suffix} name in its own folder",
                "the index is damaged or hostile: do not use it, pull the model from its publisher",
            )
    return shards


def _open_shard(folder: Path, shard: str) -> WeightFile:
    try:
        return open_safetensors(folder / shard)
    except NotFoundError as error:
        raise InputError(
            f"{quoted(str(folder))}: the shard {quoted(shard)} of its index is missing", _PULL_AGAIN
        ) from error


def _merge(files: Sequence[WeightFile]) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for file in files:
        twice = infos.keys() & file.tensors.keys()
        if twice:
            name = min(twice)
            both = f"{quoted(infos[name].file.name)} and {quoted(file.path.name)}"
            raise InputError(f"tensor {quoted(name)} lies in both {both}", _PULL_AGAIN)
        infos.update(file.tensors)
    return infos


def check_index(path: Path, weight_map: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> None:
    """Raise InputError unless the index and the files' own tables name the same tensors in the same files.

    Which of the two lies, nobody can say.
    """
    where = quoted(str(path))
    lost: dict[str, list[str]] = defaultdict(list)
    for name, shard in weight_map.items():
        info = infos.get(name)
        if info is None or info.file.name != shard:
            lost[shard].append(name)
    for shard, names in lost.items():
        raise InputError(f"{where}: {_count(names)} not in {quoted(shard)}, where the index says", _PULL_AGAIN)
    unlisted = [name for name in infos if name not in weight_map]
    if unlisted:
        file = infos[unlisted[0]].file.name
        raise InputError(f"{where}: {_count(unlisted)} in {quoted(file)}, but not in the index", _PULL_AGAIN)


def _count(names: list[str]) -> str:
    more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
    return f"tensor {quoted(names[0])}{more}"


def _read_optional(path: Path) -> dict[str, JSON] | None:
    """A JSON file, or None where there is no such file (a dangling link or a denied one is an error all the same)."""
    if not path.exists() and not path.is_symlink():
        return None
    return read_json(path, CONFIG_LIMIT_BYTES)
