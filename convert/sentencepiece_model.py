"""A `tokenizer.model` of sentencepiece (BPE), read with limits, and what the hub's tokenizer.json needs of it.

Fields: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmx.convert.gguf_header import Value as Key
from lmx.convert.gguf_vocabulary import DAMAGED, MAX_CHARACTERS, MAX_PIECE, TokenType
from lmx.convert.protobuf import Value, read_fields
from lmx.core.errors import InputError
from lmx.core.files import quoted, read_bounded

FILE = "tokenizer.model"
LIMIT_BYTES = 16 << 20  # Gemma's 256,000 pieces take 4.2 MB
MAX_PIECES = 1 << 19
_MAX_SPECIFICATION = 256  # fields of a specification; the format knows some 50
_BPE = 2

# ModelProto, SentencePiece, TrainerSpec, NormalizerSpec
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _SUFFIX_SPACES, _BYTE_FALLBACK = 3, 24, 35
_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5

_UNSAYABLE = "lmx reads the BPE of Mistral and Gemma: take the model's published tokenizer.json"


@dataclass(frozen=True)
class SentencePieceModel:
    """The pieces in the order of their ids, with scores and types; the ids of special pieces; a space put first or not.

    texts: of all pieces, no text twice.
    """

    texts: list[str]
    scores: list[float]
    types: list[TokenType]
    special: Mapping[str, int]
    puts_space_first: bool

    @property
    def gguf_keys(self) -> dict[str, Key]:
        """The same in a GGUF's words, which `gguf_vocabulary.tokenizer_files` understands."""
        keys: dict[str, Key] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [*self.texts],
            "tokenizer.ggml.scores": [*self.scores],
            "tokenizer.ggml.token_type": [int(kind) for kind in self.types],
            "tokenizer.ggml.add_space_prefix": self.puts_space_first,
        }
        return keys | {f"tokenizer.ggml.{name}_token_id": number for name, number in self.special.items()}


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a vocabulary.

    Raises NotFoundError where there is none, and InputError where it is too large, damaged, or of another kind than
    BPE with spaces written as U+2581 and nothing else normalised.
    """
    where = quoted(str(path))
    try:
        return _parse(memoryview(read_bounded(path, LIMIT_BYTES)), where)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is no sentencepiece model: {error}", DAMAGED) from error


def _parse(data: memoryview, where: str) -> SentencePieceModel:
    pieces = _Pieces()
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in read_fields(data):
        if number == _PIECES:
            pieces.add(_bytes(value, "a piece"))
        elif number == _TRAINER:
            trainer = _specification(value, "trainer_spec")
        elif number == _NORMALIZER:
            normalizer = _specification(value, "normalizer_spec")
    pieces.check()
    _check_kind(trainer, normalizer, where)
    special = {name: _signed(trainer.get(key, default)) for name, (key, default) in _IDS.items()}
    for name, number in special.items():
        if not -1 <= number < len(pieces.texts) or (number >= 0 and pieces.types[number] is TokenType.UNUSED):
            raise ValueError(f"the {name} piece is number {number}, which there is not")
    known = {name: number for name, number in special.items() if number >= 0}
    return SentencePieceModel(
        pieces.texts, pieces.scores, pieces.types, known, bool(normalizer.get(_DUMMY_PREFIX, True))
    )


@dataclass
class _Pieces:
    """What is read of the pieces so far."""

    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[TokenType] = field(default_factory=list)
    characters: int = 0

    def add(self, message: memoryview) -> None:
        text, score, kind = "", 0.0, TokenType.NORMAL
        for number, value in read_fields(message):
            if number == _TEXT:
                text = str(_bytes(value, "a text"), "utf-8")
            elif number == _SCORE:
                score = _score(value)
            elif number == _TYPE:
                kind = TokenType(_integer(value))
        self.characters += len(text)
        if not text or len(text) > MAX_PIECE or self.characters > MAX_CHARACTERS or len(self.texts) == MAX_PIECES:
            raise ValueError(f"piece {len(self.texts)} has {len(text)} characters, {self.characters:,} with all before")
        self.texts.append(text)
        self.scores.append(score)
        self.types.append(kind)

    def check(self) -> None:
        used = [text for text, kind in zip(self.texts, self.types, strict=True) if kind is not TokenType.UNUSED]
        if not used:
            raise ValueError("it has no pieces")
        if len(set(used)) != len(used):
            raise ValueError("it has a piece twice")


def _check_kind(trainer: Mapping[int, Value], normalizer: Mapping[int, Value], where: str) -> None:
    """Raise InputError for what the hub's layout of Mistral's and Gemma's vocabularies would not do."""
    charsmap = normalizer.get(_CHARSMAP)
    problems = {
        "is no BPE": trainer.get(_MODEL_TYPE, 1) != _BPE,
        "writes spaces behind words": bool(trainer.get(_SUFFIX_SPACES, 0)),
        "has no pieces for bytes": not trainer.get(_BYTE_FALLBACK, 0),
        "normalises characters": isinstance(charsmap, memoryview) and len(charsmap) > 0,
        "removes spaces": bool(normalizer.get(_REMOVE_SPACES, 1)),
        "keeps spaces as they are": not normalizer.get(_ESCAPE_SPACES, 1),
    }
    for problem, found in problems.items():
        if found:
            raise InputError(f"{where} {problem}", _UNSAYABLE)


def _specification(value: Value, name: str) -> dict[int, Value]:
    """The fields of a specification, of several with the same number the last."""
    fields: dict[int, Value] = {}
    for number, item in read_fields(_bytes(value, name)):
        fields[number] = item
        if len(fields) > _MAX_SPECIFICATION:
            raise ValueError(f"{name} has too many fields")
    return fields


def _bytes(value: Value, what: str) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError(f"{what} is a number")
    return value


def _integer(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a number is none")
    return value


def _signed(value: Value) -> int:
    """An int32: a negative one is stored as 64 bits."""
    number = _integer(value)
    return number - (1 << 64) if number >= 1 << 63 else number


def _score(value: Value) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError(f"a score is {value if isinstance(value, int | float) else 'text'}")
    return value
