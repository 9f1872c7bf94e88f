"""The vocabulary of a GGUF as the hub's files: tokenizer.json, tokenizer_config.json and the chat template.

Two kinds of tokenizer are in use: "gpt2", byte-level BPE with merges, whose way of cutting text has a name
(`tokenizer.ggml.pre`), and "llama", sentencepiece's BPE, whose merges follow from the scores. Imports no torch.
Names: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

import json
from collections.abc import Sequence
from enum import IntEnum

from lmx.convert.gguf_config import Metadata
from lmx.convert.gguf_pre_tokenizers import BYTE_LEVEL, FAMILY, PRE_TOKENIZERS, Json
from lmx.core.config import ConfigReader
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.jsonfile import JSON

# Sentencepiece's longest pieces have 16 characters, runs of spaces 256; finding merges costs a look-up for each
MAX_PIECE = 512
MAX_CHARACTERS = 4 << 20

# transformers' name of a special token -> GGUF's
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
DAMAGED = "the vocabulary is damaged: download the file again"
SPACE = "\u2581"


class TokenType(IntEnum):
    """What llama.cpp knows of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def tokenizer_files(metadata: Metadata, model_type: str, rows: int, where: str) -> dict[str, bytes]:
    """The hub's files by name; none for a GGUF without a vocabulary. rows: of the embedding.

    Raises InputError for a vocabulary that is damaged, or of a kind that lmx does not know.
    """
    kind = metadata.get("tokenizer.ggml.model", "no_vocab")
    if kind in ("no_vocab", "none"):
        return {}
    vocabulary = _Vocabulary(metadata, rows, where)
    if kind == "gpt2":
        document = _byte_level(vocabulary, model_type)
    elif kind == "llama":
        document = _sentencepiece(vocabulary)
    else:
        raise InputError(f"{where}: a tokenizer of the kind {quoted(str(kind))}", "lmx reads 'gpt2' and 'llama'")
    files = {"tokenizer.json": _json(document), "tokenizer_config.json": _json(vocabulary.config())}
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise InputError(f"{where}: tokenizer.chat_template is no text", DAMAGED)
        files["chat_template.jinja"] = template.encode()
    return files


def generation_config_of(metadata: Metadata, where: str) -> Json:
    """The stop tokens for generation_config.json: the end of a turn, too, where the GGUF names one."""
    read = ConfigReader(metadata, where)
    ids = {name: read.optional_integer(f"tokenizer.ggml.{name}_token_id", least=0) for name in ("bos", "eos", "eot")}
    ends = [token for token in (ids["eos"], ids["eot"]) if token is not None]
    config: Json = {} if ids["bos"] is None else {"bos_token_id": ids["bos"]}
    if ends:
        config["eos_token_id"] = ends[0] if len(set(ends)) == 1 else list[JSON](ends)
    return config


class _Vocabulary:
    """Tokens, their types and the special ones, checked."""

    def __init__(self, metadata: Metadata, rows: int, where: str) -> None:
        self._metadata, self.where = metadata, where
        self.tokens = self.texts("tokens")
        if not 0 < len(self.tokens) <= rows:
            raise self.error("tokens", f"has {len(self.tokens):,} entries for {rows:,} embeddings")
        types = self.numbers("token_type") or [TokenType.NORMAL] * len(self.tokens)
        known = set(TokenType)
        if not known.issuperset(types):
            raise self.error("token_type", "has an unknown type")
        self.types = [TokenType(int(kind)) for kind in types]
        self.vocab = {
            token: number
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind is not TokenType.UNUSED
        }
        if len(self.vocab) != len(self.types) - self.types.count(TokenType.UNUSED):
            raise self.error("tokens", "has a token twice")
        if not self.vocab:
            raise self.error("tokens", "has no token that is used")

    def error(self, key: str, what: str) -> InputError:
        return InputError(f"{self.where}: tokenizer.ggml.{key} {what}", DAMAGED)

    def texts(self, key: str) -> list[str]:
        value = self._metadata.get(f"tokenizer.ggml.{key}", [])
        texts = [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
        if not isinstance(value, list) or len(texts) != len(value):
            raise self.error(key, "is no list of texts")
        return texts

    def numbers(self, key: str) -> Sequence[float]:
        """One number for each token, or nothing."""
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return []
        numbers = [n for n in value if isinstance(n, int | float) and n == n] if isinstance(value, list) else []
        if len(numbers) != len(self.tokens):
            raise self.error(key, "does not have a number for each token")
        return numbers

    def flag(self, key: str, default: bool) -> bool:
        return ConfigReader(self._metadata, self.where).flag(f"tokenizer.ggml.{key}", default)

    @property
    def pre(self) -> str | None:
        """The name of the way to cut text, if it is given."""
        value = self._metadata.get("tokenizer.ggml.pre", "default")
        return None if value == "default" else str(value)

    @property
    def writes_spaces(self) -> bool:
        """Whether the chat template writes a space behind BOS."""
        return "' [INST]" in str(self._metadata.get("tokenizer.chat_template", ""))

    def special(self, name: str) -> str | None:
        """The text of a special token, or None. Raises InputError for an id that no token has."""
        key = f"{name}_token_id"
        number = ConfigReader(self._metadata, self.where).optional_integer(f"tokenizer.ggml.{key}", least=0)
        if number is None:
            return None
        if number >= len(self.tokens) or self.types[number] is TokenType.UNUSED:
            raise self.error(key, f"is {number}, which is no token")
        return self.tokens[number]

    def added(self) -> list[JSON]:
        """The tokens that are cut out of the text before anything else."""
        cut = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        return [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind is not TokenType.USER_DEFINED,
            }
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in cut and token
        ]

    def post_processor(self, adds_bos: bool) -> JSON:
        """What puts BOS before a text, and EOS behind it, where the GGUF says so."""
        bos = self.special("bos") if self.flag("add_bos_token", adds_bos) else None
        eos = self.special("eos") if self.flag("add_eos_token", False) else None
        if bos is None and eos is None:
            return None
        text: JSON = {"Sequence": {"id": "A", "type_id": 0}}
        second: JSON = {"Sequence": {"id": "B", "type_id": 1}}
        before = [_special(bos)] if bos is not None else []
        behind = [_special(eos)] if eos is not None else []
        tokens = {token: self.vocab[token] for token in (bos, eos) if token is not None}
        return {
            "type": "TemplateProcessing",
            "single": [*before, text, *behind],
            "pair": [*before, text, *behind, second, *behind],
            "special_tokens": {t: {"id": t, "ids": [number], "tokens": [t]} for t, number in tokens.items()},
        }

    def config(self) -> Json:
        """tokenizer_config.json."""
        named = {key: self.special(name) for key, name in NAMED.items()}
        config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return config | {key: text for key, text in named.items() if text is not None}


