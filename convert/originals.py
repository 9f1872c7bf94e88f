"""Which layout a folder is in, by the files that it holds. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmx.convert import mistral_source, vocabulary_source
from lmx.core.checkpoint import INDEX, SINGLE, Checkpoint

_HUB_WEIGHTS = {SINGLE, INDEX}


@dataclass(frozen=True)
class _Kind:
    recognises: Callable[[set[str]], bool]
    open: Callable[[Path], Checkpoint]


# Those with weights of their own
_KINDS = (_Kind(mistral_source.recognises, mistral_source.open_mistral),)
_VOCABULARY = _Kind(vocabulary_source.recognises, vocabulary_source.open_with_vocabulary)


def find_original(folder: Path) -> Checkpoint | None:
    """The checkpoint of a folder in a layout of its makers; None for any other. The hub's weights win over others.

    Raises InputError for one that is damaged or hostile.
    """
    try:
        names = {entry.name for entry in folder.iterdir()}
    except (OSError, ValueError):  # whoever opens it next says what is wrong
        return None
    kinds = () if _HUB_WEIGHTS & names else _KINDS
    kind = next((kind for kind in (*kinds, _VOCABULARY) if kind.recognises(names)), None)
    return None if kind is None else kind.open(folder)
