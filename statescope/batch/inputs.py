"""Texts from files: every row with its id, its content or the reason why it cannot be read.

What is wrong with one row is that row's reason; what is wrong with a whole file (no such column) is an error.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

LARGEST = 256 * 2**20
"""Bytes of a text, or of a line of a file, from which on it is refused."""

Content = str | list[int]


@dataclass(frozen=True)
class Row:
    """One text of the inputs; ``content`` is None where ``reason`` says why."""

    number: int
    id: str
    content: Content | None
    reason: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8, or four for every token id."""
        content = self.content or ""
        return len(content.encode()) if isinstance(content, str) else 4 * len(content)

    @property
    def sha256(self) -> str | None:
        """Hash of the content; None if there is none."""
        if self.content is None:
            return None
        kind = "text:" if isinstance(self.content, str) else "ids:"
        written = self.content if isinstance(self.content, str) else ",".join(map(str, self.content))
        return hashlib.sha256((kind + written).encode()).hexdigest()


def read(
    inputs: str | Path, *, text: str = "text", id: str | None = None, pattern: str = "**/*.txt"
) -> Iterator[Row]:
    """Read the rows of a source, in its order, with ids that are unique.

    Parameters
    ----------
    inputs : str or Path
        A ``.jsonl`` (or ``.ndjson``), ``.csv`` (or ``.tsv``) or ``.parquet`` file; a folder that Hugging
        Face's ``datasets`` saved; or a folder of UTF-8 text files.
    text : str
        Column of the texts: strings, or lists of token ids.
    id : str, optional
        Column of the ids. Default: ``id`` if there is one, else the row's number; of a folder, the file's
        path.
    pattern : str
        Which files of a folder.

    Raises
    ------
    ValueError, FileNotFoundError
        If the source cannot be read as a whole; names ``inputs``, ``text`` or ``id``.
    """
    seen: dict[str, tuple[int, str | None]] = {}
    for row in _rows(Path(inputs), text, id, pattern):
        if row.id in seen:
            first, sha256 = seen[row.id]
            if row.content is not None and row.sha256 == sha256:
                continue
            reason = row.reason or f"its id {row.id!r} is that of row {first} too, which has another text"
            row = Row(row.number, f"{row.id} (row {row.number})", None, reason)
        seen.setdefault(row.id, (row.number, row.sha256))
        yield row


def _rows(place: Path, text: str, id: str | None, pattern: str) -> Iterator[Row]:
    if not place.exists():
        raise FileNotFoundError(f"inputs={str(place)!r} does not exist")
    if place.is_dir():
        saved = (place / "state.json").is_file() or (place / "dataset_dict.json").is_file()
        if not saved:
            yield from _folder(place, pattern)
            return
        records: Iterable[Any] = _dataset(place, text, id)
    elif place.suffix in (".jsonl", ".ndjson"):
        records = _json_lines(place)
    elif place.suffix in (".csv", ".tsv"):
        records = _csv(place, text, id)
    elif place.suffix == ".parquet":
        records = _parquet(place, text, id)
    else:
        raise ValueError(
            f"inputs={str(place)!r} is of no kind that is known; expected .jsonl, .csv, .tsv, .parquet, a"
            " saved dataset or a folder of text files"
        )
    for number, record in enumerate(records):
        yield _row(number, record, text, id)


def _row(number: int, record: Mapping[str, Any] | str, text: str, id: str | None) -> Row:
    """Check one record; a string stands for the reason why there is none."""
    default = f"row {number}"
    if isinstance(record, str):
        return Row(number, default, None, record)
    column = id or ("id" if "id" in record else None)
    name = default if column is None else record.get(column)
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    problem = _problem("id", name)
    if problem is not None:
        return Row(number, default, None, f"column {column!r}: {problem}")
    if text not in record:
        found = ", ".join(map(repr, list(record)[:8]))
        return Row(number, str(name), None, f"column {text!r} is missing; there are {found}")
    content = record[text]
    reason = _problem("text", content)
    kept = {
        str(k): v
        for k, v in record.items()
        if k not in (text, column) and isinstance(v, str | int | float | bool) and _problem(k, str(v)) is None
    }
    return Row(number, str(name), None if reason else content, reason, kept)


def _problem(name: str, value: Any) -> str | None:
    """Say what is wrong with a string or a list of token ids."""
    if name == "text" and isinstance(value, list):
        whole = all(isinstance(i, int) and not isinstance(i, bool) and -(2**63) <= i < 2**63 for i in value)
        return ("text is empty" if not value else None) if whole else "text is a list of other than token ids"
    if not isinstance(value, str):
        return f"{name} is a {type(value).__name__}; expected a string"
    if not value:
        return f"{name} is empty"
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        return f"{name} holds half of a surrogate pair at character {error.start}, which is no text"
    if size > LARGEST:
        return f"{name} has {size:,} bytes; the largest that is read has {LARGEST:,}"
    if "\0" in value:
        return f"{name} is binary: it holds a NUL at character {value.index(chr(0))}"
    return None


