"""Every command of the chat, typed in a pseudo-terminal, on a family with attention and on a recurrent one."""

import base64
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, SHARED, needs_shared
from terminal import EDITING, Terminal, closing

pytestmark = needs_shared

STATUS = r"\[[^\]\n]*context [\d,]+[^\]\n]*\]"
Start = Callable[..., Terminal]
Lmx = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Terminal] = []

    def launch(family: str, *args: str, tells_cursor: bool = False, **env: str) -> Terminal:
        model = [str(SHARED / "checkpoints" / family), "--dtype", "fp32", "-n", "40"]
        running.append(Terminal([*model, *args], {"LMX_HOME": str(tmp_path / "home")} | env, tells_cursor=tells_cursor))
        return running[-1]

    with closing(running):
        yield launch


@pytest.fixture
def lmx_at_home(lmx: Lmx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lmx:
    """Commands in this process that see the chats' sessions."""
    monkeypatch.setenv("LMX_HOME", str(tmp_path / "home"))
    return lmx


class Talk:
    """Types a line, waits for the next prompt, and gives what was shown between the two."""

    def __init__(self, terminal: Terminal, prompt: str = EDITING) -> None:
        self.terminal = terminal
        self.prompt = prompt
        terminal.until(prompt)

    @property
    def shown(self) -> str:
        """All that was shown, without the bottom line."""
        return re.sub(r"\n .* MB[^\n]*\Z", "", self.terminal.scrollback.rstrip()).rstrip()

    def type(self, keys: str) -> str:
        before = len(self.shown)
        self.terminal.send(keys)
        self.terminal.until(r"\n")
        self.terminal.until(self.prompt)
        return self.shown[before:]


WITH_BOTTOM_LINE = r" MB[^\n]*\x1b\[\?25h"


@pytest.mark.parametrize("family", ["mixtral", "falcon_mamba"])
def test_every_command(family: str, start: Start, lmx_at_home: Lmx) -> None:
    terminal = start(family, tells_cursor=True)
    talk = Talk(terminal, WITH_BOTTOM_LINE)
    line = talk.type

    def computed(shown: str) -> tuple[int, int]:
        found = re.findall(r"(\d+) of (\d+) prompt tokens computed", shown)
        return int(found[-1][0]), int(found[-1][1])

    shown = line("/help\r")
    documented = re.findall(r"^\| `(/\w+)", (ROOT / "docs" / "chat.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"^(/\w+)", shown, re.MULTILINE) == documented
    assert len(documented) == 17

    assert "nothing to" not in line("Hello!\r")
    first = line("My name is Ada.\r")
    assert "Nice to meet you, Ada!" in first

    again = line("/regen\r")
    assert "Nice to meet you, Ada!" in again
    assert computed(again)[0] == 1, "nothing is read again"
    new, whole = computed(line("What is my name?\r"))
    assert new < whole - 40
    assert "Your name is Ada." in terminal.screen

    assert "The conversation has 2 messages of yours" in line("/undo\r")
    assert "0 messages" not in line("/branches\r")
    branches = line("/branches 1\r")
    assert "branch 1 (here): 2 messages, the last: My name is Ada. - Nice to meet you, Ada!" in branches
    assert "branch 2: 2 messages" in branches

    terminal.send("/edit\r")
    terminal.until("My name is Ada.[^\\n]*")
    terminal.until(WITH_BOTTOM_LINE)
    shown = line("\x7f" * 4 + "Grace.\r")
    assert "Nice to meet you, Grace!" in shown
    assert computed(shown)[0] < computed(shown)[1] - 10
    assert "3 + 4 = 7." in line("/edit What is 3 + 4?\r")
    assert "Branch 5 begins after message 1" in line("/fork 1\r")
    assert "branch 5 (here): 1 messages" in line("/branches\r")

    assert "System: Be kind." in line("/system Be kind.\r")
    assert "No system message is set." in line("/system off\r")
    assert "temperature 0.7" in line("/set temperature 0.7\r")
    assert "temperature 0.0" in line("/set temperature 0\r")
    assert "on-full stop" in line("/set\r")
    assert "there is no setting colour" in line("/set colour red\r")

    assert "Saved as one" in line("/save one\r")
    assert "exists" not in line("Thank you.\r")
    assert "saved after each turn as one" in line("/show\r")
    assert "Saved: one" in line("/sessions\r")
    assert "A new conversation begins." in line("/clear\r")
    assert "0 answers" in line("/stats\r")
    assert "not saved" in line("/show\r")
    loaded = line("/load one\r")
    assert "one goes on: 2 messages" in loaded
    assert "> Thank you." in loaded
    new, whole = computed(line("What is my name?\r"))
    assert new < whole - 30

    bottom = [text for text in terminal.screen.splitlines() if text.strip()][-1]
    pattern = rf" {family} · fp32 · context \d+( of 4,096)? · [\d.]+ tokens/s · [\d.]+ MB · one · branch 5 of 5"
    assert re.fullmatch(pattern, bottom)

    line("/copy\r")
    shown = lmx_at_home("sessions", "show", "one").out
    answer = base64.b64encode(shown.rpartition("## Assistant\n\n")[2].strip().encode()).decode()
    assert f"\x1b]52;c;{answer}\x07" in "".join(terminal.raw)

    assert "Alt-Enter sends" in line("/multiline\r")
    terminal.send("Hello!\r")
    terminal.until(r"\.[^\n]*\x1b\[\?25h")  # the second line of the message
    shown = line("\x1b\r")
    assert computed(shown)[1] > whole
    assert "Enter sends" in line("/multiline\r")

    assert "there is no /nonsense" in line("/nonsense\r").lower()
    terminal.send("/he\t")
    terminal.until("/help")
    line("\r")
    terminal.send("/exit\r")
    assert terminal.leave() == 0
    assert not re.search(pattern, terminal.scrollback, re.MULTILINE), "the bottom line was there with the prompt only"


@pytest.mark.parametrize("family", ["mixtral", "falcon_mamba"])
def test_plain_has_every_command_and_no_escape(family: str, start: Start) -> None:
    terminal = start(family, "--plain")
    talk = Talk(terminal, r"(?m)^> ")
    for keys, expected in (
        ("Hello!", "Hello"),
        ("/regen", "1 of"),
        ("/undo", "Taken back"),
        ("My name is Ada.", "Ada"),
        ("/edit", "write the message"),
        ("/edit My name is Bob.", "Bob"),
        ("/branches", "branch 3 (here)"),
        ("/fork 0", "at the beginning"),
        ("Hello!", "Hello"),
        ("/load two", "this conversation is not saved"),
        ("/save two", "Saved as two"),
        ("/undo", "0 messages of yours"),
        ("/save two", "saved as two already"),
        ("/load nothing", "there is no session"),
        ("/copy", "there is no answer"),
        ("Hello!", "Hello"),
        ("/copy", "needs a terminal"),
        ("/undo 7", "cannot be taken back"),
        ("/branches 9", "there is no branch 9"),
        ("/fork x", "no number"),
        ("/set temperature warm", "give a number"),
        ("/set temperature -1", "temperature is -1"),
        ("/set stop Bye", "stop 'Bye'"),
        ("/set seed 5", "seed 5"),
        ("/set max-new-tokens none", "max-new-tokens none"),
    ):
        assert expected in talk.type(keys + "\n"), keys
    terminal.send("/multiline\n")
    terminal.until("an empty line sends")
    terminal.until("> ")
    terminal.send("Hello!\n\n")
    terminal.until(STATUS)
    terminal.until("> ")
    terminal.send("/exit\n")
    assert terminal.leave() == 0
    assert "\x1b" not in "".join(terminal.raw)


def test_a_killed_chat_goes_on_where_it_was(start: Start) -> None:
    terminal = start("falcon_mamba", "--session", "s")
    talk = Talk(terminal)
    talk.type("My name is Ada.\r")
    terminal.child.kill(9)
    terminal.child.wait()
    again = start("falcon_mamba", "--session", "s")
    talk = Talk(again)
    assert "s goes on: 1 messages" in again.screen
    assert "Nice to meet you, Ada!" in again.screen
    shown = talk.type("What is my name?\r")
    assert "Your name is Ada." in shown
    third = start("falcon_mamba", "--session", "s", "-p", "Hello!")
    third.until("open in another process")
    assert third.leave() == 7
    again.send("/exit\r")
    assert again.leave() == 0


def test_another_model_is_asked_about(start: Start, lmx_at_home: Lmx) -> None:
    model = SHARED / "checkpoints" / "falcon_mamba"
    assert lmx_at_home("chat", model, "--session", "s", "-p", "My name is Ada.").code == 0
    refused = start("mixtral", "--session", "s")
    refused.until(r"read the messages again\? \[y/N\] ")
    refused.send("n\r")
    assert refused.leave() == 3
    terminal = start("mixtral", "--session", "s")
    terminal.until(r"\[y/N\] ")
    terminal.send("y\r")
    talk = Talk(terminal)
    assert "Your name is Ada." in talk.type("What is my name?\r")
    terminal.send("/exit\r")
    assert terminal.leave() == 0
