"""The Hugging Face cache as the command line shows it. Importing this imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmx.convert import cache
from lmx.convert.cache import Repository, Revision, Verified, remove, scan
from lmx.convert.places import cache_folder
from lmx.core.errors import InputError, LmxError, NotFoundError, UsageError
from lmx.core.files import quoted
from lmx.core.jsonfile import read_json
from lmx.core.registry import model_type_of

__all__ = [
    "CachedModel",
    "Repository",
    "Revision",
    "Verified",
    "architecture_of",
    "cache_folder",
    "describe_cached",
    "find_in_cache",
    "remove",
    "scan",
    "verify",
]


@dataclass(frozen=True)
class CachedModel:
    """What can be said of any snapshot in the cache. `is_supported`: lmx has this architecture."""

    model: str
    commit: str
    refs: tuple[str, ...]
    architecture: str | None
    is_supported: bool
    files: int
    size_on_disk: int
    license: str
    folder: str


def find_in_cache(model: str | None, revision: str | None = None) -> tuple[Repository, tuple[Revision, ...]]:
    """A repository in the cache and the snapshots that are meant. Raises UsageError, NotFoundError."""
    if model is None:
        raise UsageError("which model?", "name one that lmx list shows")
    return cache.find_repository(model, revision)


def verify(model: str, revision: str | None = None) -> Iterator[Verified]:
    """Compute the digests of a model's files again: of one in the cache, or of a folder that was pulled.

    Raises:
        NotFoundError: it is not there.
        InputError: nothing is known of any file's digest.

    """
    folder = Path(model)
    if folder.is_dir():
        verdicts = list(cache.verify_folder(folder))
        if not verdicts:
            raise InputError(
                f"{quoted(model)} has no digests to check by", "only what lmx pull or hf download made has"
            )
        yield from verdicts
        return
    _, revisions = find_in_cache(model, revision)
    if not revisions:
        raise NotFoundError(f"{quoted(model)} has begun to arrive, no more", f"go on with lmx pull {model}")
    yield from cache.verify(revisions)


def describe_cached(model: str, revision: str | None = None) -> CachedModel:
    """The newest snapshot of a repository in the cache, whether lmx can run it or not. Raises NotFoundError."""
    from lmx.describe import license_of

    repo, revisions = find_in_cache(model, revision)
    if not revisions:
        raise NotFoundError(f"{quoted(model)} has begun to arrive, no more", f"go on with lmx pull {model}")
    main = [one for one in revisions if "main" in one.refs]
    shown = (main or list(revisions))[-1]
    architecture, is_supported = architecture_of(shown.folder)
    return CachedModel(
        model=repo.name,
        commit=shown.commit,
        refs=shown.refs,
        architecture=architecture,
        is_supported=is_supported,
        files=len(shown.files),
        size_on_disk=shown.nbytes,
        license=license_of(shown.folder),
        folder=str(shown.folder),
    )


def architecture_of(folder: Path) -> tuple[str | None, bool]:
    """What config.json calls the architecture, None if nothing does, and whether lmx has it."""
    try:
        config = read_json(folder / "config.json")
    except LmxError:
        return None, False
    name = config.get("model_type")
    try:
        model_type_of(config)
    except LmxError:
        return (name if isinstance(name, str) else None), False
    return (name if isinstance(name, str) else None), True
