"""sentencepiece's vocabularies as tokenizer.json: the ids of sentencepiece itself, and of transformers' conversion."""

import json
import random

import pytest
import sentencepiece
from sentencepiece_files import (
    BYTE,
    BYTES,
    CONTROL,
    GEMMA,
    NORMAL,
    NORMALIZER,
    TRAINER,
    UNKNOWN,
    USER_DEFINED,
    field,
    message,
    model,
    piece,
    trained,
)
from support import SHARED, needs_shared
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

from lmx.convert.sentencepiece_model import read_sentencepiece
from lmx.convert.vocabularies import make_vocabulary
from lmx.core.errors import InputError, NotFoundError
from lmx.quant.memory import peak_memory_bytes

TEXTS = [
    "Hello, how are you?",
    " two  spaces   and    four",
    "1234 + 5,678.90",
    "line\n\nline\n\n\n\tend ",
    "Grüße aus Köln, naïve café; 生活 и жизнь 🦙 \x00",
    "<start_of_turn>user <h1>Paris</h1><end_of_turn>",
    "",
]
MARKS = "▁ literal ▁▁ marks"  # the hub cuts a user's own token out before spaces become marks, sentencepiece behind
ALPHABET = "aeioutnrsh TQ.\n\t<>h1éжπ生🦙0123"


def made(folder, data: bytes, model_type="mixtral", rows=1 << 20) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(data)
    return Tokenizer.from_str(make_vocabulary(folder, model_type, rows).files["tokenizer.json"].decode())


def random_texts(count):
    chance = random.Random(7)
    return ["".join(chance.choices(ALPHABET, k=chance.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, GEMMA], ids=["mistral", "no prefix", "gemma"])
def test_ids_are_those_of_sentencepiece(options, tmp_path):
    data = trained(**options)
    tokenizer, theirs = made(tmp_path, data), sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in [*TEXTS, *([] if options is GEMMA else [MARKS]), *random_texts(300)]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text), text
        assert tokenizer.decode(ids) == theirs.decode(ids)
    bos = theirs.bos_id()
    assert tokenizer.encode("Hello").ids == [bos, *theirs.encode("Hello")]


@pytest.mark.parametrize("options", [{}, GEMMA], ids=["mistral", "gemma"])
def test_ids_are_those_of_transformers_conversion(options, tmp_path):
    tokenizer = made(tmp_path, trained(**options))
    vocab, scores, merges = SentencePieceExtractor(str(tmp_path / "tokenizer.model")).extract()
    assert len(scores) == len(vocab)
    theirs = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if not options else []
    theirs.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    theirs.add_tokens(GEMMA["user_defined_symbols"] if options else [])
    for text in [text for text in [*TEXTS, *random_texts(200)] if text]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == theirs.encode(text).ids, text


@needs_shared
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3"])
def test_mistrals_published_vocabularies(name, tmp_path):
    data = (SHARED / "data" / "mixtral" / name).read_bytes()
    tokenizer, theirs = made(tmp_path, data), sentencepiece.SentencePieceProcessor(model_proto=data)
    vectors = json.loads((SHARED / "data" / "vectors" / "mixtral-v1-sentencepiece.json").read_text())
    for text, ids in [(case["text"], case["ids"]) for case in vectors]:
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if name == "tokenizer.model":
            assert found == ids
        if "[INST]" not in text and "<s>" not in text:  # control tokens are none to sentencepiece, in plain text
            assert found == theirs.encode(text), text


