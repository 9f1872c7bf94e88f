"""A tokenizer.json as the vocabulary of a GGUF: `gguf_vocabulary` the other way round."""

from collections.abc import Mapping
from pathlib import Path

from lmx.convert.gguf_header import Value
from lmx.convert.gguf_pre_tokenizers import FAMILY, PRE_TOKENIZERS
from lmx.convert.gguf_vocabulary import NAMED, SPACE, TokenType
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.text.files import TokenizerFiles, read_tokenizer_files
from lmx.core.text.vocabulary import Vocabulary, read_vocabulary

_UNSAYABLE = "a GGUF has no words for it: convert with --to hf, or take the model's published tokenizer.json"


def vocabulary_of(folder: Path, rows: int, model_type: str) -> dict[str, Value]:
    """The keys of a checkpoint's tokenizer and template; `no_vocab` for a folder without a tokenizer.json.

    rows: of the embedding; ids that no token has are filled. Raises InputError for a tokenizer that GGUF has no words
    for, or one with more tokens than the model.
    """
    if not (folder / "tokenizer.json").exists():
        return {"tokenizer.ggml.model": "no_vocab"}
    files = read_tokenizer_files(folder)
    vocabulary = read_vocabulary(files)
    where = quoted(str(folder / "tokenizer.json"))
    model = _object(vocabulary.document["model"])
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{where} is of type {quoted(str(model.get('type')))}, not BPE", _UNSAYABLE)
    ids = {str(token): int(number) for token, number in _object(model["vocab"]).items() if isinstance(number, int)}
    ids |= {token.content: token.id for token in vocabulary.added}
    if max(ids.values()) >= rows:
        raise InputError(f"{where} has the id {max(ids.values()):,}, the model {rows:,} embeddings", _UNSAYABLE)
    sentencepiece = model.get("byte_fallback") is True
    keys = (_sentencepiece if sentencepiece else _byte_level)(vocabulary, ids, rows, model_type, where)
    keys |= _special_keys(files, vocabulary, ids)
    return keys | ({} if files.chat_template is None else {"tokenizer.chat_template": files.chat_template})


def _byte_level(
    vocabulary: Vocabulary, ids: Mapping[str, int], rows: int, model_type: str, where: str
) -> dict[str, Value]:
    texts, types = _tokens(vocabulary, ids, rows)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_name(vocabulary, model_type, where),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in _merges(vocabulary, where)],
    }


def _sentencepiece(
    vocabulary: Vocabulary, ids: Mapping[str, int], rows: int, model_type: str, where: str
) -> dict[str, Value]:
    texts, types = _tokens(vocabulary, ids, rows)
    for number, token in enumerate(texts):
        if types[number] == TokenType.NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[number] = TokenType.BYTE
    unknown = _object(vocabulary.document["model"]).get("unk_token")
    if isinstance(unknown, str) and unknown in ids:
        types[ids[unknown]] = TokenType.UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": _scores(vocabulary, ids, rows, where),
        "tokenizer.ggml.add_space_prefix": _puts_space_first(vocabulary, where),
    }


def _scores(vocabulary: Vocabulary, ids: Mapping[str, int], rows: int, where: str) -> list[float]:
    """Sentencepiece joins the pair whose piece has the highest score: the earlier a merge makes it, the higher."""
    made = dict.fromkeys(left + right for left, right in _merges(vocabulary, where))
    scores = [0.0] * rows
    for rank, token in enumerate(made, 1):
        scores[ids[token]] = -float(rank)
    return scores


def _tokens(vocabulary: Vocabulary, ids: Mapping[str, int], rows: int) -> tuple[list[str], list[int]]:
    texts, types = [f"[PAD{number}]" for number in range(rows)], [int(TokenType.UNUSED)] * rows
    for token, number in ids.items():
        texts[number], types[number] = token, int(TokenType.NORMAL)
    for added in vocabulary.added:
        types[added.id] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    return texts, types


