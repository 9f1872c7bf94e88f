"""From what is said next to the tokens that follow those in the state, at a cost that does not grow with the turns.

Templates render whole conversations. Most write each turn without a look at those long before it, so that the last
turn and the new message, rendered as a conversation of their own, end as the whole one would. `TurnEncoder` relies on
this only as far as it can be seen to hold: in the short rendering the earlier prompt must stand unchanged before the
answer, the template's opening must be what it was, and whenever the number of turns is a power of two the whole
conversation is rendered and compared. What a turn costs is then constant on average.

The tokens of an answer stay as the model produced them if the rendering says the same after the same prompt. If it does
not (a template that removes reasoning or strips white space, an answer cut at a stop string), the new tokens are those
of the rendering, and their caller takes the state back to where the two part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmx.core.conversation import Message, Turn, path_of

if TYPE_CHECKING:
    from lmx.core.text import types
    from lmx.core.text.types import EncodedChat, TextCodec

_ANCHOR_TOKENS = 8  # before an answer, so that its first space is decoded as in one text


@dataclass(frozen=True)
class Prompt:
    """The tokens to answer: the first `start` of the turn before and then new ones. text_start, text: as in `Turn`."""

    ids: list[int]
    start: int
    text_start: int
    text: str
    system_merged: bool


class TurnEncoder:
    """Encodes one new message after another."""

    def __init__(self, codec: "TextCodec", stop_ids: frozenset[int]) -> None:
        self._codec = codec
        self._stop_ids = stop_ids
        self._openings: dict[str | None, str | None] = {}  # by system's message; None where turns are not independent

    def encode(
        self, head: Turn | None, head_ids: Sequence[int], system: str | None, left_out: int, added: Sequence[Message]
    ) -> Prompt:
        """The prompt of `added`, which ends with a user's message, behind `head`, whose tokens are `head_ids`.

        left_out: messages from the beginning that the model shall not read. Raises as `TextCodec.encode_chat`.
        """
        read = head if head is not None and head.was_read else None
        local = None if read is None else self._local(read, head_ids, system, left_out, added)
        if local is not None and not _is_power_of_two(len(path_of(head)) + 1):
            return local
        before = [] if head is None else head.all_messages()
        encoded = self._encoded([*_system(system), *before[left_out:], *added])
        if read is not None and local is not None:
            if encoded.text[: read.text_length] == read.all_text() and encoded.text[read.text_length :] == local.text:
                return local
            self._openings[system] = None
        ids = None if read is None else self._kept(read, head_ids, read.all_text(), encoded)
        ids = encoded.ids if ids is None else ids
        return Prompt(ids, common_prefix(head_ids, ids), 0, encoded.text, encoded.system_merged)

    def _local(
        self, head: Turn, head_ids: Sequence[int], system: str | None, left_out: int, added: Sequence[Message]
    ) -> Prompt | None:
        """The prompt by the last turn alone; None where that cannot be relied on."""
        last = head.messages[-2:]
        if [message.role for message in (*last, *added)] != ["user", "assistant", "user"]:
            return None
        if (head.system, head.left_out) != (system, left_out):
            return None
        opening = self._opening(head, system)
        if opening is None:
            return None
        question = self._encoded([*_system(system), last[0]])
        short = self._encoded([*_system(system), *last, *added])
        if not (question.text.startswith(opening) and short.text.startswith(question.text)):
            return None
        text = short.text[len(question.text) :]
        ids = self._kept(head, head_ids, question.text, short)
        if ids is not None:
            return Prompt(ids, len(head_ids) - self._ends_by_token(head), head.text_length, text, short.system_merged)
        if short.ids[: len(question.ids)] != question.ids:
            return None
        ids = [*head_ids[: head.prompt_length], *short.ids[len(question.ids) :]]
        return Prompt(
            ids, common_prefix(head_ids, ids, head.prompt_length), head.text_length, text, short.system_merged
        )

    def _opening(self, head: Turn, system: str | None) -> str | None:
        """What the template writes before the first user's words; None where `head` was not rendered behind it."""
        if system not in self._openings:
            one, other = (self._encoded([*_system(system), Message("user", text)]).text for text in ("a", "b"))
            opening = one[: common_prefix(one, other)]
            self._openings[system] = opening if head.all_text().startswith(opening) else None
        return self._openings[system]

    def _kept(self, head: Turn, head_ids: Sequence[int], prompt_text: str, encoded: "EncodedChat") -> list[int] | None:
        """The tokens that are there, and what the template puts behind them, if it says what they say."""
        if encoded.reply_end is None or encoded.reply_end_char is None or not encoded.text.startswith(prompt_text):
            return None
        if encoded.text[len(prompt_text) : encoded.reply_end_char] != self._answer_text(head, head_ids):
            return None
        # The stop token was never fed. The template says whether it stands after the answer.
        kept = len(head_ids) - self._ends_by_token(head)
        return [*head_ids[:kept], *encoded.ids[encoded.reply_end :]]

    def _ends_by_token(self, head: Turn) -> bool:
        return head.start + len(head.ids) > head.prompt_length and head.ids[-1] in self._stop_ids

    def _answer_text(self, head: Turn, head_ids: Sequence[int]) -> str:
        """The answer's tokens as the text that they are behind their prompt."""
        anchor = list(head_ids[max(0, head.prompt_length - _ANCHOR_TOKENS) : head.prompt_length])
        answer = head_ids[head.prompt_length : len(head_ids) - self._ends_by_token(head)]
        before = self._codec.decode(anchor, skip_special_tokens=False)
        both = self._codec.decode([*anchor, *answer], skip_special_tokens=False)
        return both[len(before) :] if both.startswith(before) else self._codec.decode(answer)

    def _encoded(self, messages: Sequence[Message]) -> "EncodedChat":
        return self._codec.encode_chat([_plain(message) for message in messages])


def common_prefix(a: Sequence[object], b: Sequence[object], known: int = 0) -> int:
    """How many items two sequences begin with alike; that `known` of them are equal need not be looked at."""
    end = min(len(a), len(b))
    return next((n for n in range(known, end) if a[n] != b[n]), end)


def _system(text: str | None) -> list[Message]:
    return [] if text is None else [Message("system", text)]


def _plain(message: Message) -> "types.Message":
    return {"role": message.role, "content": message.content}


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