@pytest.mark.slow
@needs_shared
def test_a_vocabulary_of_gemmas_size(tmp_path):
    """Gemma's published tokenizer.json as a model with its pieces and scores, and back: same ids, soon enough."""
    document = json.loads((SHARED / "data" / "recurrent_gemma" / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    rank = {}
    for merge in document["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        rank.setdefault(left + right, float(-len(rank)))
    kinds = {token["content"]: CONTROL for token in document["added_tokens"]} | {text: BYTE for text, _, _ in BYTES}
    kinds["<unk>"] = UNKNOWN
    pieces = [(text, rank.get(text, -1e6), kinds.get(text, NORMAL)) for text in sorted(vocab, key=vocab.get)]
    ids = {40: 3, 41: 2, 42: 1, 43: 0}
    specifications = field(2, message(TRAINER | ids)) + field(3, message(NORMALIZER | {3: 0}))
    before = peak_memory_bytes()
    tokenizer = made(tmp_path, b"".join(piece(*item) for item in pieces) + specifications, "recurrent_gemma")
    assert peak_memory_bytes() - before < 1 << 30
    theirs = Tokenizer.from_str(json.dumps(document))
    lines = (SHARED / "data" / "vectors" / "ggml-vocab-llama-spm.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    for text in [*TEXTS, *lines, *random_texts(100)]:
        assert tokenizer.encode(text).ids == theirs.encode(text).ids, text


def test_pieces_of_every_kind(tmp_path):
    extra = [("<tool>", 0.0, USER_DEFINED), ("<end>", 0.0, CONTROL), ("▁", -3.0, NORMAL), ("a", -1.0, NORMAL)]
    extra += [("▁a", -2.0, NORMAL), ("left over", 0.0, 5)]
    tokenizer = made(tmp_path, model(extra))
    first = 3 + 256
    assert tokenizer.encode("a<tool>a", add_special_tokens=False).ids == [first + 4, first, first + 4]
    assert tokenizer.token_to_id("left over") is None
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    assert added == {"<unk>": True, "<s>": True, "</s>": True, "<tool>": False, "<end>": True}
    files = make_vocabulary(tmp_path, "mixtral", 300).files
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")


def test_a_folders_own_files_stay(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(model([("a", 0.0, NORMAL)]))
    assert make_vocabulary(tmp_path, "mixtral", 300).files.keys() == {"tokenizer.json"}
    (tmp_path / "tokenizer.json").write_text("{}")
    assert make_vocabulary(tmp_path, "mixtral", 300).files == {}


WHOLE = model([("a", 0.0, NORMAL)])
HOSTILE = {
    "empty": (b"", "no pieces"),
    "text": (b"not a model at all, but a text", "no sentencepiece model"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "no sentencepiece model"),
    "cut off": (WHOLE[:-3], "no sentencepiece model"),
    "a piece of 2**60 bytes": (b"\x0a" + b"\xff" * 8 + b"\x0f" + WHOLE, "beyond the end"),
    "a number without end": (WHOLE + b"\xff" * 30, "does not end"),
    "a field of number 0": (WHOLE + b"\x00\x00", "has the number 0"),
    "a group": (WHOLE + b"\x0b", "of the kind 3"),
    "a piece that is a number": (field(1, 5) + WHOLE, "a piece is a number"),
    "a piece without text": (field(1, field(2, 1.0)) + WHOLE, "0 characters"),
    "a piece of no UTF-8": (field(1, field(1, b"\xff\xfe")) + WHOLE, "no sentencepiece model"),
    "a piece of a kilobyte": (field(1, field(1, "x" * 1024)) + WHOLE, "1024 characters"),
    "a score that is not a number": (field(1, field(1, "x") + field(2, float("nan"))) + WHOLE, "a score is nan"),
    "a score that is a text": (field(1, field(1, "x") + field(2, b"abcd")) + WHOLE, "a score is text"),
    "an unknown type": (field(1, field(1, "x") + field(3, 77)) + WHOLE, "77"),
    "a piece twice": (model([("a", 0.0, NORMAL)] * 2), "a piece twice"),
    "a million pieces": (field(1, field(1, "x")) * (1 << 20), "524288|twice"),
    "too large": (bytes(17 << 20), "limit"),
    "unigram": (model([("a", 0.0, NORMAL)], TRAINER | {3: 1}), "is no BPE"),
    "no kind at all": (model([("a", 0.0, NORMAL)], {35: 1}), "is no BPE"),
    "no bytes": (model([("a", 0.0, NORMAL)], {3: 2}), "no pieces for bytes"),
    "NFKC": (model([("a", 0.0, NORMAL)], normalizer=NORMALIZER | {2: b"\0\0\0\0abc"}), "normalises"),
    "fewer spaces": (model([("a", 0.0, NORMAL)], normalizer=NORMALIZER | {4: 1}), "removes spaces"),
    "real spaces": (model([("a", 0.0, NORMAL)], normalizer=NORMALIZER | {5: 0}), "keeps spaces"),
    "spaces behind": (model([("a", 0.0, NORMAL)], TRAINER | {24: 1}), "behind words"),
    "an end that is not there": (model([("a", 0.0, NORMAL)], TRAINER | {42: 10**6}), "which there is not"),
    "a negative end": (model([("a", 0.0, NORMAL)], TRAINER | {42: -7}), "which there is not"),
    "a thousand settings": (WHOLE + field(2, b"".join(field(n, 1) for n in range(1000, 2000))), "too many fields"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_models(tmp_path, name):
    data, words = HOSTILE[name]
    (tmp_path / "tokenizer.model").write_bytes(data)
    before = peak_memory_bytes()
    with pytest.raises(InputError, match=words) as caught:
        make_vocabulary(tmp_path, "mixtral", 1 << 20)
    assert "tokenizer.model" in caught.value.message
    assert caught.value.message.isprintable()
    assert peak_memory_bytes() - before < 1 << 29


def test_no_model(tmp_path):
    with pytest.raises(NotFoundError):
        read_sentencepiece(tmp_path / "tokenizer.model")


def test_control_tokens_are_special(tmp_path):
    tokenizer = made(tmp_path, model([("[INST]", 0.0, CONTROL), ("a", 0.0, NORMAL)]))
    assert tokenizer.decode(tokenizer.encode("[INST]").ids) == ""
