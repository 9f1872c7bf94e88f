"""The vocabulary of a folder that has no tokenizer.json, from what it has: sentencepiece's or tiktoken's file.

Imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from lmx.convert.gguf_header import Value
from lmx.convert.gguf_vocabulary import tokenizer_files
from lmx.convert.sentencepiece_model import FILE as SENTENCEPIECE
from lmx.convert.sentencepiece_model import read_sentencepiece
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.jsonfile import JSON
from lmx.core.text.files import MAX_TEMPLATE_BYTES, read_bounded

TOKENIZER = "tokenizer.json"
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class MadeVocabulary:
    """Files of the hub's that were made, and the ids of the special tokens: "bos", "eos", "unknown", "padding"."""

    files: dict[str, bytes]
    special: dict[str, int]

    @property
    def token_ids(self) -> dict[str, JSON]:
        """As config.json and generation_config.json name them."""
        names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
        return {names[name]: number for name, number in self.special.items() if name in names}


def make_vocabulary(folder: Path, model_type: str, rows: int) -> MadeVocabulary:
    """tokenizer.json and what belongs to it, from the folder's own files; nothing where it has one, or none of those.

    rows: of the embedding. What the folder has itself of tokenizer_config.json and the template is not made. Raises
    InputError for a vocabulary that is damaged, too large for the model, or of a kind that lmx does not read.
    """
    if (folder / TOKENIZER).exists() or not (folder / SENTENCEPIECE).exists():
        return MadeVocabulary({}, {})
    model = read_sentencepiece(folder / SENTENCEPIECE)
    _check_rows(folder / SENTENCEPIECE, len(model.texts), rows)
    keys = {**model.gguf_keys, **_template(folder)}
    made = tokenizer_files(keys, model_type, rows, quoted(str(folder / SENTENCEPIECE)))
    return MadeVocabulary(_missing(folder, made), dict(model.special))


def _missing(folder: Path, made: dict[str, bytes]) -> dict[str, bytes]:
    """Without what the folder has itself."""
    return {name: data for name, data in made.items() if not (folder / name).exists()}


def _template(folder: Path) -> dict[str, Value]:
    """The chat template, which says which of the two layouts of a Mistral tokenizer goes with it."""
    path = folder / _TEMPLATE
    if not path.exists():
        return {}
    return {"tokenizer.chat_template": read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")}


def _check_rows(path: Path, tokens: int, rows: int) -> None:
    if tokens > rows:
        what = f"{quoted(str(path))} has {tokens:,} tokens, the model {rows:,} embeddings"
        raise InputError(what, "take the vocabulary that came with the model")
