"""Files of sentencepiece's for tests: trained by it, or put together field by field."""

import io
import struct
from collections.abc import Iterable

import sentencepiece
from text_folders import CORPUS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def trained(**options) -> bytes:
    """A BPE model in the way of Mistral's or Gemma's, trained on a few lines."""
    sizes = {"vocab_size": 420, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    kind = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99, "split_digits": True}
    spaces = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, **(sizes | kind | spaces | options)
    )
    return out.getvalue()


GEMMA = {
    "add_dummy_prefix": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "pad_piece": "<pad>",
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
    "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁▁", "<h1>"],
}


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | float | bytes | str) -> bytes:
    """A field of a message: a varint, a float of 32 bits, or bytes."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value % (1 << 64))
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def piece(text: str | bytes, score: float = 0.0, kind: int = NORMAL) -> bytes:
    return field(1, field(1, text) + field(2, score) + field(3, kind))


SPECIAL = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
TRAINER = {3: 2, 35: 1}
NORMALIZER = {1: "identity", 3: 1, 4: 0, 5: 1}


def message(fields: dict[int, int | float | bytes | str]) -> bytes:
    return b"".join(field(number, value) for number, value in fields.items())


def model(pieces: Iterable[tuple[str, float, int]], trainer=TRAINER, normalizer=NORMALIZER) -> bytes:
    """A tokenizer.model of these pieces, after the special ones and the bytes."""
    body = b"".join(piece(*item) for item in [*SPECIAL, *BYTES, *pieces])
    return body + field(2, message(trainer)) + field(3, message(normalizer))
