"""tiktoken's vocabularies as tokenizer.json: the ids that joining by rank gives, and of transformers' conversion."""

import base64
import json
import random

import pytest
from support import SHARED, needs_shared
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from lmx.convert.tiktoken_model import MAX_TOKENS, read_tiktoken
from lmx.convert.vocabularies import make_vocabulary
from lmx.core.errors import InputError
from lmx.quant.memory import peak_memory_bytes

BYTES = [bytes([byte]) for byte in range(256)]
WORDS = [
    "hello",
    "help",
    "held",
    " world",
    " word",
    "low",
    " lower",
    "lowest",
    "don't",
    "\n\n",
    "1234",
    "naïve",
    "生活",
    "🦙",
]


def join(data: bytes, ranks, below=1 << 30) -> list[bytes]:
    """tiktoken's byte_pair_merge: always the neighbours whose token has the lowest rank, the first of several."""
    parts = [data[at : at + 1] for at in range(len(data))]
    while True:
        pairs = [(ranks.get(parts[at] + parts[at + 1], below), at) for at in range(len(parts) - 1)]
        rank, at = min(pairs, default=(below, 0))
        if rank >= below:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def vocabulary(seed: int, count=150) -> dict[bytes, int]:
    """The bytes, and tokens each of which is two others joined."""
    chance = random.Random(seed)
    words = [*WORDS, *("".join(chance.choices("helowrd 1", k=6)) for _ in range(60))]
    ranks = {token: rank for rank, token in enumerate(BYTES)}
    while len(ranks) < 256 + count:
        parts = join(chance.choice(words).encode(), ranks)
        if len(parts) > 1:
            at = chance.randrange(len(parts) - 1)
            ranks.setdefault(parts[at] + parts[at + 1], len(ranks))
    return ranks


def written(tokens) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def made(folder, data: bytes, config=None) -> Tokenizer:
    (folder / "x.tiktoken").write_bytes(data)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_str(make_vocabulary(folder, "dbrx", 1 << 20).files["tokenizer.json"].decode())


@pytest.mark.parametrize("seed", range(3))
def test_ids_are_those_of_joining_by_rank(seed, tmp_path):
    ranks = vocabulary(seed)
    tokenizer = made(tmp_path, written(ranks))
    cut = tokenizer.pre_tokenizer
    chance = random.Random(seed)
    for _ in range(200):
        text = " ".join(chance.choices(WORDS, k=4)) + "".join(chance.choices("helowrd 1", k=8))
        pieces = [text[start:end] for _, (start, end) in cut.pre_tokenize_str(text)]
        wanted = [ranks[part] for piece in pieces for part in join(piece.encode(), ranks)]
        ids = tokenizer.encode(text).ids
        assert ids == wanted, text
        assert tokenizer.decode(ids) == text


def test_a_token_that_joining_does_not_reach(tmp_path):
    """As tiktoken does, a piece that is a token is taken whole."""
    ranks = [*BYTES, b"ab", b"abcd"]  # c and d are never joined
    tokenizer = made(tmp_path, written(ranks))
    assert tokenizer.encode("abcd").ids == [257]
    assert tokenizer.encode("abcde").ids == [256, *b"cde"]


def test_special_tokens_stand_in_the_config(tmp_path):
    config = {"added_tokens_decoder": {"300": {"content": "<|end|>", "special": True}, "297": {"content": "<tool>"}}}
    tokenizer = made(tmp_path, written(BYTES), config)
    assert tokenizer.encode("a<|end|><tool>").ids == [97, 300, 297]
    assert tokenizer.decode([97, 300, 297]) == "a<tool>"
    assert tokenizer.id_to_token(298) is None


def transformers_conversion(ranks) -> Tokenizer:
    """`TikTokenConverter` of transformers 5 on a table: every way to make a token is a merge, in the order of ranks."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter("unused")
    converter.load_tiktoken_bpe = lambda _: ranks
    vocab, merges = converter.extract_vocab_merges_from_model("unused")
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False))
    tokenizer.model.ignore_merges = True
    steps = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(converter.pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, steps])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_ids_are_those_of_transformers_conversion(tmp_path):
    ranks = vocabulary(5)
    ours, theirs = made(tmp_path, written(ranks)), transformers_conversion(ranks)
    chance = random.Random(5)
    for _ in range(200):
        text = "".join(chance.choices("helowrd \n'123éß", k=30)) + " ".join(chance.choices(WORDS, k=3))
        assert ours.encode(text).ids == theirs.encode(text).ids, text


@needs_shared
def test_dbrxs_merges_are_those_of_its_tokenizer_json(tmp_path):
    data = (SHARED / "data" / "dbrx" / "cl100k_base.tiktoken").read_bytes()
    before = peak_memory_bytes()
    made_of_it = json.loads(made(tmp_path, data).to_str())["model"]
    assert peak_memory_bytes() - before < 1 << 30
    wanted = json.loads((SHARED / "data" / "dbrx" / "tokenizer.json").read_text())["model"]
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in wanted["merges"]]
    assert [tuple(merge) for merge in made_of_it["merges"]] == pairs
    assert {t: n for t, n in made_of_it["vocab"].items() if n < 100256} == {
        t: n for t, n in wanted["vocab"].items() if n < 100256
    }


WHOLE = written(BYTES)
HOSTILE = {
    "empty": (b"", "256 bytes"),
    "text": (b"not a vocabulary\n", "base64|no token and its rank"),
    "a byte missing": (written(BYTES[:-1]), "256 bytes"),
    "a token twice": (WHOLE + base64.b64encode(b"a") + b" 256\n", "given twice"),
    "a rank twice": (WHOLE + b"YWI= 255\n", "out of order"),
    "a rank left out": (WHOLE + b"YWI= 257\n", "out of order"),
    "a negative rank": (WHOLE + b"YWI= -1\n", "no token and its rank"),
    "a rank of a million digits": (WHOLE + b"YWI= " + b"9" * 10**6 + b"\n", "no token and its rank"),
    "no base64": (WHOLE + b"Y!!! 256\n", "no base64"),
    "an empty token": (WHOLE + b" 256\n", "no token and its rank"),
    "a token of a kilobyte": (WHOLE + base64.b64encode(b"a" * 1024) + b" 256\n", "no token and its rank"),
    "too much to join": (
        WHOLE + b"".join(base64.b64encode(n.to_bytes(256, "big") or b"") + b" %d\n" % (256 + n) for n in range(1000)),
        "one too many",
    ),
    "too many lines": (b"\n" * (MAX_TOKENS + 1), "more than"),
    "too large": (bytes(17 << 20), "limit"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_vocabularies(tmp_path, name):
    data, words = HOSTILE[name]
    (tmp_path / "x.tiktoken").write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        read_tiktoken(tmp_path / "x.tiktoken")
    assert "x.tiktoken" in caught.value.message
    assert caught.value.message.isprintable()


def test_special_tokens_beyond_the_model(tmp_path):
    config = {"added_tokens_decoder": {"999999999": {"content": "<|end|>", "special": True}}}
    with pytest.raises(InputError, match="1,000,000,000 tokens"):
        made(tmp_path, WHOLE, config)
