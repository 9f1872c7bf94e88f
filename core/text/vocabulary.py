"""`tokenizer.json` as data: its ids, the tokens that the config adds, a copy with renamed control tokens."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lmx.core.errors import InputError
from lmx.core.text.files import AddedToken, TokenizerFiles, parse_added_token, parse_object

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_DOWNLOAD_AGAIN = "Download the checkpoint again, or ask its author."

Document = dict[str, object]


@dataclass(frozen=True)
class Vocabulary:
    """The parsed `tokenizer.json` with the config's additions. `changed`: it is no longer what the file says."""

    document: Document
    added: tuple[AddedToken, ...]
    changed: bool


def read_vocabulary(files: TokenizerFiles) -> Vocabulary:
    """Parse `tokenizer.json` and enter what `tokenizer_config.json` adds. Raises `InputError`.

    Added tokens of the config are added; tokens that it names (`eos_token` and its like) become special ones.
    A name that the vocabulary does not know is ignored: there is no embedding for it.
    """
    path = files.folder / "tokenizer.json"
    document = parse_object(files.tokenizer_json, path)
    _check_model(document, path)
    before = _listed_tokens(document, path)
    tokens = {token.content: token for token in before}
    for token in files.added:
        tokens.setdefault(token.content, token)
    names = [*files.named.values(), *files.extra_special]
    pieces = _pieces(document)
    for name in dict.fromkeys(names):
        if name in tokens:
            tokens[name] = replace(tokens[name], special=True)
        elif (token_id := pieces.get(name)) is not None:
            tokens[name] = AddedToken(token_id, name, special=True)
    added = tuple(sorted(tokens.values(), key=lambda token: token.id))
    changed = set(added) != set(before)
    if changed:
        document["added_tokens"] = [vars(token) for token in added]
    return Vocabulary(document, added, changed)


def rename(vocabulary: Vocabulary, names: Mapping[str, str]) -> Document:
    """A document in which the added tokens `names` are called otherwise, and that adds no token by itself.

    Text that spells an old name is ordinary text to it. Names change in the model's own vocabulary, too: else
    a unigram model, or a BPE one that takes whole words, could still find them there.
    """
    model = _object(vocabulary.document["model"])
    renamed = dict(model)
    if isinstance(model["vocab"], dict):
        renamed["vocab"] = {names.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
    elif isinstance(model["vocab"], list):
        renamed["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if isinstance(unk := model.get("unk_token"), str):
        renamed["unk_token"] = names.get(unk, unk)
    if isinstance(merges := model.get("merges"), list):
        renamed["merges"] = _without(merges, names)
    tokens = [replace(token, content=names.get(token.content, token.content)) for token in vocabulary.added]
    added = [vars(token) for token in tokens]
    return {**vocabulary.document, "model": renamed, "added_tokens": added, "post_processor": None}


def byte_token_ids(document: Document) -> frozenset[int]:
    """The `<0x..>` tokens, if the decoder joins them as raw bytes."""
    if "ByteFallback" not in repr(document.get("decoder"))[:10_000]:
        return frozenset()
    return frozenset(token_id for piece, token_id in _pieces(document).items() if _BYTE_TOKEN.fullmatch(piece))


def known_ids(document: Document, added: Iterable[AddedToken]) -> set[int]:
    """Every id that has a token."""
    return {*_pieces(document).values(), *(token.id for token in added)}


def _pieces(document: Document) -> dict[str, int]:
    vocab = _object(document["model"])["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {entry[0]: index for index, entry in enumerate(vocab)} if isinstance(vocab, list) else {}


def _without(merges: list[object], names: Mapping[str, str]) -> list[object]:
    """The BPE merges but for those that take or make one of `names`: these would name a token that is gone.

    There are hundreds of thousands, so first a look whether any can (a token of several characters must be made).
    """
    made = {merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(_texts(merge)) for merge in merges}
    if made.isdisjoint(names) and not any(len(name) == 1 for name in names):
        return merges
    return [merge for merge in merges if not _spells(merge, names)]


def _spells(merge: object, names: Mapping[str, str]) -> bool:
    pair = merge.split(" ", 1) if isinstance(merge, str) else _texts(merge)
    return "".join(pair) in names or not names.keys().isdisjoint(pair)


def _texts(merge: object) -> list[str]:
    return [text for text in merge if isinstance(text, str)] if isinstance(merge, list) else []


def _object(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _check_model(document: Document, path: Path) -> None:
    vocab = _object(document.get("model")).get("vocab")
    good = False
    if isinstance(vocab, dict):
        ids = vocab.values()
        good = set(map(type, ids)) == {int} and 0 <= min(ids) <= max(ids) < 1 << 31
    elif isinstance(vocab, list):
        good = all(isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in vocab)
    if not good:
        raise InputError(f"{path} has no vocabulary of texts and ids", _DOWNLOAD_AGAIN)


def _listed_tokens(document: Document, path: Path) -> list[AddedToken]:
    listed = document.get("added_tokens") or []
    if not isinstance(listed, list):
        raise InputError(f"{path}: added_tokens is no list", _DOWNLOAD_AGAIN)
    return [parse_added_token(token, _object(token).get("id"), path) for token in listed]
