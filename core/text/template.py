"""Chat templates: Jinja programs that come with a checkpoint, run in Jinja's immutable sandbox.

The environment follows the hub's conventions, https://huggingface.co/docs/transformers/chat_templating_writing.
The sandbox bounds what a template can reach and the size of its output; time and memory are bounded by the process
that it runs in (`lmx.core.text.worker`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lmx.core.text.types import Message, TemplateError

MAX_RENDERED_CHARS = 4 << 20
_MAX_POWER_BITS = 4096
_FIX_TEMPLATE = "Use `lmx generate` for raw text, or repair the checkpoint's chat template."


class ChatTemplate:
    """A compiled chat template with the special tokens that it may write."""

    def __init__(self, source: str, variables: Mapping[str, object]) -> None:
        """Compile `source`; `variables` are `bos_token` and its like. Raises `TemplateError`."""
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # Jinja compiles to Python: SyntaxError, RecursionError and others come through
            raise TemplateError(f"the chat template is malformed: {_one_line(error)}", _FIX_TEMPLATE) from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as text. Raises `TemplateError`; its `refusal` is set if the template said no."""
        pieces = self._template.generate(
            {
                **self._variables,
                "messages": [dict(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
                "tools": None,
                "documents": None,
            }
        )
        try:
            return _join_bounded(pieces)
        except _RefusalError as error:
            reason = _one_line(error)
            hint = "Change the conversation's roles or their order; `lmx generate` takes raw text."
            raise TemplateError(f"the chat template refused: {reason}", hint, refusal=reason) from error
        except Exception as error:  # a template is a program: it can fail with whatever Python raises
            raise TemplateError(f"the chat template failed: {_one_line(error)}", _FIX_TEMPLATE) from error


class _RefusalError(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own class attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses products and powers that would fill the memory in one step."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "*" and _repeats_too_often(left, right):
            raise SecurityError("a repeated text or list would be too long")
        if operator == "**" and _is_huge_power(left, right):
            raise SecurityError("a power would be too large")
        return super().call_binop(context, operator, left, right)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: no HTML escapes, no ASCII escapes unless asked for."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise _RefusalError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _join_bounded(pieces: Iterable[str]) -> str:
    kept: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_RENDERED_CHARS:
            raise jinja2.TemplateRuntimeError(f"it wrote more than {MAX_RENDERED_CHARS >> 20} million characters")
        kept.append(piece)
    return "".join(kept)


def _repeats_too_often(left: object, right: object) -> bool:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int) and len(value) * times > MAX_RENDERED_CHARS:
            return True
    return isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 2 << 16


def _is_huge_power(base: object, exponent: object) -> bool:
    return isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _MAX_POWER_BITS


def _one_line(error: Exception) -> str:
    """A template's message goes to the terminal: one line of printable characters, not too long."""
    text = " ".join((str(error) or type(error).__name__)[:2000].split())
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
