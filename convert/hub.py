"""From what a user calls a model to a folder on this machine: a path, or a hub id in the Hugging Face cache, or pulled.

The folder of a hub id is a snapshot of the cache that all Hugging Face tools share
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Imports huggingface_hub only for a hub id.
"""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lmx.convert.pickle_source import INDEX_BIN, SINGLE_BIN
from lmx.convert.places import cache_folder, repository_name
from lmx.convert.pull_events import Watcher, unwatched
from lmx.core.checkpoint import INDEX, SINGLE
from lmx.core.errors import InputError, LmxError, NetworkError, NotFoundError, ResourceError, UsageError
from lmx.core.files import quoted
from lmx.core.jsonfile import read_json

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?", re.ASCII)
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class HubId:
    """A model on the hub: `org/name` and a branch, tag or commit, None for the default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> "HubId | None":
        """`org/name[@revision]`, or None if `text` is no such thing. Raises UsageError for two different revisions."""
        match = _HUB_ID.fullmatch(text)
        if match is None or ".." in text or "--" in match[1]:
            return None
        if revision is not None and (_HUB_ID.fullmatch(f"a/b@{revision}") is None or ".." in revision):
            raise UsageError(f"--revision: {quoted(revision)} is no branch, tag or commit", "check its spelling")
        if revision is not None and match[2] is not None and revision != match[2]:
            raise UsageError(f"{text} and --revision {revision} disagree", "give the revision once")
        return cls(match[1], revision or match[2])


@dataclass(frozen=True)
class Wish:
    """What is to be pulled. include, exclude: globs over file names. token: None is the one that is configured.

    local_dir: a folder to put the files in under their names, in place of the cache.
    """

    hub_id: HubId
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    token: str | None = None
    local_dir: Path | None = None

    @classmethod
    def of(
        cls,
        repo: str,
        revision: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        token: str | None = None,
        local_dir: str | Path | None = None,
    ) -> "Wish":
        """A wish by the names that users give. Raises UsageError for a `repo` that is no hub id, and for odd tokens."""
        hub_id = HubId.parse(repo, revision)
        if hub_id is None:
            raise UsageError(f"{quoted(repo)} is no model of the hub", "give ORG/NAME or ORG/NAME@REVISION")
        folder = None if local_dir is None else Path(local_dir).expanduser()
        return cls(hub_id, tuple(include), tuple(exclude), _checked_token(token), folder)


def _checked_token(token: str | None) -> str | None:
    """A token that a header can hold; an empty one, as of an unset variable, is none. Raises UsageError."""
    token = (token or "").strip()
    if not token.isascii() or not token.isprintable():
        raise UsageError("--token: that is no token: it holds characters that none has", "copy it again from the hub")
    return token or None


def is_offline() -> bool:
    """Whether the environment forbids the network, by the variable that all Hugging Face tools obey."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def find_model(
    model: str | Path, *, revision: str | None = None, offline: bool = False, watch: Watcher = unwatched
) -> Path:
    """The folder of a model, or its GGUF: an existing path wins; else a hub id from the cache, else pulled into it.

    The pull is shown to `watch`.

    Raises:
        UsageError: a revision for a path, or two different ones.
        InputError: the path is a file, and no GGUF; or what the hub sends is not to be believed.
        NotFoundError: neither a path nor a hub id; or the hub does not have it, or does not let us.
        NetworkError, ResourceError: the download failed; the disk is full.

    """
    found = find_local(model, revision=revision)
    if isinstance(found, Path):
        return found
    check_online(found, offline)
    from lmx.convert.pull import pull

    return watch(pull(Wish(found))).folder


def find_local(model: str | Path, *, revision: str | None = None) -> Path | HubId:
    """The folder of a model that is on this machine, whole; else its id on the hub. Raises as `find_model`."""
    path = Path(model)
    if _exists(path):
        if revision is not None:
            raise UsageError(f"--revision {revision} is for models of the hub", f"leave it out: {path} is a path")
        return _folder(path)
    hub_id = HubId.parse(str(model), revision) if isinstance(model, str) else None
    if hub_id is None:
        raise NotFoundError(f"{quoted(str(model))} does not exist", "give a checkpoint's folder or a hub id, ORG/NAME")
    return find_cached(hub_id) or hub_id


def find_cached(hub_id: HubId) -> Path | None:
    """The snapshot of a hub's model in the cache, if it is whole."""
    with suppress(OSError):  # what we may not read is not there for us; a pull says why
        cached = _cached(hub_id)
        return cached if cached is not None and is_complete(cached) else None
    return None


