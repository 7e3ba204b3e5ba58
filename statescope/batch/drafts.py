"""Where the record of one text is put together before it is put in its place.

A short text's in memory; a long one's in a folder beside the records, which outlives the worker: another goes
on there after the last commit, as :func:`statescope.trace` does.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray

from statescope.batch.places import DRAFTS, KEPT, Dumps
from statescope.batch.settings import Text
from statescope.claims import claim
from statescope.plan import Plan
from statescope.store import RecordWriter
from statescope.tracing import run
from statescope.zipped import Files

IN_MEMORY = 256 * 2**20
"""Bytes up to which a record is put together in memory; a larger one in a folder."""

LONG = 4
"""Commits from which on a text is not begun anew when its worker dies."""


@dataclass
class Draft:
    """A record that is being put together."""

    store: Files | Path
    lock: IO[str] | None = None

    @classmethod
    def of(cls, plan: Plan, text: Text, dumps: Dumps, folder: Path) -> Draft:
        """Choose a place for one that is :func:`too_large`; ``folder`` goes with the worker.

        A long text's place is its own, under a lock: if a worker that was given up for dead still reads it,
        it is read beside that one.
        """
        if not dumps.remote and _is_long(plan):
            own = Path(dumps.address(DRAFTS)) / KEPT / Path(text.place).name
            own.mkdir(parents=True, exist_ok=True)
            lock = (own / "lock").open("w")
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return cls(own / "record.zarr", lock)
            lock.close()
        return cls(folder / f"{uuid4().hex}.zarr")

    def read(self, plan: Plan, about: Mapping[str, Any]) -> float:
        """Read the text as ``trace`` does; return the mean loss. What fails is not kept, but for OSErrors."""
        attributes = {**plan.attributes(), **about}
        try:
            assert isinstance(self.store, Path)
            if self.lock is None:
                _run(self.store, plan, attributes)
            else:
                _go_on(self.store, plan, attributes, [*about, "schema_version", "fingerprint"])
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, OSError):
                self.close()
            elif self.lock is not None:
                self.lock.close()
            raise
        return mean(np.asarray(zarr.open_group(self.store, mode="r")["tokens/loss"]))

    def close(self) -> None:
        """Forget it, as its record is in its place."""
        if isinstance(self.store, Path):
            shutil.rmtree(self.store, ignore_errors=True)
        if self.lock is not None:
            shutil.rmtree(Path(self.lock.name).parent, ignore_errors=True)
            self.lock.close()


def _run(store: Path, plan: Plan, attributes: Mapping[str, Any], former: zarr.Group | None = None) -> None:
    resumed = None if former is None else RecordWriter.resume(store, former, plan.layout)

    def open_writer() -> RecordWriter:
        return resumed or RecordWriter.create(store, plan.layout, attributes, plan.ids.numpy())

    kept = None if resumed is None else resumed.read_carry()
    run(plan, open_writer, progress=False, on_disk=True, kept=kept)


def _go_on(store: Any, plan: Plan, attributes: Mapping[str, Any], decisive: Sequence[str]) -> None:
    """Read on from the last commit of a worker that died, if it was reading this very text."""
    fingerprint = plan.fingerprint()()
    wanted = {**attributes, "fingerprint": fingerprint}
    try:
        left = dict(zarr.open_group(store, mode="r").attrs)
    except (FileNotFoundError, ValueError):
        left = {}
    if any(left.get(name) != wanted[name] for name in decisive):
        shutil.rmtree(store, ignore_errors=True)
    elif left["complete"]:
        return
    _run(store, plan, wanted, claim(store, lambda: fingerprint, overwrite=False))


def mean(loss: NDArray[Any]) -> float:
    """Mean of what is known; NaN if nothing is."""
    known = loss[np.isfinite(loss)]
    return float(known.mean(dtype=np.float64)) if known.size else float("nan")


def too_large(plan: Plan) -> bool:
    """Whether a text is to be read into a folder; any other's record is written when it is whole."""
    return _is_long(plan) or _size(plan) > IN_MEMORY


def _is_long(plan: Plan) -> bool:
    return int(plan.ids.shape[1]) > LONG * plan.commit_after(0)


def _size(plan: Plan) -> int:
    layout, size = plan.layout, 0
    for group in layout.groups():
        for variable in layout.variables(group).values():
            size += 4 * int(np.prod([layout.size(group, d) for d in variable.dims]))
    return size
