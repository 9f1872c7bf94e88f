"""Vocabularies of GGUFs as tokenizer.json, against llama.cpp's, sentencepiece's and tiktoken's own ids."""

import json

import pytest
from support import SHARED, needs_shared
from tokenizers import Tokenizer

from lmx.convert.gguf_header import read_header
from lmx.convert.gguf_vocabulary import TokenType, generation_config_of, tokenizer_files
from lmx.core.errors import InputError

DATA = SHARED / "data"
VECTORS = DATA / "vectors"


def header_of(path):
    with path.open("rb") as file:
        return read_header(file.fileno(), path).metadata


def tokenizer_of(metadata, model_type):
    files = tokenizer_files(metadata, model_type, len(metadata["tokenizer.ggml.tokens"]), "x.gguf")
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def cases(name):
    texts = (VECTORS / f"{name}.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (VECTORS / f"{name}.out").read_text().splitlines()
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, lines, strict=False)]


@needs_shared
@pytest.mark.parametrize(
    ("folder", "name", "model_type"),
    [
        ("falcon_mamba", "ggml-vocab-falcon.gguf", "falcon_mamba"),
        ("vectors", "ggml-vocab-mpt.gguf", "olmoe"),
        ("vectors", "ggml-vocab-llama-spm.gguf", "mixtral"),
    ],
)
def test_llamacpps_own_vectors(folder, name, model_type):
    tokenizer = tokenizer_of(header_of(DATA / folder / name), model_type)
    checked = [(text, tokenizer.encode(text, add_special_tokens=False).ids, ids) for text, ids in cases(name)]
    assert len(checked) >= 40
    assert [(text, ours) for text, ours, _ in checked] == [(text, theirs) for text, _, theirs in checked]


def metadata_of_tokenizer(path, pre):
    """What a GGUF would say of a published tokenizer.json, put together without lmx's writer."""
    document = json.loads(path.read_text())
    model, added = document["model"], {token["id"]: token for token in document["added_tokens"]}
    rows = max([*model["vocab"].values(), *added]) + 1
    texts, types = [f"[PAD{number}]" for number in range(rows)], [int(TokenType.UNUSED)] * rows
    for token, number in model["vocab"].items():
        texts[number], types[number] = token, int(TokenType.NORMAL)
    for number, token in added.items():
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        texts[number], types[number] = token["content"], int(kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": texts}
    return found | {"tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges}


@needs_shared
def test_tiktokens_ids_of_dbrx():
    path = DATA / "dbrx" / "tokenizer.json"
    tokenizer = tokenizer_of(metadata_of_tokenizer(path, "dbrx"), "dbrx")
    found = json.loads((VECTORS / "dbrx-tiktoken.json").read_text())
    assert len(found) >= 40
    for case in found:
        assert tokenizer.encode(case["text"], add_special_tokens=False).ids == case["ids"], case["text"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == Tokenizer.from_file(str(path)).token_to_id("<|im_start|>")


@needs_shared
def test_olmoes_tokenizer():
    path = DATA / "olmoe" / "tokenizer.json"
    ours, theirs = tokenizer_of(metadata_of_tokenizer(path, "olmo"), "olmoe"), Tokenizer.from_file(str(path))
    texts = [text for text, _ in cases("ggml-vocab-mpt.gguf")] + ["e\u0301 <|endoftext|>\n\n   x", "|||IP_ADDRESS|||"]
    for text in texts:
        assert ours.encode(text).ids == theirs.encode(text).ids, text


@needs_shared
def test_sentencepieces_ids_of_mixtral():
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(DATA / "mixtral" / "tokenizer.model"))
    pieces = range(model.get_piece_size())
    kinds = [
        TokenType.UNKNOWN if model.is_unknown(n)
        else TokenType.CONTROL if model.is_control(n)
        else TokenType.BYTE if model.is_byte(n)
        else TokenType.NORMAL
        for n in pieces
    ]  # fmt: skip
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(n) for n in pieces],
        "tokenizer.ggml.scores": [model.get_score(n) for n in pieces],
        "tokenizer.ggml.token_type": list(map(int, kinds)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = tokenizer_of(metadata, "mixtral")
    found = json.loads((VECTORS / "mixtral-v1-sentencepiece.json").read_text())
    assert len(found) >= 40
    for case in found:
        assert tokenizer.encode(case["text"], add_special_tokens=False).ids == case["ids"], case["text"]
        assert tokenizer.encode(case["text"]).ids == [1, *case["ids"]]
    spaced = tokenizer_of({**metadata, "tokenizer.chat_template": "{{ bos_token + ' [INST] ' }}"}, "mixtral")
    theirs = Tokenizer.from_file(str(DATA / "mixtral" / "tokenizer.metaspace.json"))
    text = "<s> [INST] Hi there [/INST] Hello</s> [INST] Bye [/INST]"
    assert spaced.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids


SMALL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "[PAD4]"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 5],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.eot_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
}
BAD = {
    "more tokens than embeddings": {"tokenizer.ggml.tokens": ["a"] * 9},
    "no tokens": {"tokenizer.ggml.tokens": []},
    "a token twice": {"tokenizer.ggml.tokens": ["a", "a", "ab", "<s>", ""]},
    "tokens that are numbers": {"tokenizer.ggml.tokens": [1, 2, 3, 4, 5]},
    "types for others": {"tokenizer.ggml.token_type": [1, 1]},
    "an unknown type": {"tokenizer.ggml.token_type": [1, 1, 1, 3, 9]},
    "only unused tokens": {"tokenizer.ggml.token_type": [5] * 5},
    "a merge of nothing": {"tokenizer.ggml.merges": ["a c"]},
    "a merge of one": {"tokenizer.ggml.merges": ["ab"]},
    "an unknown way to cut": {"tokenizer.ggml.pre": "qwen2"},
    "an unknown kind": {"tokenizer.ggml.model": "rwkv"},
    "a special token beyond the vocabulary": {"tokenizer.ggml.bos_token_id": 5},
    "an unused special token": {"tokenizer.ggml.bos_token_id": 4},
    "a negative special token": {"tokenizer.ggml.bos_token_id": -1},
    "a template that is a number": {"tokenizer.chat_template": 3},
    "no scores": {"tokenizer.ggml.model": "llama"},
    "scores that are no numbers": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [float("nan")] * 5},
    "an endless piece": {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [0.0] * 5,
        "tokenizer.ggml.tokens": ["a" * 1000, "b", "ab", "<s>", "x"],
    },
}  # fmt: skip


def test_a_small_vocabulary():
    tokenizer = tokenizer_of(SMALL, "olmoe")
    assert tokenizer.encode("ab<s>b").ids == [3, 2, 3, 1]
    assert tokenizer.get_vocab_size() == 4
    assert generation_config_of(SMALL, "x") == {"bos_token_id": 3, "eos_token_id": [3, 2]}


def test_without_a_vocabulary_there_are_no_files():
    assert tokenizer_files({"tokenizer.ggml.model": "no_vocab"}, "olmoe", 5, "x") == {}


@pytest.mark.parametrize("name", BAD)
def test_broken_vocabularies(name):
    with pytest.raises(InputError, match=r"x\.gguf"):
        tokenizer_files(SMALL | BAD[name], "olmoe", 5, "x.gguf")
