"""The interactive chat through a pseudo-terminal, as a person meets it."""

import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import EDITING, Terminal, closing

STATUS = r"\n(\x1b\[2m)?\[[^\]\n]*context ([\d,]+) of 2,048\]"


Start = Callable[..., Terminal]


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path) -> Iterator[Start]:
    running: list[Terminal] = []

    def launch(*args: str, **env: str) -> Terminal:
        env = {"XDG_STATE_HOME": str(tmp_path / "state"), "XDG_DATA_HOME": str(tmp_path / "data")} | env
        running.append(Terminal([str(checkpoint), "--dtype", "fp32", *args], env))
        return running[-1]

    with closing(running):
        yield launch


def _used(status: str) -> int:
    return int(status.rpartition("context ")[2].partition(" ")[0].replace(",", ""))


def test_plain_chat(start: Start) -> None:
    terminal = start("--plain", "-n", "600", "--system", "Be brief")
    assert "mixtral" in terminal.until(r"lmx chat: .*\r\n.*\r\n> ")

    terminal.send("Hello\n")
    terminal.until("no system role")
    first = _used(terminal.until(STATUS))
    terminal.until("> ")

    terminal.send("never sent\x03")  # Ctrl-C at the prompt: the line is gone, the chat is not
    terminal.until("> ")
    terminal.send("/stats\n")
    assert "1 answers" in terminal.until(r"\d+ answers.*\r\n> ")

    terminal.send("Tell me \\\n")
    terminal.until(r"\. ")
    terminal.send("more\n")
    terminal.until(r"more\r\n.")  # the answer has begun
    terminal.send("\x03")
    stopped = terminal.until(STATUS)
    assert "[stopped" in stopped
    terminal.until("> ")

    terminal.send("And then?\n")  # the conversation goes on from what there was
    third = terminal.until(STATUS)
    assert _used(third) > _used(stopped) > first
    assert ("cut off" in third) == ("[cut off at the limit · 600 tokens" in third)
    terminal.until("> ")

    for command, answer in (
        ("/help", "/clear"),
        ("/system", "System: Be brief"),
        ("/system Be long", "System: Be long"),
        ("/show", "float32 on"),
        ("/nonsense", "There is no /nonsense"),
        ("/clear", "new conversation"),
        ("/stats", "0 answers"),
    ):
        terminal.send(command + "\n")
        terminal.until(answer)
        terminal.until("> ")
    terminal.send("a b c " * 600 + "\n")  # longer than the context, yet short enough for a terminal's line
    terminal.until("lmx: error: .*tokens long")
    terminal.until("> ")
    terminal.send("\x04")
    assert terminal.leave() == 0
    assert "\x1b" not in "".join(terminal.raw), "no colour, no animation"


def test_chat_with_line_editing(start: Start, tmp_path: Path) -> None:
    terminal = start("-n", "12")
    terminal.until(EDITING)
    terminal.send("Hellx\x7fo\r")
    terminal.until(STATUS)
    terminal.until(EDITING)
    terminal.send("one\x1b\rtwo\\\rthree\r")  # Alt-Enter, then a trailing backslash
    terminal.until(STATUS)
    terminal.until(EDITING)
    terminal.send("thrown away\x03")
    terminal.until(EDITING)
    terminal.send("/exit\r")
    assert terminal.leave() == 0
    screen = terminal.screen
    assert "> Hello" in screen
    assert "> one" in screen
    assert ". three" in screen
    history = tmp_path / "state" / "lmx" / "chat-history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert [line for line in history.read_text().splitlines() if line.startswith("+")] == [
        *("+Hello", "+one", "+two", "+three", "+/exit"),
    ]


def test_history_reaches_into_the_next_run_and_ctrl_c_stops_an_answer(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "state" / "lmx"
    folder.mkdir(parents=True)
    (folder / "chat-history").write_text("\n# 2024-01-01 00:00:00\n+Hello from before\n")
    terminal = start(NO_COLOR="1")
    terminal.until(EDITING)
    terminal.send("\x1b[A\r")  # the arrow that goes up
    terminal.until("Hello from before")
    terminal.until(r"\r\n")
    terminal.child.expect(r"\S")
    terminal.send("\x03")
    status = terminal.until(STATUS)
    assert "[stopped" in status
    assert "\x1b[2m" not in status, "NO_COLOR"
    terminal.until(EDITING)
    terminal.send("\x04")
    assert terminal.leave() == 0


# What prompt_toolkit and Rich write: colours, cursor moves by a number, erasing, and the modes that they set.
OWN = re.compile(r"\x1b\[[0-9;]*[mABCDHJK]|\x1b\[\?(?:1|7|12|25|2004)[hl]")


def test_random_bytes_of_a_model_do_not_reach_the_terminal_as_control(start: Start) -> None:
    """A hot model of random weights says each of the 256 bytes."""
    terminal = start("-n", "120", "--temperature", "50", "--seed", "3")
    terminal.until(EDITING)
    for _ in range(10):
        terminal.send("Hello\r")
        terminal.until(STATUS)
        terminal.until(EDITING)
    terminal.send("/exit\r")
    assert terminal.leave() == 0
    raw = "".join(terminal.raw)
    assert re.search("[\u2400-\u2421]", raw), "the model did write control characters"
    left = OWN.sub("", raw).replace("\r", "").replace("\n", "").replace("\b", "")
    found = re.search(r".{0,9}[\x00-\x1f\x7f-\x9f\u202a-\u202e].{0,20}", left)
    assert found is None, repr(found)
