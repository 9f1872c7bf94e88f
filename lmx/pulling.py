"""`lmx.pull`: a model from the hub into the cache, and what such a pull would do. Importing this imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.convert.choose import LeftOut
from lmx.convert.hub import HubId, check_online, find_cached
from lmx.convert.listing import RemoteFile
from lmx.convert.pull_events import (
    Arrived,
    Checking,
    Event,
    Installed,
    Planned,
    Pulled,
    Restarted,
    Retrying,
    Waiting,
    Watcher,
    unwatched,
)
from lmx.core.errors import NotFoundError, UsageError
from lmx.core.files import quoted

if TYPE_CHECKING:
    from lmx.convert.pull import Wish

__all__ = [
    "Arrived",
    "Checking",
    "Event",
    "Installed",
    "LeftOut",
    "Planned",
    "Pulled",
    "RemoteFile",
    "Restarted",
    "Retrying",
    "Waiting",
    "Watcher",
    "find_pulled",
    "plan_pull",
    "pull",
    "unwatched",
]


def pull(
    repo: str,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    token: str | None = None,
    local_dir: str | Path | None = None,
    watch: Watcher = unwatched,
) -> Path:
    """Pull a model from the hub, only what a run needs of it, and return its folder in the Hugging Face cache.

    A pull that was stopped, however it was, goes on where it stopped; every file is checked against its digest.

    repo: `org/name` or `org/name@revision`. include: globs of file names; exactly these are taken, whatever a run
    needs. exclude: globs of names that are not. token: without it, the one that huggingface_hub is configured with.
    local_dir: a folder to have the files in, under their names, in place of the cache. watch: is given the events of
    the pull, and returns the last one.

    Raises:
        UsageError: `repo` is no hub id, or names another revision than `revision`.
        NotFoundError: the hub does not have it, or does not let us.
        NetworkError: the hub cannot be reached; what has arrived is kept.
        InputError: a file came with other content than its digest says, or the listing is hostile.
        ResourceError: the disk is full, or cannot be written.

    """
    from lmx.convert import pull as hub

    wish = _wish(repo, revision, include, exclude, token, local_dir)
    check_online(wish.hub_id, offline=False)
    return watch(hub.pull(wish)).folder


def plan_pull(
    repo: str,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    token: str | None = None,
    local_dir: str | Path | None = None,
) -> Planned:
    """What `pull` would do; writes nothing. Raises as `pull`."""
    from lmx.convert import pull as hub

    wish = _wish(repo, revision, include, exclude, token, local_dir)
    check_online(wish.hub_id, offline=False)
    return hub.plan(wish)


def find_pulled(repo: str, *, revision: str | None = None) -> Path:
    """The folder of a model that is in the cache, whole. Asks nobody. Raises NotFoundError, UsageError."""
    hub_id = hub_id_of(repo, revision)
    folder = find_cached(hub_id)
    if folder is None:
        check_online(hub_id, offline=True)
        raise NotFoundError(f"{hub_id} is not in the cache", "pull it without --offline")
    return folder


def hub_id_of(repo: str, revision: str | None = None) -> HubId:
    """`org/name[@revision]`. Raises UsageError for anything else."""
    hub_id = HubId.parse(repo, revision)
    if hub_id is None:
        raise UsageError(f"{quoted(repo)} is no model of the hub", "give ORG/NAME or ORG/NAME@REVISION")
    return hub_id


def _wish(
    repo: str,
    revision: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    token: str | None,
    local_dir: str | Path | None,
) -> "Wish":
    from lmx.convert.pull import Wish

    folder = None if local_dir is None else Path(local_dir).expanduser()
    return Wish(hub_id_of(repo, revision), tuple(include), tuple(exclude), token, folder)
