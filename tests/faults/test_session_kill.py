"""kill -9 at any moment of a saved conversation."""

import os
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