def _merges(vocabulary: Vocabulary, where: str) -> list[tuple[str, str]]:
    """The pairs that are joined, the first ones first; files write a pair as a list, or as a text with a space."""
    model = _object(vocabulary.document["model"])
    vocab, merges = _object(model["vocab"]), model.get("merges")
    found: list[tuple[str, str]] = []
    for merge in merges if isinstance(merges, list) else []:
        left, right = merge if isinstance(merge, list) and len(merge) == 2 else (*str(merge).split(" ", 1), "")[:2]
        if not (isinstance(left, str) and isinstance(right, str) and {left, right, left + right} <= vocab.keys()):
            raise InputError(f"{where} joins {quoted(str(merge))}, which are no tokens", "download the file again")
        found.append((left, right))
    return found


def _pre_name(vocabulary: Vocabulary, model_type: str, where: str) -> str:
    """llama.cpp's name for the way that the tokenizer cuts text; of several, the one that the family's GGUFs have."""
    pre, normalizer = vocabulary.document.get("pre_tokenizer"), vocabulary.document.get("normalizer")
    steps = _object(pre).get("pretokenizers") if _object(pre).get("type") == "Sequence" else [pre]
    wanted = [_essence(step) for step in steps] if isinstance(steps, list) else []
    names = [
        name
        for name, (known, normal) in PRE_TOKENIZERS.items()
        if [_essence(step) for step in known] == wanted and (normalizer or None) == normal
    ]
    if not names:
        raise InputError(f"{where} cuts text in a way that lmx has no name for", _UNSAYABLE)
    family = FAMILY.get(model_type)
    return family if family in names else names[0]


def _essence(step: object) -> tuple[object, ...]:
    """What a step of a pre-tokenizer does, whatever way it is spelled."""
    step = _object(step)
    kind = step.get("type")
    if kind == "ByteLevel":
        return kind, step.get("use_regex", True), step.get("add_prefix_space", True)
    if kind == "Split":  # what matches is kept: "isolated", or what does not match "removed"
        inverted = step.get("behavior") == "Removed" and step.get("invert") is True
        kept = inverted or (step.get("behavior") == "Isolated" and not step.get("invert"))
        return kind, _object(step.get("pattern")).get("Regex"), kept
    return kind, step.get("behavior"), step.get("individual_digits", False)


def _puts_space_first(vocabulary: Vocabulary, where: str) -> bool:
    """Whether a space is put before the text. Raises InputError where spaces are not written as sentencepiece does."""
    normalizer, pre = _object(vocabulary.document.get("normalizer")), _object(vocabulary.document.get("pre_tokenizer"))
    if pre.get("type") == "Metaspace":
        return pre.get("prepend_scheme", "always") != "never"
    steps = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    kinds = [_object(step).get("type") for step in steps] if isinstance(steps, list) else []
    if "Replace" not in kinds or set(kinds) - {"Replace", "Prepend"} or pre:
        raise InputError(f"{where} does not write spaces as {SPACE!a}", _UNSAYABLE)
    return "Prepend" in kinds


def _special_keys(files: TokenizerFiles, vocabulary: Vocabulary, ids: Mapping[str, int]) -> dict[str, Value]:
    named = {ggml: files.named.get(ours) for ours, ggml in NAMED.items()}
    first = _first_token(vocabulary)
    named["bos"] = named["bos"] or first  # without a tokenizer_config.json, what texts begin with
    keys: dict[str, Value] = {f"tokenizer.ggml.{k}_token_id": ids[t] for k, t in named.items() if t in ids and t}
    keys["tokenizer.ggml.add_bos_token"] = first is not None and first == named["bos"]
    keys["tokenizer.ggml.add_eos_token"] = False
    return keys


def _first_token(vocabulary: Vocabulary) -> str | None:
    """The special token that the post-processor puts before a text."""
    post = _object(vocabulary.document.get("post_processor"))
    steps = post.get("processors") if post.get("type") == "Sequence" else [post]
    templates = [_object(step).get("single") for step in steps] if isinstance(steps, list) else []
    firsts = [template[0] for template in templates if isinstance(template, list) and template]
    names = [_object(_object(first).get("SpecialToken")).get("id") for first in firsts]
    return next((name for name in names if isinstance(name, str)), None)


def _object(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
