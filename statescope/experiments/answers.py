"""The file of answers: JSON lines, appended to as they come, so that nothing finished is ever lost.

The first line says whose answers these are; every further line is one prompt and its answer. Lines are
only ever appended, whole batches at a time, and flushed to the disk. A process killed at any instant can
leave half a line at the end, which is dropped; there is no other state to repair. A grid of answers is
some hundred bytes a prompt: chunked arrays would spend more on their layout, and could not be read with
the eye or ``pandas.read_json(path, lines=True)``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statescope.analyses.passkey import FORMAT, FORMAT_VERSION, Row, read_lines

IDENTITY = {
    FORMAT: "format",
    "weights": "model",
    "dtype": "dtype",
    "haystack_hash": "haystack or tokenizer",
    "seed": "seed",
    "measured": "measurement of states",
}
"""What two runs must agree in for the one to go on with the other's file, and how it is called."""


def place_of(row: Row) -> tuple[int, float, int]:
    """Where a prompt stands in the grid: length, depth and trial."""
    return row["length"], row["depth"], row["trial"]


class Answers:
    """Rows of answers, kept in memory and, if a file is named, on disk.

    Parameters
    ----------
    store : str, Path or None
        The file; None keeps the answers in memory only.
    header : dict
        Whose answers these are.

    Raises
    ------
    ValueError
        If the file holds something else, or answers of another model, haystack or seed.
    OSError
        If it cannot be read or written.
    """

    def __init__(self, store: str | Path | None, header: dict[str, Any]) -> None:
        self.header = {FORMAT: FORMAT_VERSION, **header}
        self.rows: list[Row] = []
        self._path = None if store is None else Path(store)
        if self._path is not None and self._path.exists() and self._path.stat().st_size:
            self._continue(self._path)
        elif self._path is not None:
            self._write([self.header])

    def done(self) -> set[tuple[int, float, int]]:
        """Prompts answered already, by length, depth and trial."""
        return {place_of(row) for row in self.rows}

    def add(self, rows: Sequence[Row]) -> None:
        """Keep the answers of a batch."""
        if self._path is not None:
            self._write(rows)
        self.rows.extend(rows)

    def _continue(self, path: Path) -> None:
        found, rows, whole = read_lines(path)
        if found is None:  # killed while it wrote its first line
            os.truncate(path, 0)
            self._write([self.header])
            return
        other = [what for name, what in IDENTITY.items() if found.get(name) != self.header.get(name)]
        if other:
            raise ValueError(
                f"store={str(path)!r} holds answers of another {' and '.join(other)}; repeat that call to go"
                " on with it, or name another file"
            )
        os.truncate(path, whole)
        self.rows = rows

    def _write(self, lines: Sequence[Row]) -> None:
        assert self._path is not None
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            with self._path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                error.errno, f"store={str(self._path)!r} cannot be written ({error.strerror})"
            ) from error
