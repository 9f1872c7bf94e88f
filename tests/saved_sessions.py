"""Trained checkpoints to talk with, and what is asked of conversations that are kept."""

import json

import torch
from support import SHARED

from lmx.core.answer import Finished
from lmx.core.checkpoint import Checkpoint
from lmx.core.loader import load_model
from lmx.core.sampling import Sampling
from lmx.core.session import ChatSession
from lmx.core.session_record import Identity
from lmx.core.text.engine import TextEngine

FAMILIES = ("dbrx", "falcon_mamba", "mixtral", "olmoe", "recurrent_gemma")
IDENTITY = Identity("model", "r1", "float32", "t1")
WORDS = ("Hello!", "My name is Ada.", "What is my name?", "Say it again, please.", "Thank you.")


class Box:
    """A trained checkpoint and conversations with it."""

    def __init__(self, family: str) -> None:
        folder = SHARED / "checkpoints" / family
        self.model = load_model(Checkpoint.open(folder), dtype=torch.float32)
        self.engine = TextEngine.open(folder, chat=True)
        self.stop_ids = frozenset(json.loads((folder / "expected.json").read_text())["stop_ids"])

    def chat(self, **options: int) -> ChatSession:
        options = {"max_new_tokens": 24} | options
        return ChatSession(self.model, self.engine, Sampling(), stop_ids=self.stop_ids, **options)  # type: ignore[arg-type]


def say(session: ChatSession, words: str) -> Finished:
    return last(session.ask(words))


def last(events: object) -> Finished:
    finished = list(events)[-1]  # type: ignore[call-overload]
    assert isinstance(finished, Finished)
    return finished


def fresh(box: Box, session: ChatSession, most: int = 24) -> Finished:
    """The last answer by a session that reads the whole conversation at once."""
    other = box.chat(max_new_tokens=most)
    other.load_messages(session.messages[:-1])
    finished = last(other.answer())
    assert finished.computed_prompt_tokens == finished.prompt_tokens
    return finished


def bits(session: ChatSession) -> list[bytes]:
    state = session._keeper.live
    assert state is not None
    tensors = [tensor for layer in state.layers for tensor in layer.tensors(state.length).values()]
    return [tensor.contiguous().numpy().tobytes() for tensor in tensors]


def new_tokens(session: ChatSession, kept: int) -> int:
    """Tokens of the last prompt behind the first `kept`; at least one has to be fed for its logits."""
    return len(session.prompt_ids) - min(kept, len(session.prompt_ids) - 1)


def session_with(box: Box, words: tuple[str, ...]) -> ChatSession:
    session = box.chat()
    for text in words:
        say(session, text)
    return session
