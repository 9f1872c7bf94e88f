"""The vocabulary of a folder that has no tokenizer.json, from what it has: sentencepiece's or tiktoken's file.

Imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from lmx.convert.gguf_header import Value
from lmx.convert.gguf_vocabulary import tokenizer_files
from lmx.convert.sentencepiece_model import FILE as SENTENCEPIECE
from lmx.convert.sentencepiece_model import read_sentencepiece
from lmx.convert.tiktoken_model import MAX_TOKENS, read_tiktoken
from lmx.convert.tiktoken_model import SUFFIX as TIKTOKEN
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.jsonfile import JSON
from lmx.core.text.files import (
    MAX_TEMPLATE_BYTES,
    AddedToken,
    read_bounded,
    read_config_tokens,
    read_tokenizer_files,
)
from lmx.core.text.vocabulary import read_vocabulary

TOKENIZER = "tokenizer.json"
_TEMPLATE = "chat_template.jinja"
_CUTS_AS_CL100K = "dbrx"


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
    names = {entry.name for entry in folder.iterdir()}
    path = next((folder / name for name in sorted(names) if is_vocabulary(name)), None)
    if path is None or TOKENIZER in names:
        return MadeVocabulary({}, {})
    keys, special = _tiktoken(path, model_type, rows) if path.suffix == TIKTOKEN else _sentencepiece(path, rows)
    made = tokenizer_files(keys | _template(folder), model_type, rows, quoted(str(path)))
    return MadeVocabulary({name: data for name, data in made.items() if name not in names}, special)


def read_token_ids(folder: Path) -> dict[str, JSON]:
    """The ids of the special tokens that a folder with a tokenizer.json names; nothing without one.

    Raises InputError for files that are damaged.
    """
    if not (folder / TOKENIZER).exists():
        return {}
    files = read_tokenizer_files(folder)
    ids = {token.content: token.id for token in read_vocabulary(files).added}
    named = {f"{name}_id": files.named.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    return {key: ids[token] for key, token in named.items() if token in ids}


def is_vocabulary(name: str) -> bool:
    """Whether a file of this name is one that a tokenizer.json can be made of."""
    return name == SENTENCEPIECE or name.endswith(TIKTOKEN)


def _sentencepiece(path: Path, rows: int) -> tuple[dict[str, Value], dict[str, int]]:
    model = read_sentencepiece(path)
    _check_rows(path, len(model.texts), rows)
    return model.gguf_keys, dict(model.special)


def _tiktoken(path: Path, model_type: str, rows: int) -> tuple[dict[str, Value], dict[str, int]]:
    if model_type != _CUTS_AS_CL100K:
        raise InputError(f"{quoted(str(path))} does not say how text is cut", "take the model's own tokenizer.json")
    model = read_tiktoken(path)
    own = (AddedToken(number, token, special=True) for token, number in model.special.items())
    added = {token.id: token for token in (*own, *read_config_tokens(path.parent)) if token.id >= len(model.ranks)}
    _check_rows(path, 1 + max(added, default=len(model.ranks) - 1), min(rows, 2 * MAX_TOKENS))
    return model.gguf_keys(added), {}


def _template(folder: Path) -> dict[str, Value]:
    """The chat template; it says which of the two layouts of a Mistral tokenizer goes with it."""
    path = folder / _TEMPLATE
    if not path.exists():
        return {}
    return {"tokenizer.chat_template": read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")}


def _check_rows(path: Path, tokens: int, rows: int) -> None:
    if tokens > rows:
        what = f"{quoted(str(path))} has {tokens:,} tokens, the model {rows:,} embeddings"
        raise InputError(what, "take the vocabulary that came with the model")
