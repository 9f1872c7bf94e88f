"""kill -9 at any moment of a saved conversation."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from saved_sessions import IDENTITY, WORDS, Box, bits, fresh, new_tokens, say, session_with
from support import ROOT, needs_shared

from lmx.core.saved_session import SavedSession

pytestmark = needs_shared

CHILD = """
import sys
from pathlib import Path
from saved_sessions import IDENTITY, WORDS, Box, say
from lmx.core.saved_session import SavedSession
session = Box(sys.argv[1]).chat()
session.save_to(SavedSession.create(Path(sys.argv[2]), "a", IDENTITY))
for words in WORDS[:2]:
    say(session, words)
for event in session.ask(WORDS[2]):
    print(type(event).__name__, flush=True)
print("done", flush=True)
sys.stdin.read()
"""


MOMENTS = [("falcon_mamba", "PromptProcessed"), ("mixtral", "Token"), ("falcon_mamba", "Finished"), ("mixtral", "done")]


@pytest.mark.parametrize(("family", "after"), MOMENTS)
def test_kill_9_costs_at_most_the_answer_that_was_being_given(family: str, after: str, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), family, str(tmp_path)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    with child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == after:
                break
        child.send_signal(signal.SIGKILL)
    box = Box(family)
    with box.engine:
        through = session_with(box, WORDS[: 3 if after in ("Finished", "done") else 2])
        resumed = box.chat()
        resumed.resume(SavedSession.open(tmp_path, "a", IDENTITY))
        if after not in ("Finished", "done"):
            assert [message.content for message in resumed.messages[-1:]] == [WORDS[2]], "what was asked is not lost"
            resumed.undo()
        assert (resumed.messages, resumed.ids) == (through.messages, through.ids)
        kept = through._keeper.live.length  # type: ignore[union-attr]
        expected, continued = say(through, WORDS[3]), say(resumed, WORDS[3])
        assert (continued.token_ids, continued.logprobs) == (expected.token_ids, expected.logprobs)
        assert continued.computed_prompt_tokens == new_tokens(resumed, kept)
        assert bits(resumed) == bits(through)
        assert continued.token_ids == fresh(box, resumed).token_ids
        resumed.detach()


@pytest.mark.parametrize("family", ["falcon_mamba", "mixtral"])
def test_whatever_was_on_the_disk_when_it_ended_can_be_continued(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder as it was before and after each write that must last, and each such copy opened as a session."""
    box, folder, copies = Box(family), tmp_path / "now" / "a", tmp_path / "copies"
    sync, replace = os.fsync, Path.replace

    def keep() -> None:
        shutil.copytree(folder, copies / f"{len(list(copies.iterdir())):03}" / "a")

    def synced(descriptor: int) -> None:
        keep()
        sync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        keep()
        return replace(path, target)

    copies.mkdir()
    with box.engine:
        session = box.chat()
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", synced)
            patched.setattr(Path, "replace", replaced)
            session.save_to(SavedSession.create(tmp_path / "now", "a", IDENTITY))
            for words in WORDS[:2]:
                say(session, words)
            session.undo()
            say(session, WORDS[2])
        session.detach()
        lengths = []
        for copy in sorted(copies.iterdir()):
            if not (copy / "a" / "session.jsonl").exists():
                continue  # killed before there was a session: nothing was said yet
            resumed = box.chat()
            resumed.resume(SavedSession.open(copy, "a", IDENTITY))
            if resumed.waiting:
                resumed.undo()
            lengths.append(len(resumed.turns))
            kept = resumed.turns[-1].held if resumed.turns else 0
            finished = say(resumed, WORDS[3])
            assert finished.computed_prompt_tokens == new_tokens(resumed, kept)
            assert finished.token_ids == fresh(box, resumed).token_ids
            resumed.detach()
        assert len(lengths) >= 12
        assert sorted(set(lengths)) == [0, 1, 2]
