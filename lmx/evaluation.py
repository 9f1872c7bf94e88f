"""What to evaluate a model on, and the check of a quantized model against the one it was made from."""

from pathlib import Path

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, UsageError
from lmx.core.files import quoted, read_bounded
from lmx.core.jsonfile import parse_value
from lmx.core.text.types import TextCodec

DEFAULT_CONTEXT = 2048
"""Tokens of a window, or the model's own context if that is shorter."""

_LIMIT_BYTES = 64 << 20
_IDS_HINT = "write it like [[1, 2, 3], [4, 5]]: a list of token ids a sequence"

Sequences = list[list[int]]


def read_ids(path: Path) -> Sequences:
    """A file with a JSON list of lists of token ids. Raises InputError, NotFoundError."""
    where = quoted(str(path))
    value = parse_value(read_bounded(path, _LIMIT_BYTES), where)
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} holds no list of sequences", _IDS_HINT)
    return [_ids(item, f"{where}, sequence {number}") for number, item in enumerate(value, start=1)]


def _ids(value: object, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int and abs(item) < 1 << 31 for item in value):
        raise InputError(f"{where} is no list of token ids", _IDS_HINT)
    return value


def read_windows(path: Path, codec: TextCodec, context: int | None, longest: int | None) -> Sequences:
    """A text file in windows of `context` tokens, each with BOS first where the tokenizer has one.

    context: None is DEFAULT_CONTEXT; longest: the model's own context, None where it has none.
    Raises InputError, NotFoundError; UsageError for a context beyond the model's.
    """
    from lmx.core.evaluate import windows

    if context is not None and longest is not None and context > longest:
        raise UsageError(f"a context of {context:,} is beyond the model's {longest:,}", "give a shorter --context")
    size = context or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    return windows(codec.encode(read_text(path), add_special_tokens=False), size, codec.info.bos_id)


def read_text(path: Path) -> str:
    """A text file. Raises InputError, NotFoundError."""
    try:
        return read_bounded(path, _LIMIT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{quoted(str(path))} is no text in UTF-8", "give plain text") from error


def check_quantized(
    quantized: Path, base: Checkpoint, text: Path, max_kl: float | None, *, context: int | None = None
) -> float:
    """The distance of a quantized folder from the model it was made from on a text: KL(BASE || MODEL), nats a token.

    Both run on the CPU in the base's dtype; the base's tokenizer serves both, so that the folder needs none yet.
    Raises InputError where the divergence is past `max_kl`; None allows any.
    """
    from lmx.api import load_core
    from lmx.core.evaluate import Evaluation, evaluate
    from lmx.core.text.engine import TextEngine
    from lmx.device import choose_device
    from lmx.dtypes import choose_dtype

    where, dtype = choose_device("cpu"), choose_dtype(None, base)
    reference = load_core(base, None, "causal", None, dtype, where)
    with TextEngine.open(base.folder, keep=base) as codec:
        sequences = read_windows(text, codec, context, reference.context_length)
    model = load_core(Checkpoint.open(quantized), None, "causal", None, dtype, where)
    *_, result = evaluate(model, sequences, reference)
    if not isinstance(result, Evaluation) or result.kl_divergence is None:
        raise TypeError("the last event of a comparison is its result")
    if max_kl is not None and not result.kl_divergence <= max_kl:
        raise InputError(
            f"the KL divergence is {result.kl_divergence:.6f} nats a token, more than {max_kl:g}",
            "keep more of the model (--skip, --8bit); or allow more (--max-kl), which goes on from here",
        )
    return result.kl_divergence
