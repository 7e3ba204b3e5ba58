"""One run: inputs in, records and a manifest out, and a summary of it."""

from __future__ import annotations

import re
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from statescope.batch.cluster import workers as workers_of
from statescope.batch.engine import Engine, Stopped, Waiting
from statescope.batch.inputs import read
from statescope.batch.manifest import NAME, Manifest, Outcome
from statescope.batch.places import TEXTS, Dumps, claimed, without_secrets
from statescope.batch.progress import Progress
from statescope.batch.settings import Settings
from statescope.batch.shelf import Shelf
from statescope.zipped import readable

T = TypeVar("T")

UPLOAD = 30.0
"""Seconds between copies of the manifest to a place that is no disk."""


@dataclass(frozen=True)
class Summary:
    """What a run came to: counts of texts in the manifest, and why it stopped early, if it did."""

    done: int
    failed: int
    pending: int
    tokens: int
    bytes: int
    seconds: float
    read: int
    reasons: tuple[tuple[str, int], ...] = ()
    stopped: str | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return not self.failed and not self.pending

    def lines(self) -> Iterator[str]:
        """Put it into words, with what to do next."""
        rate = f", {self.read / self.seconds:,.2f} texts/s" if self.read else ""
        yield (
            f"{self.done:,} texts done ({self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB), {self.failed:,}"
            f" failed, {self.pending:,} left; {self.read:,} now, in {self.seconds:,.0f} s{rate}"
        )
        for reason, count in self.reasons:
            yield f"failed, {count:,}: {reason}"
        if self.stopped:
            yield f"stopped: {self.stopped}"
        if self.pending:
            yield "run the same command again to go on"
        if self.failed:
            yield "--retry-failed reads again what failed; a text that changes is read again in any case"


