"""What became of every text: an SQLite file beside the records. Only the parent writes it.

A text is ``pending``, ``done`` or ``failed``. A run that is one of several (``--shard i/n``) has a manifest
of its own, so that no two processes write one file; a reader takes them all.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from statescope.batch.inputs import Row

VERSION = 1

NAME = "manifest{}.sqlite"

TABLES = """
CREATE TABLE IF NOT EXISTS run (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS text (
    id TEXT PRIMARY KEY, row INTEGER NOT NULL, sha256 TEXT, size INTEGER NOT NULL, metadata TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('pending', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0, error TEXT, place TEXT NOT NULL,
    tokens INTEGER, loss REAL, seconds REAL, bytes INTEGER, together INTEGER, memory INTEGER, updated REAL
);
CREATE INDEX IF NOT EXISTS by_status ON text (status);
"""


@dataclass(frozen=True)
class Outcome:
    """What a worker says of one text.

    ``status`` is "done"; "failed", for a reason of the text's own; or "unplaced": there was no writing where
    the record belongs, which is no text's fault. ``seconds`` is the text's share of a reading together of
    ``together`` texts; ``memory`` what the worker's process held afterwards, in bytes.
    """

    id: str
    status: str
    error: str | None = None
    tokens: int | None = None
    loss: float | None = None
    seconds: float | None = None
    bytes: int | None = None
    together: int | None = None
    memory: int | None = None


def place_of(id: str) -> str:
    """Where the record of a text goes, within the records: safe and unique on any file system."""
    digest = sha256(id.encode()).hexdigest()
    readable = re.sub(r"[^a-z0-9._-]+", "-", id.lower())[-48:].strip("-.")
    return f"{digest[:2]}/{readable or 'text'}-{digest[:20]}.zarr.zip"


class Manifest:
    """One SQLite file; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(TABLES)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"dumps: {path} is no manifest that can be read ({error})") from error

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Demand that settings are those of the records that are there; note them if there are none.

        Raises
        ------
        ValueError
            Names what differs.
        """
        done = self.totals().get("done", (0, 0, 0))[0]
        for name, value in {"version": VERSION, **settings}.items():
            written = json.dumps(value, sort_keys=True)
            known = self._db.execute("SELECT value FROM run WHERE name = ?", [name]).fetchone()
            if done and known is not None and known[0] != written:
                raise ValueError(
                    f"{name}={written}, but the records that are there were made with {known[0]}; repeat"
                    " that, or name another folder for dumps"
                )
            self._db.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", [name, written])

    def register(self, rows: Iterable[tuple[Row, str | None]]) -> dict[str, int]:
        """Take in the inputs, all or none; say how many are new, changed or as they were.

        A text whose hash has changed is pending again; a row that cannot be read has failed at once.
        """
        counts = {"new": 0, "changed": 0, "known": 0}
        with self._transaction():
            for row, digest in rows:
                known = self._db.execute(
                    "SELECT sha256, error, row, metadata FROM text WHERE id = ?", [row.id]
                ).fetchone()
                kind = "new" if known is None else "known" if known[0] == digest else "changed"
                counts[kind] += 1
                metadata = json.dumps(row.metadata, sort_keys=True)
                if kind == "known" and (digest is not None or known[1] == row.reason):
                    if known[2:] != (row.number, metadata):
                        self._db.execute(
                            "UPDATE text SET row = ?, metadata = ? WHERE id = ?",
                            [row.number, metadata, row.id],
                        )
                    continue
                status = "failed" if row.reason else "pending"
                values = [
                    row.id,
                    row.number,
                    digest,
                    row.size,
                    metadata,
                    status,
                    row.reason,
                    place_of(row.id),
                ]
                self._db.execute(
                    "INSERT OR REPLACE INTO text (id, row, sha256, size, metadata, status, error, place,"
                    " updated) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [*values, time.time()],
                )
        return counts

    def reset(self, ids: Iterable[str], error: str | None = None) -> None:
        """Declare texts pending."""
        with self._transaction():
            self._db.executemany(
                "UPDATE text SET status = 'pending', error = ?, updated = ? WHERE id = ?",
                [(error, time.time(), id) for id in ids],
            )

    def record(self, outcomes: Iterable[Outcome]) -> None:
        """Write down what came back."""
        with self._transaction():
            for o in outcomes:
                status = "pending" if o.status == "unplaced" else o.status
                self._db.execute(
                    "UPDATE text SET status = ?, error = ?, tokens = ?, loss = ?, seconds = ?, bytes = ?,"
                    " together = ?, memory = ?, attempts = attempts + 1, updated = ? WHERE id = ?",
                    [status, o.error, o.tokens, o.loss, o.seconds, o.bytes, o.together, o.memory,
                     time.time(), o.id],
                )  # fmt: skip

    def died(self, ids: Iterable[str]) -> None:
        """Count an attempt in which a worker died."""
        with self._transaction():
            self._db.executemany(
                "UPDATE text SET attempts = attempts + 1, updated = ? WHERE id = ?",
                [(time.time(), id) for id in ids],
            )

    def texts(self, *statuses: str) -> Iterator[dict[str, Any]]:
        """List texts in the order of the inputs, all or of some status."""
        marks = ", ".join("?" * len(statuses))
        where = f"WHERE status IN ({marks})" if statuses else ""
        found = self._db.execute(f"SELECT * FROM text {where} ORDER BY row, id", statuses)
        names = [column[0] for column in found.description]
        for values in found.fetchall():
            yield dict(zip(names, values, strict=True))

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """Texts, tokens and bytes by status."""
        found = self._db.execute(
            "SELECT status, count(*), coalesce(sum(tokens), 0), coalesce(sum(bytes), 0) FROM text"
            " GROUP BY status"
        )
        return {status: (int(n), int(tokens), int(size)) for status, n, tokens, size in found}

    def settings(self) -> dict[str, Any]:
        """Return the settings of the run."""
        return {name: json.loads(value) for name, value in self._db.execute("SELECT name, value FROM run")}

    def copy_to(self, path: Path) -> None:
        """Write a copy that is whole."""
        with closing(sqlite3.connect(path)) as target:
            self._db.backup(target)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """All or nothing; sqlite3's own context manager does not begin one."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._db.execute("COMMIT")
        elif self._db.in_transaction:  # SQLite has rolled back by itself where the disk is full
            self._db.execute("ROLLBACK")
