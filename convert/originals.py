"""Which layout a folder is in, by the files that it holds and what they say. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmx.convert import griffin_source, mamba_source, mistral_source, olmo_source, vocabulary_source
from lmx.core.checkpoint import Checkpoint
from lmx.core.files import names_in


@dataclass(frozen=True)
class _Kind:
    """A layout. recognises: whether a folder of these files may be in it; open: None where it is not, after all."""

    recognises: Callable[[set[str]], bool]
    open: Callable[[Path], Checkpoint | None]


_KINDS = (
    _Kind(mistral_source.recognises, mistral_source.open_mistral),
    _Kind(olmo_source.recognises, olmo_source.open_olmo),
    _Kind(griffin_source.recognises, griffin_source.open_griffin),
    _Kind(mamba_source.recognises, mamba_source.open_mamba),
    _Kind(vocabulary_source.recognises, vocabulary_source.open_with_vocabulary),
)


def find_original(folder: Path) -> Checkpoint | None:
    """The checkpoint of a folder in a layout of its makers; None for any other. The hub's weights win over others.

    Raises InputError for one that is damaged or hostile.
    """
    names = names_in(folder)
    for kind in _KINDS:
        checkpoint = kind.open(folder) if kind.recognises(names) else None
        if checkpoint is not None:
            return checkpoint
    return None
