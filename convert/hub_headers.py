"""A model of the hub by the headers of its files: what it is and what would become of it, without its weights.

The small files are fetched whole and of each shard its header, by ranged requests, into a temporary folder where the
shard is a sparse file of its real length: every check that a downloaded checkpoint goes through holds here too.
Imports huggingface_hub when something is fetched.
"""

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lmx.convert.hub import HubId, hub_errors
from lmx.core.checkpoint import INDEX, INDEX_LIMIT_BYTES, SINGLE, Checkpoint, WeightFile, read_index
from lmx.core.errors import InputError, LmxError, NetworkError
from lmx.core.files import is_plain_name
from lmx.core.safetensors_file import MAX_HEADER_BYTES

if TYPE_CHECKING:
    import torch

_SMALL = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "README.md", "LICENSE*", "LICENCE*", INDEX),
)
_HEAD_ONLY = "tokenizer.json"  # large, and nobody here looks into it
_SMALL_LIMIT_BYTES = INDEX_LIMIT_BYTES
_FIRST_BYTES = 256 << 10  # the headers of most shards are shorter: one request each
_TIMEOUT_SECONDS = 10.0
_CONNECTIONS = 8
_RANGE = re.compile(r"bytes \d+-\d+/(\d+)")
_TRY_AGAIN = "check the connection and try again"


class HeaderCheckpoint(Checkpoint):
    """A checkpoint of the hub of which only the headers are here; its temporary folder lives as long as this object."""

    def __init__(self, folder: Path, files: Sequence[WeightFile]) -> None:
        """Use `HeaderCheckpoint.fetch`."""
        super().__init__(folder, files)
        self._hub_id: HubId | None = None

    @classmethod
    def fetch(cls, hub_id: HubId) -> Self:
        """Fetch configs and headers; nothing gets into the cache.

        Raises:
            NotFoundError: the hub does not have the model, or does not let us.
            NetworkError: it could not be reached.
            InputError: the model has no safetensors, or broken ones.

        """
        folder = Path(tempfile.mkdtemp(prefix="lmx-headers-"))
        try:
            with hub_errors(hub_id):
                _fetch_all(hub_id, folder)
            checkpoint = cls.open(folder)
        except LmxError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise type(error)(error.message.replace(str(folder), str(hub_id)), error.hint) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        checkpoint._hub_id = hub_id
        weakref.finalize(checkpoint, shutil.rmtree, folder, ignore_errors=True)
        return checkpoint

    @property
    def label(self) -> str:
        """The model's name on the hub."""
        return str(self._hub_id or self.folder)

    def tensor(self, name: str) -> "torch.Tensor":
        """Raise InputError: the weights are not here."""
        raise InputError(f"{self.label}: of its weights only the headers were fetched", _download_first(self.label))


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of a file, and how many it has in all."""

    data: bytes
    total: int


def _fetch_all(hub_id: HubId, folder: Path) -> None:
    from huggingface_hub import HfApi

    info = HfApi().model_info(hub_id.repo, revision=hub_id.revision, timeout=_TIMEOUT_SECONDS)
    names = {file.rfilename for file in info.siblings or () if is_plain_name(file.rfilename)}
    fetch = partial(_fetch, HubId(hub_id.repo, info.sha))
    small = [name for name in names if any(fnmatchcase(name, pattern) for pattern in _SMALL)]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for name, part in zip(small, pool.map(fetch, small), strict=True):
            (folder / name).write_bytes(part.data)
        shards = _shards(hub_id, names, folder)
        heads = [*shards, *({_HEAD_ONLY} & names)]
        for name, part in zip(heads, pool.map(partial(_fetch_head, fetch), heads), strict=True):
            with (folder / name).open("wb") as file:
                file.write(part.data)
                file.truncate(part.total)


def _shards(hub_id: HubId, names: set[str], folder: Path) -> list[str]:
    """The weight files that `Checkpoint.open` will want."""
    if SINGLE in names:
        return [SINGLE]
    if INDEX in names:
        return sorted(set(read_index(folder / INDEX).values()) & names)
    found = sorted(name for name in names if fnmatchcase(name, "*.safetensors") and not name.startswith("consolidated"))
    if not found:
        raise InputError(f"{hub_id} has no safetensors, whose headers say what is in it", _download_first(str(hub_id)))
    return found


def _download_first(model: str) -> str:
    return f"download it first: any command that runs {model} does"


def _fetch_head(fetch: "partial[_Part]", name: str) -> _Part:
    """The header of a safetensors file, as far as it may go; of other files, the beginning."""
    first = fetch(name, _FIRST_BYTES)
    end = 8 + int.from_bytes(first.data[:8], "little")
    if name == _HEAD_ONLY or not len(first.data) < end <= min(first.total, 8 + MAX_HEADER_BYTES):
        return first  # a header that claims too much is refused by whoever opens the file
    return fetch(name, end)


def _fetch(hub_id: HubId, name: str, head: int | None = None) -> _Part:
    """The first `head` bytes of a file, or the whole of a small one."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(hub_id.repo, name, revision=hub_id.revision)
    wanted = {"Accept-Encoding": "identity"} | ({} if head is None else {"Range": f"bytes=0-{head - 1}"})
    limit = _SMALL_LIMIT_BYTES if head is None else head
    data = bytearray()
    with get_session().stream(
        "GET", url, headers={**build_hf_headers(), **wanted}, timeout=_TIMEOUT_SECONDS
    ) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > limit:
                break
        total = _total(response.headers, len(data))
    if head is None and len(data) > limit:
        raise InputError(f"{hub_id.repo}: {name} has more than {limit:,} bytes", "no published model has one as large")
    if len(data) < min(limit, total):
        raise NetworkError(f"{hub_id.repo}: {name} came only in part", _TRY_AGAIN)
    return _Part(bytes(data[:limit]), total)


def _total(headers: Mapping[str, str], received: int) -> int:
    """How many bytes the file has: by the answer to a ranged request, or to one for the whole."""
    match = _RANGE.fullmatch(headers.get("Content-Range", ""))
    length = match[1] if match else headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdigit() else received
