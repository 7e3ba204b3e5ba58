"""Hands out texts, survives the workers, writes down what comes back.

A worker that dies takes one piece of work along; its texts are then handed out one by one, and one that
kills :data:`ATTEMPTS` workers by itself has failed. Where nothing can be written, the run stops, and no text
is blamed.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from statescope.batch.manifest import Manifest, Outcome
from statescope.batch.places import Dumps, without_secrets
from statescope.batch.settings import Facts, Settings, Text
from statescope.batch.shelf import Shelf
from statescope.batch.work import TEXTS_OF_A_PASS, look, work

ATTEMPTS = 3
"""Workers that a text may kill."""

UNPLACED = 4
"""Texts in a row that could not be written, after which a run stops."""

BYTES_PER_TOKEN = 4
"""Of a text, about."""

PASSES = 8
"""Forward passes of a piece of work, at most: what is read in one is written while the next is read."""

COUNTED = 0.5
"""Seconds between two counts of the workers."""

DESERTED = 120.0
"""Seconds without any worker, or without a scheduler, after which a run of our own workers stops."""


class Stopped(Exception):
    """The run cannot go on, for no text's fault; says why."""


@dataclass(frozen=True)
class Waiting:
    """A text that is to be read."""

    id: str
    sha256: str
    place: str
    size: int


