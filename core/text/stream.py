"""Incremental decoding: text as the tokens arrive, never half a character, never a lost space."""

from collections.abc import Callable, Collection, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_WINDOW = 16
# An unfinished UTF-8 character is at most three bytes, and a token that shows is at least one.
_KEPT_TOKENS = 4


class TextStream:
    """Turns one token after another into text.

    The pieces of all `push` calls and the last `flush`, joined, are what `decode(context_ids + ids)` has beyond
    `decode(context_ids)`. Only a window of the last tokens is decoded, so a token costs the same at any length.

    Why pieces may wait: byte-level vocabularies cut characters anywhere, and an unfinished one decodes to a closing
    U+FFFD (a real U+FFFD waits for one token, too). In byte-fallback vocabularies a whole run of `<0x..>` tokens is
    text only if all of it is valid UTF-8, so a run is shown when it ends.

    Example, byte-fallback ids for "Hi", "▁", "<0xE2>", "<0x82>", "<0xAC>", "!" pushed one by one:
    "Hi", " ", "", "", "", "€!".
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        context_ids: Sequence[int] = (),
        *,
        byte_ids: Collection[int] = frozenset(),
        hidden_ids: Collection[int] = frozenset(),
    ) -> None:
        """Start after `context_ids`.

        `decode` turns ids to text, leaving out `hidden_ids` (control tokens and ids without a token); `byte_ids` are
        the tokens that its decoder joins as raw bytes.
        """
        self._decode = decode
        self._byte_ids = byte_ids
        self._hidden_ids = hidden_ids
        self._window, self._shown = self._anchor(context_ids)

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now, often one piece, sometimes none."""
        if token_id in self._hidden_ids:
            return ""
        self._window.append(token_id)
        if token_id in self._byte_ids:
            return ""
        piece = self._show(_certain(self._decode(self._window)))
        if len(self._window) > _LONGEST_WINDOW:
            self._shorten()
        return piece

    def flush(self) -> str:
        """The text still held back, an unfinished character as U+FFFD; call it once no token follows."""
        return self._show(self._decode(self._window)) if self._window else ""

    def _show(self, text: str) -> str:
        if self._shown.startswith(text):
            return ""
        # The context may end within a character that the reply completes: then its U+FFFD is not shared.
        shared = len(self._shown) if text.startswith(self._shown) else _shared_length(self._shown, text)
        self._shown = text
        return text[shared:]

    def _shorten(self) -> None:
        """Forget all but the last tokens. What came before them cannot change what follows (see the class)."""
        window = self._window[-_KEPT_TOKENS:]
        shown = _certain(self._decode(window))
        if shown:  # a decoder strips the space that opens a text: something must stand before the next token
            self._window, self._shown = window, shown

    def _anchor(self, context_ids: Sequence[int]) -> tuple[list[int], str]:
        """The shortest useful tail of the context, and its text."""
        context = [i for i in context_ids if i not in self._hidden_ids]
        size = 2 * _KEPT_TOKENS
        while True:
            start = max(0, len(context) - size)
            while start > 0 and context[start] in self._byte_ids:
                start -= 1
            window = context[start:]
            shown = self._decode(window) if window else ""
            if shown or start == 0:
                return window, shown
            size *= 2


def _certain(text: str) -> str:
    """`text` without a closing U+FFFD, which may be the beginning of a character."""
    return text.removesuffix(REPLACEMENT)


def _shared_length(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