def batch(
    inputs: str | Path,
    dumps: str | Path,
    settings: Settings,
    *,
    text: str = "text",
    id: str | None = None,
    pattern: str = "**/*.txt",
    workers: int | None = None,
    scheduler: Any = None,
    limit: int | None = None,
    shard: str | None = None,
    retry_failed: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Trace many texts with many workers; what is there already is not read again.

    Parameters
    ----------
    inputs, text, id, pattern
        Where the texts are; see :func:`statescope.batch.inputs.read`.
    dumps : str or Path
        Folder or fsspec URL (``s3://bucket/run``) of the records.
    settings : Settings
        The model, and how it reads.
    workers : int, optional
        Processes here. Default: one for each GPU; without one, one for each two cores.
    scheduler : optional
        A running Dask cluster instead: its address, or a cluster or client object, such as dask-jobqueue's.
    limit : int, optional
        Read so many texts at most.
    shard : str, optional
        ``"i/n"``: of n runs that share the work, perhaps on other machines, the i-th, from 1 on.
    retry_failed : bool
        Read those again that failed.
    say : callable
        Takes each line that is said.

    Returns
    -------
    Summary

    Raises
    ------
    ValueError, TypeError, OSError
        For what does not fit; names the argument. Nothing is written then.
    KeyboardInterrupt
        As it was given; everything that was finished is in its place and in the manifest.
    """
    place, share = Dumps.at(dumps), shard_of(shard)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; expected 1 text or more")
    label = label_of(shard)
    rows = read(inputs, text=text, id=id, pattern=pattern)
    shelf = Shelf(row for row in rows if belongs(row.id, share))
    try:
        with claimed(place, label), _manifest(place, manifest_name(shard), say) as (manifest, keep):
            manifest.agree({**settings.written(), "settings": settings.digest()})
            counts = manifest.register(shelf)
            adopted, lost = reconcile(manifest, place)
            say(_found(counts, adopted, lost))
            todo = waiting(manifest, shelf, retry_failed)[:limit]
            return _read(todo, manifest, keep, place, settings, shelf, label, workers, scheduler, say)
    finally:
        shelf.close()


def _read(
    todo: list[Waiting], manifest: Manifest, keep: Callable[[bool], None], place: Dumps, settings: Settings,
    shelf: Shelf, label: str, workers: int | None, scheduler: Any, say: Callable[[str], None],
) -> Summary:  # fmt: skip
    began, stopped = time.monotonic(), None
    if not todo:
        return _summary(manifest, began, 0, None)
    bar = Progress(todo, say)
    try:
        with workers_of(scheduler, workers) as (client, own), bar:
            engine = Engine(client, own, settings, place, manifest, shelf, label, say)
            say(f"dashboard: {client.dashboard_link}")
            facts, new = engine.look(), "weights" not in manifest.settings()
            manifest.agree({"weights": facts.weights})
            if new:  # only now can it be said whose records those are that another manifest wrote
                reconcile(manifest, place)
                done = {t["id"] for t in manifest.texts("done")}
                todo = [w for w in todo if w.id not in done]

            def tell(outcomes: list[Outcome]) -> None:
                bar.tell(outcomes)
                keep(False)

            engine.go(todo, facts, tell)
    except Stopped as error:
        stopped = str(error)
    except sqlite3.OperationalError as error:
        stopped = f"the manifest cannot be written: {error}"
    return _summary(manifest, began, bar.read, stopped)


def waiting(manifest: Manifest, shelf: Shelf, retry_failed: bool) -> list[Waiting]:
    """List what is to be read, of the texts that are among the inputs."""
    statuses = ("pending", "failed") if retry_failed else ("pending",)
    return [
        Waiting(t["id"], t["sha256"], t["place"], t["size"])
        for t in manifest.texts(*statuses)
        if t["sha256"] is not None and t["id"] in shelf
    ]


def reconcile(manifest: Manifest, place: Dumps) -> tuple[int, int]:
    """Make the manifest agree with the files; return how many were adopted, and how many are lost.

    A record that was finished when its parent was killed is there, but not in the manifest: it is adopted if
    it opens, is complete and of the very text. What the manifest has and the disk has not is pending again.
    """
    there = reached(place, place.sizes)
    lost = [t["id"] for t in manifest.texts("done") if there.get(t["place"]) != t["bytes"]]
    manifest.reset(lost, "its record was missing or of another size")
    settings = manifest.settings()
    found = []
    for t in manifest.texts("pending"):
        if t["place"] in there:
            outcome = _adopt(place, t, there[t["place"]], settings)
            found += [] if outcome is None else [outcome]
    manifest.record(found)
    return len(found), len(lost)


def _adopt(place: Dumps, text: dict[str, Any], size: int, settings: dict[str, Any]) -> Outcome | None:
    from statescope.record import open as open_record

    try:
        store = readable(place.address(f"{TEXTS}/{text['place']}"))
        record = open_record(store)
        about = record.attrs
        loss = float(record["tokens"]["loss"].mean())
        store.close()
    except Exception:  # whatever it is, it is no record of this text
        return None
    if about.get("text_sha256") != text["sha256"] or about.get("text_id") != text["id"]:
        return None
    if any(about.get(n) != settings.get(n) for n in ("weights", "settings")) or not about["complete"]:
        return None
    known = None if loss != loss else loss
    return Outcome(text["id"], "done", None, about["tokens"], known, None, size, about["texts_together"])


def _summary(manifest: Manifest, began: float, read: int, stopped: str | None) -> Summary:
    totals = manifest.totals()
    done, failed, pending = (totals.get(s, (0, 0, 0)) for s in ("done", "failed", "pending"))
    reasons = Counter(str(t["error"]) for t in manifest.texts("failed")).most_common(5)
    seconds = time.monotonic() - began
    counts = (done[0], failed[0], pending[0], done[1], done[2])
    return Summary(*counts, seconds, read, tuple(reasons), stopped)


def _found(counts: dict[str, int], adopted: int, lost: int) -> str:
    said = f"texts: {sum(counts.values()):,}, of which {counts['new']:,} new, {counts['changed']:,} changed"
    more = {"finished but not written down": adopted, "with their record missing": lost}
    return said + "".join(f", {n:,} {what}" for what, n in more.items() if n)


def shard_of(given: str | None) -> tuple[int, int]:
    """Read ``i/n``."""
    found = re.fullmatch(r"(\d+)/(\d+)", given or "1/1")
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"shard={given!r}; expected i/n with i from 1 to n, such as 2/8")
    return int(found[1]), int(found[2])


def label_of(shard: str | None) -> str:
    """Name a run among those that share a place."""
    return "all" if shard is None else "{}-of-{}".format(*shard_of(shard))


def manifest_name(shard: str | None) -> str:
    """File name of a run's manifest."""
    return NAME.format("" if shard is None else f"-{label_of(shard)}")


def belongs(id: str, share: tuple[int, int]) -> bool:
    """Whether a text belongs to a shard; by its id, so that the order of the inputs does not matter."""
    which, of = share
    return int(sha256(id.encode()).hexdigest()[:15], 16) % of == which - 1


@contextmanager
def _manifest(
    place: Dumps, name: str, say: Callable[[str], None]
) -> Iterator[tuple[Manifest, Callable[[bool], None]]]:
    """Open a run's manifest; of a place that is no disk, a copy that is sent there now and then."""
    if not place.remote:
        path = Path(place.address(name))
        former = path.exists()
        with Manifest(path) as manifest:
            try:
                yield manifest, lambda now: None
            except (ValueError, TypeError):
                if not former and not manifest.totals().get("done"):
                    path.unlink()  # what was asked for makes no sense: nothing is left of it
                raise
        return
    with tempfile.TemporaryDirectory(prefix="statescope-") as folder:
        local, sent = Path(folder) / name, time.monotonic()
        if name in reached(place, place.manifests):
            place.get(name, local)
        with Manifest(local) as manifest:

            def keep(now: bool) -> None:
                nonlocal sent
                if now or time.monotonic() - sent > UPLOAD:
                    copy = Path(folder) / "copy.sqlite"
                    manifest.copy_to(copy)
                    try:
                        place.put(copy, name)
                    except Exception as error:  # of whatever kind a file system's are; the next run mends it
                        say(without_secrets(f"the manifest was not copied to {place.url}: {error}"))
                    sent = time.monotonic()

            try:
                yield manifest, keep
            finally:
                keep(True)


def reached(place: Dumps, ask: Callable[[], T]) -> T:
    """Ask a place; what goes wrong there is an OSError that says so, without secrets."""
    try:
        return ask()
    except ValueError:  # says what is wrong by itself
        raise
    except Exception as error:  # of whatever kind a file system's are
        raise OSError(without_secrets(f"dumps={place.url!r} cannot be reached: {error}")) from error