class Engine:
    """One run over a cluster's workers.

    Parameters
    ----------
    client : distributed.Client
        Of the workers.
    own : bool
        Whether they end with the run.
    settings, dumps, manifest, shelf
        How to read, where to write, what is written down, what is read.
    label : str
        Name of the run.
    say : callable
        Takes each line that is said.
    """

    def __init__(
        self,
        client: Any,
        own: bool,
        settings: Settings,
        dumps: Dumps,
        manifest: Manifest,
        shelf: Shelf,
        label: str,
        say: Callable[[str], None],
    ) -> None:
        self._client, self._own, self._settings = client, own, settings
        self._dumps, self._manifest, self._shelf, self._label = dumps, manifest, shelf, label
        self._say, self._patience, self._lonely = say, 30.0, time.monotonic()
        self._queue: deque[list[Waiting]] = deque()  # what a worker took along
        self._left = Left((), 1)
        self._running: dict[Any, list[Waiting]] = {}
        self._deaths: Counter[str] = Counter()
        self._unplaced = self._count = 0
        self._counted = -COUNTED
        self._deserted: float | None = None

    def look(self) -> Facts:
        """Let one worker load the model; errors of its own are raised here."""
        for _ in range(ATTEMPTS):
            future = self._client.submit(look, self._settings, pure=False)
            while not future.done():
                self._wait([future])
            facts: Facts | None = None if _died(future) else _fetched(future)
            if facts is not None:
                return facts
        raise Stopped("a worker died three times while it loaded the model (out of memory?)")

    def go(self, texts: Iterable[Waiting], facts: Facts, tell: Callable[[list[Outcome]], None]) -> None:
        """Read texts; write down each outcome, then tell of it.

        Raises
        ------
        Stopped
            If there is no writing, no worker or no scheduler.
        """
        self._left = Left(texts, BYTES_PER_TOKEN * facts.segment)
        try:
            while self._queue or self._left or self._running:
                while (self._queue or self._left) and len(self._running) < 2 * max(1, self._workers()):
                    self._hand_out(facts)
                for future in self._wait(list(self._running)):
                    tell(self._take_back(future, self._running.pop(future)))
        finally:
            if self._running:
                self._client.cancel(list(self._running), force=True)

    def _hand_out(self, facts: Facts) -> None:
        piece = self._queue.popleft() if self._queue else self._left.cut(self._workers())
        texts = [Text(w.id, w.sha256, w.place, self._shelf.content(w.id)) for w in piece]
        future = self._client.submit(work, texts, self._settings, facts, self._dumps, self._label, pure=False)
        self._running[future] = piece

    def _wait(self, futures: list[Any]) -> list[Any]:
        """Return futures that are done, or nothing after a second."""
        from distributed import CancelledError, wait

        try:
            with self._client.as_current():
                done = list(wait(futures, timeout=1.0, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            done = []
        except CancelledError as error:
            raise Stopped("the scheduler is gone") from error
        self._complain_of_loneliness()
        alone = self._client.status != "running" or (self._own and not self._workers())
        if not alone:
            self._deserted = None
        elif self._deserted is None:
            self._deserted = time.monotonic()
        limit = DESERTED if self._client.status == "running" else DESERTED / 12
        if self._deserted is not None and time.monotonic() - self._deserted > limit:
            raise Stopped("its workers are gone" if self._own else "the scheduler does not answer any more")
        return done

    def _complain_of_loneliness(self) -> None:
        """Say now and then that a cluster has no workers yet: a queue may take hours, or forever."""
        if self._workers():
            self._patience, self._lonely = 30.0, time.monotonic()
        elif time.monotonic() - self._lonely > self._patience:
            self._patience, self._lonely = 600.0, time.monotonic()
            self._say("waiting for workers: the cluster has none")

    def _workers(self) -> int:
        """Count them, now and then: the scheduler lists all it knows of each."""
        if time.monotonic() - self._counted > COUNTED:
            self._count = len(self._client.scheduler_info(n_workers=-1).get("workers", {}))
            self._counted = time.monotonic()
        return self._count

    def _take_back(self, future: Any, piece: list[Waiting]) -> list[Outcome]:
        outcomes: list[Outcome] | None = _fetched(future) if future.status == "finished" else None
        if outcomes is not None:
            self._manifest.record(outcomes)
            self._notice_unplaced(outcomes)
            return outcomes
        if future.status == "cancelled":
            raise Stopped("the scheduler has lost the work")
        if future.status == "error" and not _died(future):
            raise future.exception()
        self._manifest.died(w.id for w in piece)
        if len(piece) > 1:
            self._queue.extendleft([w] for w in piece)
            return []
        (text,) = piece
        self._deaths[text.id] += 1
        if self._deaths[text.id] < ATTEMPTS:
            self._queue.appendleft(piece)
            return []
        reason = f"{ATTEMPTS} workers died while they read it (out of memory?)"
        failed = [Outcome(text.id, "failed", reason)]
        self._manifest.record(failed)
        return failed

    def _notice_unplaced(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._unplaced = self._unplaced + 1 if outcome.status == "unplaced" else 0
            if self._unplaced >= UNPLACED or (
                outcome.status == "unplaced" and not (self._queue or self._left)
            ):
                raise Stopped(without_secrets(f"records cannot be written: {outcome.error}"))


class Left:
    """What is left to read, in the order in which it is: the longest first.

    Parameters
    ----------
    texts : iterable of Waiting
        All of it.
    size : int
        Bytes of one forward pass.
    """

    def __init__(self, texts: Iterable[Waiting], size: int) -> None:
        self._texts = deque(sorted(texts, key=lambda w: -w.size))
        self._bytes, self._size = sum(w.size for w in self._texts), size

    def __bool__(self) -> bool:
        return bool(self._texts)

    def cut(self, workers: int) -> list[Waiting]:
        """Take the next piece of work: texts of similar sizes, half of what is one worker's share.

        It is of one to :data:`PASSES` forward passes: large while there is much to do, small at the end, so
        that all workers end at one time.
        """
        passes = max(self._bytes / self._size, len(self._texts) / TEXTS_OF_A_PASS)
        several = min(PASSES, max(1, int(passes / (2 * max(1, workers)))))
        piece = [self._texts.popleft()]
        held = piece[0].size
        while self._texts and len(piece) < several * TEXTS_OF_A_PASS:
            if held + self._texts[0].size > several * self._size:
                break
            piece.append(self._texts.popleft())
            held += piece[-1].size
        self._bytes -= held
        return piece


def pieces(texts: Iterable[Waiting], size: int, workers: int = 1) -> Iterator[list[Waiting]]:
    """Cut texts into all pieces of work, for so many workers; see :class:`Left`."""
    left = Left(texts, size)
    while left:
        yield left.cut(workers)


def _fetched(future: Any) -> Any:
    """Fetch what a finished piece of work yielded, which lies with a worker; None if that has died since."""
    from distributed import CancelledError
    from distributed.comm.core import CommClosedError
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker:
        return None
    except (CommClosedError, CancelledError) as error:
        raise Stopped("the scheduler is gone") from error


def _died(future: Any) -> bool:
    from distributed.scheduler import KilledWorker

    return future.status == "error" and isinstance(future.exception(), KilledWorker)