def check_online(hub_id: HubId, offline: bool) -> None:
    """Raise NotFoundError where a model that is not here may not be asked for."""
    if offline or is_offline():
        hint = "run it once without --offline" if offline else "run it once without HF_HUB_OFFLINE"
        state = "not in the Hugging Face cache" if _cached(hub_id) is None else "only partly in the Hugging Face cache"
        raise NotFoundError(f"{hub_id} is {state}, and the network is off", hint)


def is_complete(folder: Path) -> bool:
    """Whether a cached snapshot has all that a run needs; the cache keeps what other tools fetched of a model, too."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return _holds_gguf(folder)
    if any((folder / name).is_file() for name in (SINGLE, SINGLE_BIN)):
        return True
    index = next((folder / name for name in (INDEX, INDEX_BIN) if (folder / name).is_file()), None)
    return _has_shards(folder, index) if index is not None else _holds_gguf(folder)


def _holds_gguf(folder: Path) -> bool:
    if not any(folder.glob("*.gguf")):
        return False
    from lmx.convert.gguf_file import split_paths
    from lmx.convert.gguf_source import find_gguf

    gguf = find_gguf(folder)
    return gguf is not None and all(path.is_file() for path in split_paths(gguf))


def _has_shards(folder: Path, index: Path) -> bool:
    try:
        weight_map = read_json(index).get("weight_map")
    except LmxError:
        return True  # it is there, and broken: the reader will say how
    shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    return all((folder / shard).is_file() for shard in shards)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a folder we may not enter, a NUL
        return False


def _folder(path: Path) -> Path:
    if path.is_dir() or path.suffix == ".gguf":
        return path
    hint = "give the folder that holds config.json and the weights, or a .gguf"
    raise InputError(f"{quoted(str(path))} is a file", hint)


def _cached(hub_id: HubId) -> Path | None:
    """The snapshot's folder in the cache, which may lack files; None if it is not there for us to read.

    The layout is told in `lmx.convert.places`.
    """
    repo = cache_folder() / repository_name(hub_id.repo)
    commit = hub_id.revision or "main"
    with suppress(OSError, ValueError):
        ref = repo / "refs" / commit
        if ref.is_file():
            commit = ref.read_text("utf-8").strip()
        folder = repo / "snapshots" / commit
        return folder if re.fullmatch(r"[0-9a-f]{40}", commit) and folder.is_dir() else None
    return None


@contextmanager
def hub_errors(hub_id: HubId) -> Iterator[None]:
    """Every way that a pull can fail, as ours. No message of the hub is passed on: they hold URLs with signatures."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise NotFoundError(
            f"{hub_id} is gated",
            f"accept its terms at {constants.ENDPOINT}/{hub_id.repo}, then set HF_TOKEN or run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise NotFoundError(f"{hub_id.repo} has no revision {hub_id.revision}", "check the revision") from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"the hub has no {hub_id.repo}, or it is private", "check its spelling; for a private model set HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        raise _status_error(hub_id, error.response.status_code) from error
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        # Where the hub's answer was an error, huggingface_hub looks into the cache, and finds nothing there either
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _status_error(hub_id, error.__cause__.response.status_code) from error
        raise NetworkError(f"{hub_id} could not be pulled: no answer from the hub", _TRY_AGAIN) from error
    except OSError as error:
        raise _disk_error(hub_id, error) from error
    except Exception as error:
        if not is_transport_error(error):
            raise
        what = "no answer from the hub" if type(error).__name__.startswith("Connect") else type(error).__name__
        raise NetworkError(f"{hub_id} could not be pulled: {what}", _TRY_AGAIN) from error


def is_transport_error(error: Exception) -> bool:
    """Whether the HTTP library raised this; which one huggingface_hub uses depends on its version."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2")


_TRY_AGAIN = "check the connection and try again: what has arrived is kept"


def _status_error(hub_id: HubId, status: int) -> LmxError:
    if status in (401, 403):
        return NotFoundError(f"the hub refused {hub_id} (HTTP {status})", "set HF_TOKEN to a token that may read it")
    if status == 404:
        return NotFoundError(f"the hub has no such file of {hub_id} (HTTP 404)", "check the name and the revision")
    return NetworkError(f"{hub_id} could not be pulled (HTTP {status})", _TRY_AGAIN)


def _disk_error(hub_id: HubId, error: OSError) -> LmxError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{hub_id} does not fit on the disk", "free some space, or set HF_HOME; what came is kept")
    where = quoted(str(error.filename)) if error.filename is not None else "the disk"
    reason = (error.strerror or type(error).__name__).lower()
    hint = "check the folder's permissions, or set HF_HOME to a folder that can be written"
    return ResourceError(f"{hub_id} could not be pulled: {where}: {reason}", hint)
