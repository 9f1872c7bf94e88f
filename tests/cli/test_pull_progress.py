"""What the bars of a pull show, event by event."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from lmx.cli.pull_progress import _Drawing, planned_line
from lmx.convert.listing import RemoteFile
from lmx.pulling import Arrived, Checking, Installed, Planned, Restarted, Waiting

FILES = (RemoteFile("a", 100, "0" * 40), RemoteFile("b", 1000, "1" * 64), RemoteFile("copy of b", 1000, "1" * 64))


@pytest.fixture
def bars() -> Progress:
    return Progress(console=Console(file=io.StringIO()))


def drawing(bars: Progress, missing_bytes: int) -> _Drawing:
    return _Drawing(bars, Planned("org/tiny", "a" * 40, FILES, FILES, missing_bytes, ()))


def completed(bars: Progress) -> dict[str, float]:
    return {task.description: task.completed for task in bars.tasks}


def test_what_was_here_is_no_speed(bars: Progress) -> None:
    """400 bytes of `b` came in an earlier run; its copy is not fetched at all."""
    shown = drawing(bars, 700)
    assert completed(bars) == {"all files": 1400}
    shown.show(Arrived("b", 450, 1000, 400))
    assert completed(bars) == {"all files": 1450, "b": 450}
    assert bars.tasks[1].total == 1000
    shown.show(Arrived("a", 100, 100, 0))
    shown.show(Installed("a"))
    shown.show(Checking("b"))
    assert completed(bars) == {"all files": 1550, "b: checking": 450}
    shown.show(Arrived("b", 1000, 1000, 400))
    shown.show(Installed("b"))
    shown.show(Installed("copy of b"))
    assert completed(bars) == {"all files": 2100}
    assert bars.finished


def test_what_was_damaged_counts_anew(bars: Progress) -> None:
    shown = drawing(bars, 700)
    shown.show(Arrived("b", 1000, 1000, 400))
    shown.show(Restarted("b"))
    shown.show(Arrived("b", 0, 1000, 0))
    assert completed(bars)["all files"] == 1000
    shown.show(Arrived("b", 1000, 1000, 0))
    assert completed(bars)["all files"] == 2000


def test_what_another_process_fetched_counts(bars: Progress) -> None:
    shown = drawing(bars, 1100)
    shown.show(Waiting("b"))
    shown.show(Arrived("b", 1000, 1000, 1000))
    assert completed(bars)["all files"] == 2000


def test_names_and_reasons_of_others_cannot_move_the_cursor(bars: Progress) -> None:
    shown = drawing(bars, 2100)
    shown.show(Arrived("x\x1b[2J" + "y" * 100, 1, 2, 0))
    (name,) = set(completed(bars)) - {"all files"}
    assert name.isprintable()
    assert len(name) < 60


def test_the_plan_in_a_line() -> None:
    plan = Planned("org/tiny", "a" * 40, FILES, FILES, 1700, ())
    assert planned_line(plan) == "pulling org/tiny: 3 files, 2.1 kB, 400 bytes of them are here"
    assert planned_line(Planned("org/tiny", "a" * 40, FILES, (), 0, ())) == "org/tiny: all 3 files are here"
