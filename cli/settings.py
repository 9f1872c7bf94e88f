"""`/set`: what of a running chat can be changed, by the names that the options have."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final, cast

from lmx.core.errors import UsageError
from lmx.core.sampling import Sampling
from lmx.core.session import ChatSession, OnFull

_SAMPLING: Final[dict[str, Callable[[str], float]]] = {
    "temperature": float,
    "top-k": int,
    "top-p": float,
    "min-p": float,
    "repeat-penalty": float,
    "presence-penalty": float,
    "frequency-penalty": float,
}
NAMES: Final = (*_SAMPLING, "seed", "max-new-tokens", "stop", "on-full")


def show(session: ChatSession) -> list[str]:
    """Each setting with its value, a line each."""
    values: dict[str, object] = {name: getattr(session.sampling, _field(name)) for name in (*_SAMPLING, "seed")}
    values["max-new-tokens"] = session.max_new_tokens
    values["stop"] = " ".join(map(repr, session.stop_strings)) or None
    values["on-full"] = session.on_full
    return [f"{name} {'none' if value is None else value}" for name, value in values.items()]


def change(session: ChatSession, name: str, value: str) -> None:
    """Set one. Raises UsageError for a name or a value that cannot be."""
    name = name.replace("_", "-")
    if name in _SAMPLING:
        session.sampling = _replaced(session.sampling, _field(name), _number(name, value, _SAMPLING[name]))
    elif name == "seed":
        session.sampling = _replaced(session.sampling, "seed", _or_none(name, value))
    elif name == "max-new-tokens":
        session.max_new_tokens = _or_none(name, value)
    elif name == "stop":
        session.stop_strings = () if value == "none" else (value,)
    elif name == "on-full":
        if value not in ("stop", "drop"):
            raise UsageError(f"on-full is {value}", "give stop or drop")
        session.on_full = cast(OnFull, value)
    else:
        raise UsageError(f"there is no setting {name}", f"the settings are {', '.join(NAMES)}")


def _field(name: str) -> str:
    return name.replace("-", "_")


def _replaced(sampling: Sampling, name: str, value: float | None) -> Sampling:
    return replace(sampling, **{name: value})  # type: ignore[arg-type]  # it checks the types itself


def _number(name: str, value: str, kind: Callable[[str], float]) -> float:
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{name} is {value!r:.40}", "give a number") from None


def _or_none(name: str, value: str) -> int | None:
    if value == "none":
        return None
    number = int(_number(name, value, int))
    if number < 0:
        raise UsageError(f"{name} is {number}", "give 0 or more, or none")
    return number
