"""A vocabulary of tiktoken, read with limits, and what the hub's tokenizer.json needs of it. Imports no torch.

A line is a token in base64 and its rank, which is its id; text is cut by the regular expression of cl100k_base and
its pieces are joined by rank. What a file does not say are the special tokens: they stand in tokenizer_config.json,
and cl100k_base has some of its own (https://github.com/openai/tiktoken/blob/main/tiktoken_ext/openai_public.py).
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lmx.convert.gguf_header import Value as Key
from lmx.convert.gguf_vocabulary import DAMAGED, TokenType
from lmx.core.errors import InputError
from lmx.core.files import quoted, read_bounded
from lmx.core.text.files import AddedToken

SUFFIX = ".tiktoken"
LIMIT_BYTES = 16 << 20
MAX_TOKENS = 1 << 19
_MAX_TOKEN = 256  # bytes; the longest of cl100k_base has 128
_MAX_WORK = 10_000_000  # looks into the table: at most the square of each length; cl100k_base: 5,800,000
_BYTES = 256
_CL100K = 100256
CL100K_SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
# DBRX's: https://github.com/mosaicml/llm-foundry/blob/main/llmfoundry/tokenizers/tiktoken.py
DBRX_SPECIAL = {"<|pad|>": 100277, "<|im_start|>": 100278, "<|im_end|>": 100279}
_NAMED = dict.fromkeys(("bos", "eos", "unknown"), "<|endoftext|>") | {"padding": "<|pad|>"}


@dataclass(frozen=True)
class TiktokenModel:
    """Tokens by rank, in the order of their ranks."""

    ranks: Mapping[bytes, int]

    @property
    def special(self) -> dict[str, int]:
        """The special tokens of DBRX, if this is its vocabulary; those of another one stand beside it."""
        return CL100K_SPECIAL | DBRX_SPECIAL if len(self.ranks) == _CL100K else {}

    def gguf_keys(self, added: Mapping[int, AddedToken]) -> dict[str, Key]:
        """The same in a GGUF's words, which `gguf_vocabulary.tokenizer_files` understands. added: tokens by their ids.

        Two ways to cut text have the expression of cl100k_base; with the second, a piece that is a token is taken as
        it is, as tiktoken does: it makes a difference where joining would not get there.
        """
        texts = [_spelled(token) for token in self.ranks]
        merges = [f"{_spelled(left)} {_spelled(right)}" for left, right in _merges(self.ranks)]
        whole = len(merges) == len(texts) - _BYTES
        types = [int(TokenType.NORMAL)] * len(texts)
        for number in range(len(texts), 1 + max(added, default=-1)):
            token = added.get(number)
            texts.append(f"[PAD{number}]" if token is None else token.content)
            types.append(int(_type(token)))
        ids = {token.content: number for number, token in added.items()}
        named = {key: ids[token] for key, token in _NAMED.items() if token in ids}
        return {
            **{f"tokenizer.ggml.{key}_token_id": number for key, number in named.items()},
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "dbrx" if whole else "llama-bpe",
            "tokenizer.ggml.tokens": [*texts],
            "tokenizer.ggml.token_type": [*types],
            "tokenizer.ggml.merges": [*merges],
        }


def read_tiktoken(path: Path) -> TiktokenModel:
    """Read a vocabulary. Raises NotFoundError where there is none, and InputError where it is too large or damaged."""
    where = quoted(str(path))
    try:
        return TiktokenModel(_parse(read_bounded(path, LIMIT_BYTES)))
    except ValueError as error:
        raise InputError(f"{where} is no vocabulary of tiktoken: {error}", DAMAGED) from error


def _parse(data: bytes) -> dict[bytes, int]:
    if data.count(b"\n") > MAX_TOKENS:
        raise ValueError(f"it has more than {MAX_TOKENS:,} lines")
    ranks: dict[bytes, int] = {}
    work = 0
    for number, line in enumerate(data.splitlines()):
        token, rank = _line(line, number)
        work += len(token) ** 2
        if rank != len(ranks) or token in ranks or work > _MAX_WORK:
            raise ValueError(f"line {number + 1} is out of order, given twice or one too many")
        ranks[token] = rank
    if sum(len(token) == 1 for token in ranks) != _BYTES:
        raise ValueError(f"it has no token for each of the {_BYTES} bytes")
    return ranks


def _line(line: bytes, number: int) -> tuple[bytes, int]:
    encoded, _, rank = line.partition(b" ")
    try:
        token = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"line {number + 1} has no base64") from error
    if not 0 < len(token) <= _MAX_TOKEN or not rank.isdigit() or len(rank) > 9:
        raise ValueError(f"line {number + 1} is no token and its rank")
    return token, int(rank)


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two parts that each token is joined of: what joining by rank leaves of its bytes just before.

    One pair a token is enough: whatever stands around it, its own bytes are joined in the same order. A token that
    joining does not reach has none.
    """
    for token, rank in ranks.items():
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            lowest = min(found)
            if lowest >= rank:
                break
            at = found.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _type(token: AddedToken | None) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    return TokenType.CONTROL if token.special else TokenType.USER_DEFINED


def _letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it can be printed, else one from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(_BYTES) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


_LETTERS = _letters()


def _spelled(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)
