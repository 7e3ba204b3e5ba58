"""Inputs of a batch: every kind of file, and what is wrong with a row of one."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from batches import SETTINGS, one, write
from conftest import needs

from statescope.batch import inputs as reading
from statescope.batch.command import batch
from statescope.batch.inputs import read

needs("distributed")

BAD: list[tuple[Any, str]] = [
    ({"id": "empty", "text": ""}, "text is empty"),
    ({"id": "number", "text": 7}, "text is a int"),
    ({"id": "none", "text": None}, "text is a NoneType"),
    ({"id": "mixed", "text": [1, "a"]}, "other than token ids"),
    ({"id": "no text", "body": "x"}, "column 'text' is missing; there are 'id', 'body'"),
    ({"id": "half", "text": "\ud800"}, "half of a surrogate pair"),
    ({"id": "binary", "text": "a\0b"}, "binary"),
    ({"id": "", "text": "x"}, "column 'id': id is empty"),
    ({"id": ["a"], "text": "x"}, "column 'id': id is a list"),
    ("not json", "line is not JSON"),
    ("[1, 2]", "line is a list"),
    ("[" * 3000, "line is not JSON"),
    ({"id": "long", "text": "x" * 5000}, "more than 4,000 bytes"),
]


def test_bad_rows_fail_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LARGEST", 4000)
    good = {"id": "good", "text": "good"}
    source = write(tmp_path / "in.jsonl", [good, *(row for row, _ in BAD), {"id": "last", "text": "last"}])
    with source.open("ab") as file:
        file.write(b'{"id": "latin", "text": "\xe9"}\n')
    rows = list(read(source))
    assert [r.id for r in rows if r.content] == ["good", "last"]
    reasons = [r.reason for r in rows if r.reason]
    assert len(reasons) == len(BAD) + 1 and "not UTF-8" in str(reasons[-1])
    for reason, (_, words) in zip(reasons, BAD, strict=False):
        assert words in str(reason)


def test_bad_rows_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CSV too a row fails by itself: of another encoding, binary, too long, of another width."""
    monkeypatch.setattr(reading, "LARGEST", 4000)
    lines = [
        b"id,text",
        b"a,good",
        b"b,\xe9",
        b"c,a\0b",
        b"d," + b"x" * 5000,
        b"e,f,g",
        b"h",
        b"i,",
        b"j,last",
    ]
    (tmp_path / "in.csv").write_bytes(b"\n".join(lines))
    rows = list(read(tmp_path / "in.csv"))
    assert [(r.id, r.content) for r in rows if r.content] == [("a", "good"), ("j", "last")]
    words = ["line 3 is not UTF-8", "binary", "line cannot be read: field larger", "number of columns"]
    for reason, found in zip([*words, "number of columns", "text is empty"], rows[1:-1], strict=True):
        assert reason in str(found.reason)


def test_bad_files(tmp_path: Path) -> None:
    """What is no table at all, or would be read from elsewhere, is refused as a whole."""
    needs("pyarrow")
    (tmp_path / "in.parquet").write_bytes(b"PAR1 no more")
    for name in ("escapes", "splits"):
        (tmp_path / name).mkdir()
    (tmp_path / "escapes" / "state.json").write_text('{"_data_files": [{"filename": "../other.arrow"}]}')
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "none").mkdir()
    wrong = {
        "in.parquet": "cannot be read as Parquet", "escapes": "'../other.arrow', which is not in the folder",
        "splits": "holds the splits train, test; name one", "none": "has no files that match",
    }  # fmt: skip
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            list(read(tmp_path / name))


def test_ids_that_are_no_names(client: Any, tmp_path: Path) -> None:
    """Whatever an id is, its record lies within the dumps, and no two share a file on any disk."""
    ids = [
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "CON",
        "Same",
        "same",
        "SAME",
        "x" * 5000,
        "é",
        "e\u0301",
        ".",
        "a\nb",
    ]
    rows = [{"id": i, "text": f"text of {i[:9]}"} for i in ids]
    rows += [{"id": "twice", "text": "one"}, {"id": "twice", "text": "other"}, {"id": "twice", "text": "one"}]
    dumps = tmp_path / "in" / "dumps"
    dumps.parent.mkdir()
    found = batch(write(tmp_path / "in.jsonl", rows), dumps, SETTINGS, scheduler=client)
    assert (found.done, found.failed) == (len(ids) + 1, 1)
    assert "is that of row 13 too" in found.reasons[0][0]
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != tmp_path]
    assert all(p.is_relative_to(dumps) for p in files) and len(files) == len(ids) + 2
    assert len({str(p).lower() for p in files}) == len(files)
    assert all(len(p.name) < 120 and p.name.isascii() for p in files)
    for id in ids:
        assert one(dumps, id).attrs["text_id"] == id


def test_every_kind_of_inputs(tmp_path: Path) -> None:
    """The same texts, ids and columns from all of them."""
    needs("pyarrow")
    import pyarrow as arrow
    from pyarrow import parquet

    rows = [{"id": f"é{i}", "text": f'text, {i}\nof "two" lines', "score": i / 2} for i in range(3)]
    expected = [(r["id"], r["text"]) for r in rows]
    found = {"jsonl": list(read(write(tmp_path / "in.jsonl", rows)))}
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"in.{name}").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
        found[name] = list(read(tmp_path / f"in.{name}"))
    table = arrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "in.parquet")
    found["parquet"] = list(read(tmp_path / "in.parquet"))
    saved = tmp_path / "saved"  # as Dataset.save_to_disk lays it out
    saved.mkdir()
    with arrow.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as sink:
        with arrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    (saved / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    found["dataset"] = list(read(saved))
    for name, got in found.items():
        assert [(r.id, r.content) for r in got] == expected, name
        assert float(got[1].metadata["score"]) == 0.5
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one", "utf-8")
    (folder / "deep" / "a.txt").write_text("two", "utf-8")
    (folder / "b.txt").write_bytes(b"\xff\xfe")
    assert [(r.id, r.content) for r in read(folder)] == [
        ("a.txt", "one"),
        ("b.txt", None),
        ("deep/a.txt", "two"),
    ]


@pytest.mark.parametrize("column", ["text", "id"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "dataset"])
def test_missing_column(kind: str, column: str, tmp_path: Path) -> None:
    needs("pyarrow")
    import pyarrow as arrow
    from pyarrow import parquet

    table, place = arrow.table({"id": ["a"], "text": ["b"]}), tmp_path / f"in.{kind}"
    if kind == "csv":
        place.write_text("id,text\na,b\n")
    elif kind == "parquet":
        parquet.write_table(table, place)
    else:
        place.mkdir()
        with (
            arrow.OSFile(str(place / "d.arrow"), "wb") as sink,
            arrow.ipc.new_stream(sink, table.schema) as s,
        ):
            s.write_table(table)
        (place / "state.json").write_text('{"_data_files": [{"filename": "d.arrow"}]}')
    with pytest.raises(ValueError, match=f"{column}='body' is no column of .*'id', 'text'"):
        list(read(place, **{column: "body"}))