def _byte_level(vocabulary: _Vocabulary, model_type: str) -> Json:
    name = vocabulary.pre or FAMILY[model_type]
    if name not in PRE_TOKENIZERS:
        what = f"cuts text as {quoted(name)} does"
        raise vocabulary.error("pre", f"{what}; lmx knows {', '.join(PRE_TOKENIZERS)}")
    steps, normalizer = PRE_TOKENIZERS[name]
    merges = [_pair(merge, vocabulary) for merge in vocabulary.texts("merges")]
    decoder: Json = BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True}
    pre: Json = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list[JSON](steps)}
    post = vocabulary.post_processor(adds_bos=False)
    model = _model(vocabulary, merges, byte_fallback=False) | {"ignore_merges": name.startswith("llama")}
    return _document(vocabulary, normalizer, pre, post, decoder, model)


def _pair(merge: str, vocabulary: _Vocabulary) -> JSON:
    left, _, right = merge.partition(" ")
    if not {left, right, left + right} <= vocabulary.vocab.keys():
        raise vocabulary.error("merges", f"joins {quoted(merge)}, which are no tokens")
    return [left, right]


def _sentencepiece(vocabulary: _Vocabulary) -> Json:
    """Spaces become U+2581, and one is put before the text.

    The hub has two layouts for that. "Prepend" is what sentencepiece and llama.cpp do, but puts a space behind every
    control token too; Mixtral's current template writes that space itself, and goes with "Metaspace".
    """
    prefix = vocabulary.flag("add_space_prefix", True)
    replace: JSON = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer: JSON = None
    pre: JSON = None
    if not prefix:
        normalizer = replace
    elif vocabulary.writes_spaces:
        pre = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    else:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    back: JSON = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip: list[JSON] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoder: Json = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    model = _model(vocabulary, _merges(vocabulary), byte_fallback=True)
    return _document(vocabulary, normalizer, pre, vocabulary.post_processor(adds_bos=True), decoder, model)


def _merges(vocabulary: _Vocabulary) -> list[JSON]:
    """Every way to make a piece of two others, the pieces of the highest scores first."""
    vocab, scores = vocabulary.vocab, vocabulary.numbers("scores")
    if not scores:
        raise vocabulary.error("scores", "is missing")
    made = [
        (number, token)
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    ]
    longest, total = max((len(token) for _, token in made), default=0), sum(len(token) for _, token in made)
    if longest > MAX_PIECE or total > MAX_CHARACTERS:
        raise vocabulary.error("tokens", f"has a piece of {longest:,} characters, or {total:,} in all")
    pairs = [
        (-scores[number], number, vocab[token[:cut]], vocab[token[cut:]])
        for number, token in made
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [[vocabulary.tokens[left], vocabulary.tokens[right]] for _, _, left, right in sorted(pairs)]


def _model(vocabulary: _Vocabulary, merges: list[JSON], *, byte_fallback: bool) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.special("unknown") if byte_fallback else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "vocab": dict[str, JSON](vocabulary.vocab),
        "merges": merges,
    }


def _document(vocabulary: _Vocabulary, normalizer: JSON, pre: JSON, post: JSON, decoder: JSON, model: JSON) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added(),
        "normalizer": normalizer,
        "pre_tokenizer": pre,
        "post_processor": post,
        "decoder": decoder,
        "model": model,
    }


def _special(token: str) -> JSON:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _json(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
