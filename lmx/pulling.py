"""`lmx.pull`: a model from the hub into the cache, and what such a pull would do. Importing this imports no torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lmx.convert.choose import LeftOut
from lmx.convert.hub import Wish, check_online, find_cached
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
from lmx.core.errors import NotFoundError

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
    "Wish",
    "find_pulled",
    "plan_pull",
    "pull",
    "pull_events",
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
    return watch(pull_events(Wish.of(repo, revision, include, exclude, token, local_dir))).folder


def pull_events(wish: Wish) -> Iterator[Event]:
    """Pull, and tell how it goes: `Planned` first, `Pulled` last. Raises as `pull`."""
    from lmx.convert import pull as hub

    check_online(wish.hub_id, offline=False)
    return hub.pull(wish)


def plan_pull(wish: Wish) -> Planned:
    """What a pull would do; writes nothing. Raises as `pull`."""
    from lmx.convert import pull as hub

    check_online(wish.hub_id, offline=False)
    return hub.plan(wish)


def find_pulled(repo: str, *, revision: str | None = None) -> Path:
    """The folder of a model that is in the cache, whole. Asks nobody. Raises NotFoundError, UsageError."""
    hub_id = Wish.of(repo, revision).hub_id
    folder = find_cached(hub_id)
    if folder is None:
        check_online(hub_id, offline=True)
        raise NotFoundError(f"{hub_id} is not in the cache", "pull it without --offline")
    return folder
