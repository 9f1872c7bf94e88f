"""JSON files: reading those that we do not trust, bounded, strict, with errors that name the place; and writing."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, TypeAlias

from lmx.core.errors import InputError
from lmx.core.files import quoted, read_bounded

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"

DEFAULT_LIMIT_BYTES = 16 << 20

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_DAMAGED = "the file is damaged or was edited by hand: repair it, or download it again"


def read_json(path: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> dict[str, JSON]:
    """Read a file that holds one JSON object.

    Raises:
        NotFoundError: there is no such file, or we may not read it.
        InputError: it is larger than `limit_bytes`, no regular file, or `parse_json` refuses it.

    """
    return parse_json(read_bounded(path, limit_bytes), quoted(str(path)))


def parse_json(data: bytes, where: str) -> dict[str, JSON]:
    """Parse one JSON object, as `parse_value` parses any value. Raises InputError."""
    value = parse_value(data, where)
    if not isinstance(value, dict):
        raise InputError(f"{where} holds a JSON {type(value).__name__}, not an object", _DAMAGED)
    return value


def parse_value(data: bytes, where: str) -> JSON:
    """Parse one JSON value (RFC 8259, UTF-8); `where` stands for its origin in errors.

    Stricter than `json.loads`: no duplicate keys, no NaN or infinity (spelled out or by overflow), no half of a
    surrogate pair (such a string could never be written again).

    Raises:
        InputError: naming `where` and, for syntax errors, line and column.

    """
    try:
        text = data.decode("utf-8")
        value: JSON = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start:,})", _DAMAGED) from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half of a surrogate pair", _DAMAGED) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where} is not valid JSON: {error.msg} ({place})", _DAMAGED) from error
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply", _DAMAGED) from error
    except ValueError as error:  # from our hooks, or a number of thousands of digits
        raise InputError(f"{where} is not acceptable JSON: {error}", _DAMAGED) from error
    return value


def to_json(value: Mapping[str, object]) -> bytes:
    """A JSON file as the hub writes its own."""
    return (json.dumps(value, indent=2) + "\n").encode()


def _unique_keys(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {quoted(twice)} stands twice in one object")
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value