def _folder(place: Path, pattern: str) -> Iterator[Row]:
    files = sorted(p for p in place.glob(pattern) if p.is_file())
    if not files:
        raise ValueError(f"inputs={str(place)!r} has no files that match {pattern!r}")
    for number, path in enumerate(files):
        name = path.relative_to(place).as_posix()
        if _problem("id", name):
            name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        try:
            if path.stat().st_size > LARGEST:
                raise ValueError(f"file has more than {LARGEST:,} bytes")
            content = path.read_bytes().decode("utf-8")
            reason = _problem("text", content)
        except UnicodeDecodeError as error:
            reason = f"file is not UTF-8 ({error.reason} at byte {error.start})"
        except (OSError, ValueError) as error:
            reason = str(error)
        yield Row(number, name, None if reason else content, reason)


def _json_lines(place: Path) -> Iterator[Mapping[str, Any] | str]:
    with place.open("rb") as file:
        while line := file.readline(LARGEST):
            if len(line) == LARGEST and not line.endswith(b"\n"):
                while (rest := file.readline(LARGEST)) and not rest.endswith(b"\n"):
                    pass
                yield f"line has more than {LARGEST:,} bytes"
            elif line.strip():
                yield _json_line(line)


def _json_line(line: bytes) -> Mapping[str, Any] | str:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"line is not UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return f"line is not JSON: {error}"
    return found if isinstance(found, dict) else f"line is a {type(found).__name__}; expected an object"


def _csv(place: Path, text: str, id: str | None) -> Iterator[Mapping[str, Any] | str]:
    csv.field_size_limit(LARGEST)
    try:
        with place.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
            rows = csv.DictReader(file, delimiter="\t" if place.suffix == ".tsv" else ",")
            _columns(place, rows.fieldnames or (), text, id)
            yield from _csv_rows(rows, text, id)
    except csv.Error as error:
        raise ValueError(f"inputs={str(place)!r} cannot be read as CSV: {error}") from error


def _csv_rows(rows: Any, text: str, id: str | None) -> Iterator[Mapping[str, Any] | str]:
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"line cannot be read: {error}"
            continue
        if None in row or any(v is None for v in row.values()):
            yield f"line {rows.line_num} has another number of columns than the header"
        elif any("\udc80" <= c <= "\udcff" for c in f"{row[text]}{row.get(id or 'id') or ''}"):
            yield f"line {rows.line_num} is not UTF-8"
        else:
            yield dict(row)


def _columns(place: Path, found: Iterable[str], text: str, id: str | None) -> None:
    for argument, name in (("text", text), ("id", id)):
        if name is not None and name not in found:
            there = ", ".join(map(repr, found)) or "none"
            raise ValueError(f"{argument}={name!r} is no column of {str(place)!r}; its columns are {there}")


def _arrow(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError("inputs of this kind need pyarrow: pip install 'statescope-ssm[batch]'") from error


def _parquet(place: Path, text: str, id: str | None) -> Iterator[Mapping[str, Any]]:
    arrow, parquet = _arrow("pyarrow"), _arrow("pyarrow.parquet")
    try:
        with parquet.ParquetFile(place) as file:
            _columns(place, file.schema_arrow.names, text, id)
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except arrow.ArrowInvalid as error:
        raise ValueError(f"inputs={str(place)!r} cannot be read as Parquet: {error}") from error


def _dataset(place: Path, text: str, id: str | None) -> Iterator[Mapping[str, Any]]:
    """Read what ``Dataset.save_to_disk`` wrote: Arrow streams, listed in ``state.json``."""
    arrow = _arrow("pyarrow")
    if (place / "dataset_dict.json").is_file():
        splits = json.loads((place / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ValueError(
            f"inputs={str(place)!r} holds the splits {', '.join(splits)}; name one, such as"
            f" {str(place / splits[0])!r}"
        )
    listed = json.loads((place / "state.json").read_text(encoding="utf-8"))["_data_files"]
    for name in (str(entry["filename"]) for entry in listed):
        if Path(name).name != name:
            raise ValueError(f"inputs={str(place)!r}: state.json names {name!r}, which is not in the folder")
        with arrow.memory_map(str(place / name)) as source, arrow.ipc.open_stream(source) as stream:
            _columns(place, stream.schema.names, text, id)
            for batch in stream:
                for start in range(0, batch.num_rows, 256):
                    yield from batch.slice(start, 256).to_pylist()
