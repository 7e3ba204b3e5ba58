"""The table of a sweep: one JSON line for every finished run, appended whole and flushed to the disk.

As with answers to passkeys, a process killed at any instant leaves at most half a line at the end, which is
dropped. The first line says what the file is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from statescope.analyses.runs import FORMAT, FORMAT_VERSION, read_lines

Row = dict[str, Any]


class Table:
    """Rows of finished runs, on disk.

    Parameters
    ----------
    path : Path
        The file; continued if it is there.

    Raises
    ------
    ValueError
        If it is no table of runs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self.rows, whole = read_lines(path)
            os.truncate(path, whole)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not path.stat().st_size:
            self._write([{FORMAT: FORMAT_VERSION}])

    def done(self) -> set[str]:
        """Names of the runs that are finished."""
        return {row["run"] for row in self.rows if row["step"] == row["config"]["steps"]}

    def add(self, rows: list[Row]) -> None:
        """Keep rows; they are on disk when this returns."""
        self._write(rows)
        self.rows.extend(rows)

    def _write(self, rows: list[Row]) -> None:
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
