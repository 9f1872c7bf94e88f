"""Conversations to token ids: template, system role, and the tokens that only a template may write."""

from collections.abc import Callable, Sequence

from tokenizers import Encoding

from lmx.core.errors import InputError
from lmx.core.text.controls import ControlTokens, StandIns
from lmx.core.text.template import ChatTemplate
from lmx.core.text.types import EncodedChat, Message, TemplateError

ROLES = ("system", "developer", "user", "assistant", "tool")
_SYSTEM_PROBE = "lmxsystemprobe"


class ChatEncoder:
    """Renders conversations and encodes them with the sealed copy of the tokenizer (see `lmx.core.text.controls`)."""

    def __init__(
        self, template: ChatTemplate, controls: ControlTokens, encode: Callable[[str], tuple[Encoding, list[int]]]
    ) -> None:
        """`encode` gives the sealed copy's encoding of a sealed text, and its ids in the tokenizer's own numbers."""
        self._template = template
        self._controls = controls
        self._encode = encode

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> EncodedChat:
        """See `TextCodec.encode_chat`. Raises `InputError`, `TemplateError`."""
        check_messages(messages)
        stand_ins = StandIns(message["content"] for message in messages)
        escaped = self._escape(messages, stand_ins)
        escaped, rendered, merged = self._render(escaped, add_generation_prompt)
        sealed = self._seal(rendered, stand_ins)
        encoding, ids = self._encode(sealed)
        place = self._reply_place(escaped, rendered, add_generation_prompt, stand_ins)
        end = None if place is None else self._border(rendered, place, sealed, encoding, stand_ins)
        end_char = None if place is None or end is None else len(stand_ins.restore(rendered[:place]))
        return EncodedChat(stand_ins.restore(rendered), ids, end, end_char, merged)

    def _border(self, rendered: str, place: int, sealed: str, encoding: Encoding, stand_ins: StandIns) -> int | None:
        """The token that begins at a place of the rendering, if one does."""
        before, after = self._seal(rendered[:place], stand_ins), self._seal(rendered[place:], stand_ins)
        return _token_border(encoding, len(before)) if before + after == sealed else None

    def _escape(self, messages: Sequence[Message], stand_ins: StandIns) -> list[Message]:
        return [
            Message(role=message["role"], content=self._controls.escape(message["content"], stand_ins))
            for message in messages
        ]

    def _seal(self, rendered: str, stand_ins: StandIns) -> str:
        return stand_ins.restore(self._controls.seal(rendered))

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> tuple[list[Message], str, bool]:
        """The messages as rendered, the rendering, and whether the system text went into the first user turn."""
        mergeable = len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user"
        try:
            rendered = self._template.render(messages, add_generation_prompt)
        except TemplateError as error:
            if error.refusal is None or not mergeable:
                raise
            return self._render_merged(messages, add_generation_prompt, error)
        if mergeable and self._drops_system(messages, rendered):
            return self._render_merged(messages, add_generation_prompt, None)
        return messages, rendered, False

    def _render_merged(
        self, messages: list[Message], add_generation_prompt: bool, refusal: TemplateError | None
    ) -> tuple[list[Message], str, bool]:
        first = Message(role="user", content=messages[0]["content"] + "\n\n" + messages[1]["content"])
        merged = [first, *messages[2:]]
        try:
            return merged, self._template.render(merged, add_generation_prompt), True
        except TemplateError as error:
            raise refusal or error from error

    def _drops_system(self, messages: list[Message], rendered: str) -> bool:
        """Whether the template leaves the system text out without a word (some published ones do)."""
        if messages[0]["content"].strip() in rendered:
            return False
        probe = [Message(role="system", content=_SYSTEM_PROBE), *messages[1:]]
        return _SYSTEM_PROBE not in self._template.render(probe, False)

    def _reply_place(
        self, messages: list[Message], rendered: str, add_generation_prompt: bool, stand_ins: StandIns
    ) -> int | None:
        """Where in `rendered` the last assistant message's words end: a mark put there must change nothing else."""
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            return None
        mark = stand_ins.fresh()
        content = messages[last]["content"]
        # First at the very end; a template that trims needs it before the trailing white space
        for end in dict.fromkeys((len(content), len(content.rstrip()))):
            marked = [*messages]
            marked[last] = Message(role="assistant", content=content[:end] + mark + content[end:])
            pieces = self._template.render(marked, add_generation_prompt).split(mark)
            if len(pieces) == 2 and "".join(pieces) == rendered:
                return len(pieces[0])
        return None

    def end_of_turn_id(self) -> int | None:
        """The control token that the template writes right after an assistant's words. Raises `TemplateError`."""
        mark = StandIns(()).fresh()
        turns = [Message(role="user", content="a"), Message(role="assistant", content="b" + mark)]
        pieces = self._template.render(turns, False).split(mark)
        return self._controls.opening_id(pieces[1]) if len(pieces) == 2 else None


def check_messages(messages: Sequence[Message]) -> None:
    """Raise `InputError` unless every message has a known role and a text."""
    hint = 'Messages look like {"role": "user", "content": "Hello"}.'
    if not messages:
        raise InputError("the conversation has no messages", hint)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise InputError(f"message {number} is not made of a role and a content", hint)
        if message["role"] not in ROLES:
            raise InputError(f"message {number} has an unknown role", f"The roles are {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise InputError(f"the content of message {number} is no text", hint)


def _token_border(encoding: Encoding, place: int) -> int | None:
    """The first token that starts at or after the character `place`; None if one reaches across it."""
    for index, (start, end) in enumerate(encoding.offsets):
        if start >= place and end > start:
            return index
        if end > place:
            return None
    return len(encoding.offsets)
