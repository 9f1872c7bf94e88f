"""What to leave out where a conversation no longer fits its model's context: the oldest turns, as few as will do."""

from collections.abc import Iterator, Sequence

from lmx.core.conversation import Message, Turn

_FRAME_CHARACTERS = 20  # what a template writes around a message, about


def first_kept(
    turns: Sequence[Turn], left_out: int, added: Sequence[Message], tokens: int, wanted_tokens: int
) -> Iterator[int]:
    """How many messages to leave out from the beginning, more and more, until `wanted_tokens` may be enough.

    turns: the conversation; `left_out` of its messages are left out already, and with the others and `added` it has
    `tokens` tokens. What a turn takes of them is estimated by its characters. The first candidate is the estimate;
    those after it leave out one more turn each, up to all of them.
    """
    ends = [0]
    for turn in turns:
        ends.append(ends[-1] + len(turn.messages))
    sizes = [_size(turn.messages) for turn in turns]
    kept = [size for size, end in zip(sizes, ends[1:], strict=True) if end > left_out]
    a_token = (sum(kept) + _size(added)) / max(1, tokens)
    excess = (tokens - wanted_tokens) * a_token
    for size, end in zip(sizes, ends[1:], strict=True):
        if end <= left_out:
            continue
        excess -= size
        if excess <= 0 or end == ends[-1]:
            yield end


def _size(messages: Sequence[Message]) -> int:
    return sum(len(message.content) + _FRAME_CHARACTERS for message in messages)
