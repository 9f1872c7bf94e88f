"""Which layout a folder is in, by the files that it holds. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmx.convert import mistral_source
from lmx.convert.original_source import OriginalCheckpoint
from lmx.core.checkpoint import INDEX, SINGLE

_HUB_WEIGHTS = {SINGLE, INDEX}


@dataclass(frozen=True)
class _Kind:
    recognises: Callable[[set[str]], bool]
    open: Callable[[Path], OriginalCheckpoint]


_KINDS = (_Kind(mistral_source.recognises, mistral_source.open_mistral),)


def find_original(folder: Path) -> OriginalCheckpoint | None:
    """The checkpoint of a folder in a layout of its makers; None for any other. The hub's own files win over others.

    Raises InputError for one that is damaged or hostile.
    """
    try:
        names = {entry.name for entry in folder.iterdir()}
    except (OSError, ValueError):  # whoever opens it next says what is wrong
        return None
    if _HUB_WEIGHTS & names:
        return None
    kind = next((kind for kind in _KINDS if kind.recognises(names)), None)
    return None if kind is None else kind.open(folder)
