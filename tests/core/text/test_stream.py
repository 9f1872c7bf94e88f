"""Streaming against full decoding, over every tokenizer at hand."""

import random
from collections.abc import Callable, Sequence

import pytest

from lmx.core.text.stream import TextStream
from lmx.core.text.tokenizer import Tokenizer

Load = Callable[[str], Tokenizer]
TEXTS = [
    "Hello world, how are you?",
    "  two  spaces\n\n\tand a tab ",
    "🦙🚀 emoji 👩‍👩‍👧 and 生活, жизнь, ជីវិត",
    "a genuine \ufffd replacement\ufffd\ufffd character\ufffd",
    "\ufffd",
    " ",
    "naïve café " * 30,
]


def run(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> list[str]:
    stream = tokenizer.stream(context)
    return [*(stream.push(i) for i in ids), stream.flush()]


def beyond(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> str:
    """What the full decoding has beyond the context's."""
    shown, full = tokenizer.decode(context), tokenizer.decode([*context, *ids])
    differs = [i for i, (a, b) in enumerate(zip(shown, full, strict=False)) if a != b]
    return full[min([len(shown), *differs]) :]


@pytest.mark.parametrize("text", TEXTS)
def test_encoded_text_comes_back_piece_by_piece(kind: str, text: str, tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    pieces = run(tokenizer, (), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_random_ids_stream_to_the_full_decoding(kind: str, tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of(kind)
    rng = random.Random(7)
    size = tokenizer.info.vocab_size
    rare = [*tokenizer.info.byte_ids, *tokenizer.info.hidden_ids, *tokenizer.encode("�🦙  \n")] or [0]
    for _ in range(60):
        count = rng.randrange(0, 70)
        ids = [rng.choice(rare) if rng.random() < 0.5 else rng.randrange(size) for _ in range(count)]
        split = rng.randrange(0, count + 1)
        context, reply = ids[:split], ids[split:]
        assert "".join(run(tokenizer, (), ids)) == tokenizer.decode(ids)
        assert "".join(run(tokenizer, context, reply)) == beyond(tokenizer, context, reply)


def test_random_bytes_of_characters_stream_to_the_full_decoding(kind: str, tokenizer_of: Load) -> None:
    """Cut-up characters: single-byte tokens of real and of broken UTF-8."""
    tokenizer = tokenizer_of(kind)
    rng = random.Random(11)
    alphabet = tokenizer.encode("ÿ🦙é生a ") + tokenizer.encode("\u0300\u0fff\ufffd")
    for _ in range(60):
        ids = rng.choices(alphabet, k=rng.randrange(1, 50))
        split = rng.randrange(0, len(ids))
        assert "".join(run(tokenizer, (), ids)) == tokenizer.decode(ids)
        context, reply = ids[:split], ids[split:]
        assert "".join(run(tokenizer, context, reply)) == beyond(tokenizer, context, reply)


@pytest.mark.parametrize("name", ["metaspace", "prepend"])
def test_a_leading_space_after_the_context_is_kept(name: str, tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of(name)
    hello, both = tokenizer.encode("Hello"), tokenizer.encode("Hello fox")
    assert both[: len(hello)] == hello
    assert "".join(run(tokenizer, hello, both[len(hello) :])) == " fox"
    assert "".join(run(tokenizer, (), both)) == "Hello fox"


def test_a_half_character_waits_for_its_end(tokenizer_of: Load) -> None:
    for name in ("byte-level", "metaspace"):
        tokenizer = tokenizer_of(name)
        ids = tokenizer.encode("🦙!", add_special_tokens=False)
        pieces = run(tokenizer, (), ids)
        assert "".join(pieces) == "🦙!"
        assert pieces[0] == ""


def test_a_real_replacement_character_is_not_lost(tokenizer_of: Load) -> None:
    for name in ("byte-level", "metaspace"):
        tokenizer = tokenizer_of(name)
        assert "".join(run(tokenizer, (), tokenizer.encode("a\ufffdb\ufffd"))) == "a\ufffdb\ufffd"


def test_a_byte_run_that_turns_invalid_is_shown_as_decoded() -> None:
    """The library's ByteFallback shows a run as characters only if the whole run is valid."""
    from tokenizers import decoders

    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    names = ["<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "x"]
    stream = TextStream(lambda ids: decoder.decode([names[i] for i in ids]), byte_ids={0, 1, 2, 3})
    assert [stream.push(i) for i in (0, 1, 2, 4)] == ["", "", "", "€x"]
    assert [stream.push(i) for i in (0, 1, 2, 3, 4)] == ["", "", "", "", "\ufffd" * 4 + "x"]


def test_the_cost_of_a_token_does_not_grow_with_the_reply() -> None:
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return "".join(chr(97 + i) for i in ids)

    stream = TextStream(decode, range(20))
    assert "".join(stream.push(i % 20) for i in range(5000)) == "".join(chr(97 + i % 20) for i in range(5000))
    assert decoded < 5000 * 20


def test_flush_can_be_called_on_nothing_and_twice(tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of("byte-level")
    stream = tokenizer.stream()
    assert stream.flush() == ""
    first = tokenizer.encode("🦙")[0]
    assert stream.push(first) == ""
    assert stream.flush() == tokenizer.decode([first])
    assert stream.flush() == ""
