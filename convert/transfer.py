"""Fetching files in pieces over several connections, until each has its digest and its place.

Threads take pieces from a queue, small files first. At any time at most `CONNECTIONS * PIECE_BYTES` = 16 MB have been
asked for and are not in a journal: that is what a death can cost. A connection that fails is opened again where it
stopped.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from queue import Empty, SimpleQueue

from lmx.convert.fetch import THREAD_PREFIX, HubFiles, UnluckyError
from lmx.convert.listing import RemoteFile
from lmx.convert.part_file import PartFile, discard_parts
from lmx.convert.patience import Patience
from lmx.convert.places import POLL_SECONDS, Place, is_whole, locked
from lmx.convert.pull_events import Arrived, Checking, FileEvent, Installed, Restarted, Retrying, Waiting
from lmx.core.errors import InputError
from lmx.core.files import quoted

CONNECTIONS = 8
_TICK_SECONDS = 0.1
_LEAVE_SECONDS = 0.5
_WHOLE_AFTER = 3  # answers without ranges, before a file is taken as a whole


class _Job:
    """Content that is to be fetched once, and the files that have it."""

    def __init__(self, files: Sequence[RemoteFile]) -> None:
        self.file, self.files = files[0], files
        self.part: PartFile | None = None
        self.queue: deque[int] = deque()
        self.pieces_left = 0
        self.done = self.resumed = 0
        self.whole_answers = 0
        self.is_told = False
        self.as_a_whole = threading.Lock()
        self.resources = ExitStack()

    @property
    def name(self) -> str:
        return self.file.name


class Transfer:
    """Fetches `files` from `hub` into `place`. Use it once, by `run`."""

    def __init__(self, hub: HubFiles, place: Place, files: Sequence[RemoteFile], patience: Patience) -> None:
        same: dict[str, list[RemoteFile]] = {}
        for file in files:
            same.setdefault(file.digest, []).append(file)
        self._hub, self._place, self._patience = hub, place, patience
        self._jobs = [_Job(group) for group in same.values()]
        self._waiting = deque(self._jobs)
        self._open: _Job | None = None
        self._lock, self._queue_lock, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self._events: SimpleQueue[FileEvent] = SimpleQueue()
        self._failure: BaseException | None = None
        self._alive = 0
        self.fetched_bytes = 0

    def run(self) -> Iterator[FileEvent]:
        """Fetch everything. Leaving the iterator early stops it; what has arrived is kept.

        Raises:
            InputError: what came is not what the listing says.
            NetworkError: the connection failed too often.
            HfHubHTTPError, OSError: the hub refuses; the disk is full, or cannot be written.

        """
        threads = [
            threading.Thread(target=self._work, name=f"{THREAD_PREFIX}-{number}", daemon=True)
            for number in range(CONNECTIONS)
        ]
        self._alive = len(threads)
        try:
            for thread in threads:
                thread.start()
            shown: dict[str, int] = {}
            while any(thread.is_alive() for thread in threads):
                yield from self._news(shown, _TICK_SECONDS)
            yield from self._news(shown, 0)
        finally:
            self._stop.set()
            end = time.monotonic() + _LEAVE_SECONDS
            for thread in threads:  # one that still waits for the network ends by itself, and writes nothing any more
                thread.join(max(0.0, end - time.monotonic()))
        if self._failure is not None:
            raise self._failure

    def _news(self, shown: dict[str, int], seconds: float) -> Iterator[FileEvent]:
        """How far each file is, after waiting so long for something to happen; then what has happened."""
        happened: list[FileEvent] = []
        with suppress(Empty):
            happened.append(self._events.get(timeout=seconds) if seconds else self._events.get_nowait())
            while True:
                happened.append(self._events.get_nowait())
        for job in self._jobs:
            if job.done != shown.get(job.name, 0):
                shown[job.name] = job.done
                yield Arrived(job.name, job.done, job.file.size, job.resumed)
        yield from happened

    def _go_on(self) -> bool:
        return not self._stop.is_set()

    def _work(self) -> None:
        try:
            while self._go_on() and (task := self._next()) is not None:
                job, part, piece = task
                if piece is None or self._fetch(job, part, piece):
                    self._complete(job, part)
        except BaseException as error:  # handed to the thread that asked for the files
            if self._failure is None:
                self._failure = error
            self._stop.set()
        finally:
            with self._lock:
                self._alive -= 1
                if not self._alive:
                    for job in self._jobs:
                        job.resources.close()

    def _next(self) -> tuple[_Job, PartFile, int | None] | None:
        """A piece to fetch, or None for a file that lacks none; None where there is nothing left to do."""
        with self._queue_lock:
            while self._go_on():
                job = self._open
                if job is not None and job.part is not None and job.queue:
                    return job, job.part, job.queue.popleft()
                if not self._waiting:
                    return None
                self._open = job = self._free_job()
                if job is None:
                    self._stop.wait(POLL_SECONDS)
                elif self._begin(job) and job.part is not None and not job.queue:
                    return job, job.part, None
            return None

    def _free_job(self) -> _Job | None:
        """The first file that nobody else fetches, locked. Nothing is waited for while others could be fetched."""
        for job in list(self._waiting):
            if job.part is not None or self._has_lock(job):
                self._waiting.remove(job)
                return job
        for job in self._waiting:
            if not job.is_told:
                job.is_told = True
                self._events.put(Waiting(job.name))
        return None

    def _has_lock(self, job: _Job) -> bool:
        with ExitStack() as resources:
            if not resources.enter_context(locked(self._place.lock_path(job.file.digest))):
                return False
            job.resources = resources.pop_all()
        return True

    def _begin(self, job: _Job) -> bool:
        """See what is there of a file; whether anything is left to do."""
        if job.part is None:
            if all(map(self._place.has, job.files)) or is_whole(self._place, job.file):
                job.resumed = job.file.size
                self._put(job)
                return False
            job.part = PartFile.open(self._place.parts, job.file)
            job.resources.callback(job.part.close)
        job.queue = deque(job.part.missing)
        job.pieces_left, job.done = len(job.queue), job.part.resumed_bytes
        job.resumed = job.part.resumed_bytes
        return True

    def _fetch(self, job: _Job, part: PartFile, piece: int) -> bool:
        """Fetch a piece; whether it was the last of its file."""
        position, stop = part.span(piece)
        misses = 0
        while position < stop:
            before = position
            try:
                for data in self._hub.read(job.file, position, stop):
                    if self._stop.is_set() or not part.write(position, data):
                        return False
                    position += len(data)
                    self._count(job, len(data))
                if position == before:
                    raise UnluckyError("the answer is empty")
                misses = 0
            except UnluckyError as bad:
                misses = 1 if position > before else misses + 1
                if bad.ignores_ranges and self._is_without_ranges(job):
                    return self._fetch_whole(job, part)
                if not self._pause(job, bad, misses):
                    return False
        return self._finish(job, part, piece)

    def _is_without_ranges(self, job: _Job) -> bool:
        with self._lock:
            job.whole_answers += 1
            return job.whole_answers >= _WHOLE_AFTER

    def _fetch_whole(self, job: _Job, part: PartFile) -> bool:
        """Fetch a file from beginning to end, from a server that knows no ranges; whether this thread did it."""
        with job.as_a_whole:
            misses = 0
            job.queue.clear()
            while self._go_on() and (missing := part.missing):
                reached = len(missing)
                try:
                    self._stream(job, part)
                except UnluckyError as bad:
                    misses = 1 if len(part.missing) < reached else misses + 1
                    self._pause(job, bad, misses)
                else:
                    return self._go_on()
            return False

    def _stream(self, job: _Job, part: PartFile) -> None:
        """Write all of a file's bytes as they come, and take note of each piece that they fill."""
        position, piece = 0, 0
        for data in self._hub.read(job.file, 0, job.file.size, whole=True):
            if self._stop.is_set() or not part.write(position, data):
                return
            position += len(data)
            self.fetched_bytes += len(data)
            while piece < part.pieces and position >= part.span(piece)[1]:
                part.finish(piece)
                piece += 1
            job.done = max(job.done, position)
        if position < job.file.size:
            raise UnluckyError("the answer ends early")

    def _pause(self, job: _Job, bad: UnluckyError, misses: int) -> bool:
        """Wait before the next attempt; whether to make it. Raises what stays wrong."""
        asked_too_much = bad.seconds is not None and bad.seconds > self._patience.longest_asked
        if misses >= self._patience.attempts or asked_too_much:
            later = f", which asks to wait {bad.seconds:.0f} seconds" if bad.seconds is not None else ""
            hint = "check the connection and try again: what has arrived is kept"
            if bad.kind is InputError:
                hint = "what answers is not the hub, or the repository is broken: check HF_ENDPOINT and any proxy"
            raise bad.kind(f"{quoted(job.name)} could not be fetched: {bad.reason}{later}", hint)
        seconds = self._patience.wait(misses, bad.seconds)
        self._events.put(Retrying(job.name, bad.reason, seconds))
        return not self._stop.wait(seconds)

    def _count(self, job: _Job, nbytes: int) -> None:
        with self._lock:
            job.done += nbytes
            self.fetched_bytes += nbytes

    def _finish(self, job: _Job, part: PartFile, piece: int) -> bool:
        part.finish(piece)
        with self._lock:
            job.pieces_left -= 1
            return job.pieces_left == 0

    def _complete(self, job: _Job, part: PartFile) -> None:
        """Check the digest of a file whose pieces are all here, and put it in its place."""
        self._events.put(Checking(job.name))
        digest = part.digest(self._go_on)
        if digest is None:
            return
        if digest == job.file.digest:
            part.install(self._place.blob(digest))
            self._put(job)
            return
        if part.resumed_bytes:  # an earlier run, or a power cut, may have spoiled it: once more, all of it
            part.begin_anew()
            self._events.put(Restarted(job.name))
            with self._lock:
                self._waiting.append(job)
            return
        discard_parts(self._place.parts, job.file.digest)
        raise InputError(
            f"{quoted(job.name)} came with other content than its {job.file.kind} digest says; it was thrown away",
            "try again; if it stays so, the repository or whoever answers for the hub is broken",
        )

    def _put(self, job: _Job) -> None:
        for file in job.files:
            if not self._place.has(file):
                self._place.put(file)
        job.done = job.file.size
        for file in job.files:
            self._events.put(Installed(file.name))
        job.resources.close()
