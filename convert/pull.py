"""Pulling a model from the hub: what to take, where to, and the events on the way.

Metadata comes through huggingface_hub, file bodies by `lmx.convert.transfer`. Imports huggingface_hub when something is
pulled.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lmx.convert.choose import choose
from lmx.convert.fetch import HubFiles, retry_after
from lmx.convert.hub import HubId, Wish, hub_errors, is_transport_error
from lmx.convert.listing import Listing
from lmx.convert.part_file import resumable_bytes
from lmx.convert.patience import Patience
from lmx.convert.places import CachePlace, FolderPlace, Place, cache_folder, is_whole, sweep
from lmx.convert.pull_events import Event, Planned, Pulled
from lmx.convert.transfer import Transfer
from lmx.core.errors import InputError, ResourceError
from lmx.core.files import quoted

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

T = TypeVar("T")

PATIENCE = Patience()
_METADATA_ATTEMPTS = 4
_MOST_FILES = 100_000
_SPARE_BYTES = 16 << 20  # for folders, journals and what others write meanwhile
_DAMAGED = "try again; if it stays so, what answers is not the hub: check HF_ENDPOINT and any proxy"


def plan(wish: Wish) -> Planned:
    """Ask the hub what there is and say what a pull would do. Writes nothing. Raises as `pull`."""
    with hub_errors(wish.hub_id):
        return _Job.of(wish).planned


def pull(wish: Wish) -> Iterator[Event]:
    """Pull; what an earlier run left is gone on with. Yields `Planned` first and `Pulled` last.

    Raises:
        InputError: the listing is hostile, or a file came with other content than its digest says.
        NotFoundError: the hub does not have it, or does not let us.
        NetworkError: the hub could not be reached, or not for long enough.
        ResourceError: the disk is full, or cannot be written.

    """
    with hub_errors(wish.hub_id):
        job = _Job.of(wish)
        yield job.planned
        fetched = 0
        if job.planned.missing:
            _check_room(job.planned, job.place)
            job.place.prepare()
            hub = HubFiles(wish.hub_id.repo, job.planned.commit, wish.token)
            transfer = Transfer(hub, job.place, job.planned.missing, PATIENCE)
            yield from transfer.run()
            fetched = transfer.fetched_bytes
        job.finish(wish.hub_id.revision)
        yield Pulled(job.place.folder, job.planned, fetched)


@dataclass(frozen=True)
class _Job:
    """A plan, where it leads, and the digests of everything that the repository holds now."""

    planned: Planned
    place: Place
    listed: frozenset[str]

    @classmethod
    def of(cls, wish: Wish) -> "_Job":
        listing = _fetch_listing(wish.hub_id, wish.token)
        choice = choose(listing.files, wish.include, wish.exclude)
        place = _place(wish, listing.commit)
        missing = tuple(file for file in choice.files if not place.has(file))
        to_come = {file.digest: file for file in missing if not is_whole(place, file)}
        nbytes = sum(file.size - resumable_bytes(place.parts, file) for file in to_come.values())
        planned = Planned(wish.hub_id.repo, listing.commit, choice.files, missing, nbytes, choice.left_out)
        return cls(planned, place, frozenset(file.digest for file in listing.files))

    def finish(self, revision: str | None) -> None:
        """The last notes. A cache that cannot be written but holds all that was asked for is good enough."""
        try:
            sweep(self.place, self.listed)
            self.place.finish(revision)
        except (OSError, ResourceError):
            if self.planned.missing:
                raise


def _place(wish: Wish, commit: str) -> Place:
    if wish.local_dir is not None:
        return FolderPlace(wish.local_dir, commit)
    return CachePlace(cache_folder(), wish.hub_id.repo, commit)


def _fetch_listing(hub_id: HubId, token: str | None) -> Listing:
    """The commit of a revision and its files. Raises InputError, and what huggingface_hub raises."""
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    info = _patiently(
        lambda: api.model_info(hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=timeout)
    )
    siblings = info.siblings or []
    if len(siblings) > _MOST_FILES:
        raise InputError(f"{hub_id} lists {len(siblings):,} files", "no model has as many")
    entries = [_entry(sibling) for sibling in siblings]
    if any(size is None or digest is None for _, size, digest in entries):
        # A mirror whose answer knows only names: the tree knows the rest
        tree = _patiently(lambda: list(_tree(api, hub_id.repo, info.sha)))
        return Listing.check(info.sha, tree)
    return Listing.check(info.sha, entries)


def _tree(api: "HfApi", repo: str, commit: str | None) -> Iterator[tuple[object, object, object]]:
    from huggingface_hub.hf_api import RepoFile

    for count, file in enumerate(api.list_repo_tree(repo, recursive=True, revision=commit)):
        if count > _MOST_FILES:
            raise InputError(f"{quoted(repo)} lists files without end", "no model has as many")
        if isinstance(file, RepoFile):
            yield file.path, file.size, file.blob_id if file.lfs is None else file.lfs.sha256


def _entry(file: "RepoSibling") -> tuple[object, object, object]:
    return file.rfilename, file.size, file.blob_id if file.lfs is None else file.lfs.sha256


def _patiently(ask: Callable[[], T]) -> T:
    """Ask the hub, again after an answer that may be better next time; not where nobody answers at all."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return ask()
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            # huggingface_hub takes the answer apart without a look at what it is
            raise InputError(f"the hub's listing cannot be understood: {type(error).__name__}", _DAMAGED) from error
        except Exception as error:
            seconds = _seconds_to_wait(error, attempt)
            if seconds is None or attempt == _METADATA_ATTEMPTS:
                raise
        time.sleep(seconds)


def _seconds_to_wait(error: Exception, attempt: int) -> float | None:
    """How long to wait before asking again, or None where that is of no use."""
    from huggingface_hub.errors import HfHubHTTPError

    asked = None
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        asked = retry_after(error.response.headers)
        if (status not in (408, 429) and status < 500) or (asked or 0) > PATIENCE.longest_asked:
            return None
    elif not is_transport_error(error) or type(error).__name__ == "ConnectError":
        return None
    return PATIENCE.wait(attempt, asked)


def _check_room(planned: Planned, place: Place) -> None:
    """Raise ResourceError where what is to come does not fit on the disk."""
    folder = place.parts
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if planned.missing_bytes + _SPARE_BYTES > free:
        raise ResourceError(
            f"{planned.repo} needs {planned.missing_bytes:,} bytes more, and {quoted(str(folder))} has {free:,} free",
            "free some space, or set HF_HOME to a folder on another disk",
        )
