"""A checkpoint of the hub whose vocabulary is another library's file: DBRX with tiktoken's, Mixtral with its own.

Imports no torch.
"""

from pathlib import Path

from lmx.convert.original_source import Layout, OriginalCheckpoint
from lmx.convert.pickle_source import PickleCheckpoint, holds_pickles_only
from lmx.convert.vocabularies import TOKENIZER, is_vocabulary, make_vocabulary
from lmx.core.checkpoint import Checkpoint
from lmx.core.config import ConfigReader
from lmx.core.registry import MODEL_TYPES


def recognises(names: set[str]) -> bool:
    """Whether a folder of these files has a vocabulary to be made."""
    return TOKENIZER not in names and "config.json" in names and any(is_vocabulary(name) for name in names)


def open_with_vocabulary(folder: Path) -> Checkpoint:
    """Open a folder of the hub, and make its tokenizer.json; a model of other families is opened as it is.

    Raises InputError where one of its files is damaged or hostile.
    """
    stored = PickleCheckpoint.open(folder) if holds_pickles_only(folder) else Checkpoint.open(folder)
    model_type = stored.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        return stored
    rows = ConfigReader(stored.config).integer("vocab_size")
    vocabulary = make_vocabulary(folder, model_type, rows)
    name = next(path.name for path in sorted(folder.iterdir()) if is_vocabulary(path.name))
    return OriginalCheckpoint(
        stored, Layout(f"the hub's files with a vocabulary in {name}", stored.config, small=vocabulary.files)
    )
