"""How a pull looks on a terminal: a bar for the whole and one for each file that is arriving."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lmx.cli.console import may_animate, note
from lmx.cli.facts import human_bytes
from lmx.core.text.safe import safe_line
from lmx.pulling import (
    Arrived,
    Checking,
    Event,
    Installed,
    Planned,
    Pulled,
    Restarted,
    Retrying,
    Waiting,
    Watcher,
    unwatched,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_NAME_WIDTH = 44


def pull_watcher(quiet: bool) -> Watcher:
    """Bars where a person watches stderr, a line at the beginning elsewhere, nothing if `quiet`."""
    if quiet:
        return unwatched
    return _watch_bars if may_animate() else _watch_lines


def planned_line(plan: Planned) -> str:
    """What a pull will do, in a line."""
    missing = len(plan.missing)
    if not missing:
        return f"{plan.repo}: all {len(plan.files)} files are here"
    saved = f"; {human_bytes(plan.saved_bytes)} left out" if plan.saved_bytes else ""
    begun = sum(file.size for file in plan.missing) - plan.missing_bytes
    resumed = f", {human_bytes(begun)} of them are here" if begun else ""
    size = human_bytes(begun + plan.missing_bytes)
    return f"pulling {plan.repo}: {missing} file{'s' * (missing > 1)}, {size}{resumed}{saved}"


def _watch_lines(events: Iterator[Event]) -> Pulled:
    for event in events:
        if isinstance(event, Pulled):
            return event
        if isinstance(event, Planned) and event.missing:
            note(planned_line(event))
        elif isinstance(event, Waiting):
            note(f"{event.name}: another process fetches it; waiting")
        elif isinstance(event, Restarted):
            note(f"{event.name}: what was here was damaged; beginning anew")
    raise TypeError("the last event of a pull is Pulled")


def _watch_bars(events: Iterator[Event]) -> Pulled:
    """Draw until the last event; the bars go when the pull ends, however it ends."""
    first = next(events)
    if not isinstance(first, Planned):
        raise TypeError("the first event of a pull is Planned")
    if not first.missing:
        return unwatched(events)
    note(planned_line(first))
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        drawing = _Drawing(bars, first)
        for event in events:
            if isinstance(event, Pulled):
                return event
            drawing.show(event)
    raise TypeError("the last event of a pull is Pulled")


class _Drawing:
    """The bars of one pull. They begin with what an earlier run left, so that it does not count as speed."""

    def __init__(self, bars: "Progress", plan: Planned) -> None:
        self._bars = bars
        self._sizes = {file.name: file.size for file in plan.missing}
        self._done = dict.fromkeys(self._sizes, 0)
        self._resumed = dict.fromkeys(self._sizes, 0)
        self._elsewhere: set[str] = set()
        self._tasks: dict[str, TaskID] = {}
        total = sum(self._sizes.values())
        self._begun = total - plan.missing_bytes
        self._whole = bars.add_task("all files", total=total, completed=self._begun)

    def show(self, event: Event) -> None:
        if isinstance(event, Arrived):
            was_here = event.name not in self._elsewhere
            self._done[event.name], self._resumed[event.name] = event.done, event.resumed * was_here
            task = self._task(event.name, event.resumed)
            self._bars.update(task, completed=event.done, description=_shortened(event.name))
        elif isinstance(event, Installed):
            if event.name in self._tasks:
                self._bars.remove_task(self._tasks.pop(event.name))
        elif isinstance(event, Checking):
            self._say(event.name, "checking")
        elif isinstance(event, Waiting):
            self._elsewhere.add(event.name)
            self._say(event.name, "another process fetches it")
        elif isinstance(event, Restarted):
            self._begun -= self._resumed.get(event.name, 0)
            self._say(event.name, "was damaged, begins anew")
        elif isinstance(event, Retrying):
            self._say(event.name, f"{event.reason}, again in {event.seconds:.0f} s")
        fetched = sum(self._done.values()) - sum(self._resumed.values())
        self._bars.update(self._whole, completed=self._begun + fetched)

    def _task(self, name: str, resumed: int = 0) -> "TaskID":
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(_shortened(name), total=self._sizes.get(name), completed=resumed)
        return self._tasks[name]

    def _say(self, name: str, what: str) -> None:
        self._bars.update(self._task(name), description=f"{_shortened(name)}: {safe_line(what, 40)}")


def _shortened(name: str) -> str:
    """A file's name, its end where it is too long: that is where shards differ."""
    line = safe_line(name)
    return line if len(line) <= _NAME_WIDTH else "..." + line[-_NAME_WIDTH:]
