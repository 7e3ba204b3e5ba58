"""The inputs while a run lasts: on a temporary file, so that memory does not grow with them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator

from statescope.batch.inputs import Content, Row


class Shelf:
    """Rows by id."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._db = sqlite3.connect("", isolation_level=None)  # a file of its own, gone when this is closed
        self._db.execute(
            "CREATE TABLE row (id TEXT PRIMARY KEY, number INTEGER, content TEXT, reason TEXT, metadata TEXT,"
            " sha256 TEXT)"
        )
        self._db.execute("BEGIN")
        for row in rows:
            values = [row.id, row.number, json.dumps(row.content), row.reason, json.dumps(dict(row.metadata))]
            self._db.execute("INSERT INTO row VALUES (?, ?, ?, ?, ?, ?)", [*values, row.sha256])
        self._db.execute("COMMIT")

    def __iter__(self) -> Iterator[tuple[Row, str | None]]:
        """Take every row and its hash, in order."""
        rows = self._db.execute(
            "SELECT id, number, content, reason, metadata, sha256 FROM row ORDER BY number"
        )
        for id, number, content, reason, metadata, sha256 in rows:
            yield Row(number, id, json.loads(content), reason, json.loads(metadata)), sha256

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM row").fetchone()[0])

    def __contains__(self, id: str) -> bool:
        return self._db.execute("SELECT 1 FROM row WHERE id = ?", [id]).fetchone() is not None

    def content(self, id: str) -> Content:
        """Return a text."""
        found: Content = json.loads(
            self._db.execute("SELECT content FROM row WHERE id = ?", [id]).fetchone()[0]
        )
        return found

    def close(self) -> None:
        """Forget everything."""
        self._db.close()
