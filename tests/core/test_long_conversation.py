"""A conversation that goes on and on: memory within its bound, and a turn that costs what the first ones did."""

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch
from measured import RSS_UNIT
from support import SHARED, needs_shared

from lmx.core.answer import Finished
from lmx.core.checkpoint import Checkpoint
from lmx.core.loader import load_model
from lmx.core.sampling import Sampling
from lmx.core.saved_session import SavedSession
from lmx.core.session import ChatSession
from lmx.core.session_record import Identity
from lmx.core.text.engine import TextEngine

BOUND = 1 << 20
STATES = 2 << 20
QUESTIONS = ("My name is Ada.", "What is 3 + 4?", "What is the capital of Japan?", "Hello")


@dataclass
class Measured:
    """One turn: seconds of this process's CPU time, and how many of the prompt's tokens were computed."""

    seconds: float
    computed: int


def talk(session: ChatSession, turns: int) -> list[Measured]:
    measured = []
    for turn in range(turns):
        start = time.process_time()
        finished = list(session.ask(QUESTIONS[turn % len(QUESTIONS)]))[-1]
        taken = time.process_time() - start
        assert isinstance(finished, Finished)
        measured.append(Measured(taken, finished.computed_prompt_tokens))
        assert session.snapshot_bytes <= BOUND
    return measured


def resident_bytes() -> int:
    """What this process holds now; where only its peak is known (not on Linux), that."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def converse(turns: int, saved: Path | None) -> None:
    folder = SHARED / "checkpoints" / "falcon_mamba"
    stop_ids = frozenset(json.loads((folder / "expected.json").read_text())["stop_ids"])
    model = load_model(Checkpoint.open(folder), dtype=torch.float32)
    with TextEngine.open(folder, chat=True) as engine:
        session = ChatSession(model, engine, Sampling(), stop_ids=stop_ids, max_new_tokens=12, snapshot_bytes=BOUND)
        if saved is not None:
            session.save_to(SavedSession.create(saved, "long", Identity("m", "r", "s", "t"), state_bytes=STATES))
        talk(session, 40)
        before = resident_bytes()
        measured = talk(session, turns - 40)
        assert len(session.turns) == turns
        assert max(turn.computed for turn in measured) < 40, "no turn reads what was read before"
        assert session._keeper.snapshots.nbytes > BOUND * 3 // 4, "the bound was reached"
        # The tokens and texts of a thousand turns are some megabytes; their states would be 100 MB
        assert resident_bytes() - before < (24 << 20)
        tenth = len(measured) // 10
        first, last = (median(turn.seconds for turn in part) for part in (measured[:tenth], measured[-tenth:]))
        assert last < 1.5 * first, f"{first * 1e3:.1f} ms a turn became {last * 1e3:.1f} ms"
        if saved is not None:
            states = [path.stat().st_size for path in (saved / "long").glob("turn-*.safetensors")]
            assert STATES // 2 < sum(states) <= STATES
            session.detach()


@needs_shared
def test_two_hundred_turns(tmp_path: Path) -> None:
    converse(200, tmp_path)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("is_saved", [False, True], ids=["in memory", "saved"])
def test_a_thousand_turns(is_saved: bool, tmp_path: Path) -> None:
    converse(1000, tmp_path if is_saved else None)
