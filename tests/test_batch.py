"""Many texts: read from files, read together, written whole, and opened as one."""

from __future__ import annotations

import csv
import fcntl
import json
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from conftest import needs
from tiny import assert_close, assert_identical, build
from typer.testing import CliRunner

import statescope
from statescope import analyses
from statescope.batch import drafts
from statescope.batch import inputs as reading
from statescope.batch import work as working
from statescope.batch.command import Summary, batch
from statescope.batch.engine import Waiting, pieces
from statescope.batch.estimate import estimate
from statescope.batch.held import Held, of_this_process
from statescope.batch.inputs import Row, read
from statescope.batch.manifest import Manifest, Outcome, place_of
from statescope.batch.places import Dumps, without_secrets
from statescope.batch.settings import Facts, Settings, Text
from statescope.batch.work import look, work
from statescope.cli import app
from statescope.experiments.bench.settings import Settings as BenchSettings
from statescope.store import RecordWriter

needs("distributed")

MODEL = "mamba2-byte-n16-t512"

SETTINGS = Settings(MODEL, device="cpu", backend="chunked")

IGNORED = (
    "created_at", "fingerprint", "text_id", "text_sha256", "texts_together", "weights", "settings"
)  # fmt: skip
"""Root attributes in which a batch's record differs from a trace's."""

WORDS = "The grass is green and the sky is blue over a river of stones that never ends. "


def text(length: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).permutation(list(WORDS * (length // len(WORDS) + 1)))[:length])


def write(place: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    place.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return place


def texts(lengths: Sequence[int]) -> list[dict[str, Any]]:
    return [{"id": f"t{i}", "text": text(n, i), "kind": "ab"[i % 2]} for i, n in enumerate(lengths)]


def one(dumps: Path, id: str) -> xr.DataTree:
    return statescope.open(dumps / "texts" / place_of(id))


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Run Dask in a thread of this process."""
    from distributed import Client, LocalCluster

    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def outcomes(rows: Sequence[dict[str, Any]], dumps: Path, settings: Settings = SETTINGS) -> list[Outcome]:
    """Let one worker read texts, without a cluster around it."""
    checked = [Row(i, r["id"], r["text"]) for i, r in enumerate(rows)]
    asked = [Text(r.id, str(r.sha256), place_of(r.id), r.content) for r in checked if r.content]
    return work(asked, settings, look(settings), Dumps.at(dumps), "test")


@pytest.fixture(scope="module")
def done(client: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], Summary]:
    """Batch a few texts, most of them shorter than a segment."""
    folder = tmp_path_factory.mktemp("batch")
    rows = texts([1500, 300, 310, 290, 1, 2500, 305, 900])
    source = write(folder / "in.jsonl", rows)
    said: list[str] = []
    found = batch(source, folder / "dumps", SETTINGS, scheduler=client, say=said.append)
    assert said[0] == "texts: 8, of which 8 new, 0 changed"
    return folder / "dumps", rows, found


def test_as_one_by_one(done: tuple[Path, list[dict[str, Any]], Summary]) -> None:
    """Read alone a text's record is that of a trace, bit for bit; read together, to rounding."""
    dumps, rows, summary = done
    assert (summary.done, summary.failed, summary.pending, summary.stopped) == (8, 0, 0, None)
    model = statescope.load(MODEL, device="cpu")
    together = 0
    for row in rows:
        record, expected = one(dumps, row["id"]), statescope.trace(model, row["text"], backend="chunked")
        assert record.attrs["complete"] and record.attrs["text_id"] == row["id"]
        if record.attrs["texts_together"] == 1:
            assert_identical(record, expected, IGNORED)
        else:
            together += 1
            assert_close(record, expected, 1e-5)
            assert {k: v for k, v in record.attrs.items() if k not in IGNORED} == {
                k: v for k, v in expected.attrs.items() if k not in IGNORED
            }
    assert together >= 4


def test_every_choice_together(tmp_path: Path) -> None:
    """Windows that end within a text, snapshots, probes, some layers and heads; from the end: read alone."""
    model = statescope.load(MODEL, device="cpu")
    rows = texts([301, 290, 275])
    given: dict[str, Any] = {"window": 7, "layers": (0, 3), "heads": (1, 6), "backend": "auto"}
    for i, (snapshots, probes, together) in enumerate([((9,), (20, 200), 3), ((-1,), (-1,), 1)]):
        settings = Settings(MODEL, device="cpu", snapshots=snapshots, probes=probes, reach=50, **given)
        found = {o.id: (o.status, o.together) for o in outcomes(rows, tmp_path / str(i), settings)}
        assert found == {row["id"]: ("done", together) for row in rows}
        for row in rows:
            expected = statescope.trace(
                model, row["text"], snapshots=snapshots, probes=statescope.Probes(probes, 50), **given
            )
            record = one(tmp_path / str(i), row["id"])
            if together == 1:
                assert_identical(record, expected, IGNORED)
            assert_close(record, expected, 1e-5)


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "bamba"])
def test_padding_reaches_no_text(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In other families, and beside attention."""
    model = build(family)
    monkeypatch.setattr(working, "_loaded", lambda *_: (model, family, "weights"))
    rows = [{"id": str(n), "text": torch.arange(n).remainder(64).tolist()} for n in (40, 37, 35)]
    settings = Settings(family, window=3, backend="auto")
    assert {o.together for o in outcomes(rows, tmp_path, settings)} == {3}
    for row in rows:
        assert_close(one(tmp_path, row["id"]), statescope.trace(model, row["text"], window=3), 1e-5)


def test_poisoned_text_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be tokenised, what breaks a reading, what is out of reach: only that text fails."""
    own = working.run

    def breaks(plan: Any, *args: Any, **options: Any) -> Any:
        if bool((plan.ids == ord("#")).any()):
            raise RuntimeError("device-side trouble")
        return own(plan, *args, **options)

    for module in (working, drafts):
        monkeypatch.setattr(module, "run", breaks)
    rows = [*texts([100, 95, 90]), {"id": "ids", "text": [1, 999]}, {"id": "bad", "text": "#" * 97}]
    rows.append({"id": "short", "text": "abc"})
    found = {o.id: o for o in outcomes(rows, tmp_path, Settings(MODEL, device="cpu", snapshots=(50,)))}
    assert [found[f"t{i}"].status for i in range(3)] == ["done"] * 3
    assert "token id 999" in str(found["ids"].error) and found["ids"].status == "failed"
    assert found["bad"].error == "RuntimeError: device-side trouble"
    assert "snapshots names position 50" in str(found["short"].error)
    assert len(list((tmp_path / "texts").rglob("*.zip"))) == 3


def test_non_finite_values_are_each_texts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that breaks the model's numbers says where; those beside it hold none."""
    model = build("mamba2")
    with torch.no_grad():
        model.backbone.embeddings.weight[63] = torch.nan  # type: ignore[union-attr, index, operator]
    monkeypatch.setattr(working, "_loaded", lambda *_: (model, "tiny", "weights"))
    rows = [{"id": "bad", "text": [*range(30), 63, 1]}, {"id": "good", "text": [*range(31)]}]
    found = outcomes(rows, tmp_path, Settings("tiny", backend="chunked"))
    assert [o.status for o in found] == ["done", "done"]
    assert one(tmp_path, "good").attrs["first_nonfinite"] is None
    assert one(tmp_path, "bad").attrs["first_nonfinite"]["token"] == 30


class Killed(BaseException):
    """Stands for the end of a worker."""


def test_long_text_goes_on_where_its_worker_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its last commit; a text that has changed begins anew; nothing is left but the record."""
    monkeypatch.setattr("statescope.layout.SHARD_TOKENS", 100)
    settings = Settings(MODEL, device="cpu", backend="chunked", segment=100)
    row, commit, commits = {"id": "long", "text": text(450)}, RecordWriter.commit, list[int]()

    def dies(self: RecordWriter, tokens: int, *args: Any, **options: Any) -> None:
        commit(self, tokens, *args, **options)
        commits.append(tokens)
        if len(commits) in (2, 3):
            raise Killed

    monkeypatch.setattr(RecordWriter, "commit", dies)
    for _ in range(2):
        with pytest.raises(Killed):
            outcomes([row], tmp_path, settings)
    assert commits == [100, 200, 300]
    with (tmp_path / ".drafts/kept" / Path(place_of("long")).name / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker reads it still: it is read beside that one
        assert [o.status for o in outcomes([row], tmp_path, settings)] == ["done"]
    assert commits[3:] == [100, 200, 300, 400, 450]
    assert [o.status for o in outcomes([row], tmp_path, settings)] == ["done"]
    assert commits[8:] == [400, 450]
    model = statescope.load(MODEL, device="cpu")
    expected = statescope.trace(model, row["text"], backend="chunked", segment=100)
    assert_identical(one(tmp_path, "long"), expected, IGNORED)
    assert not list((tmp_path / ".drafts/kept").iterdir())
    commits.clear()
    with pytest.raises(Killed):
        outcomes([row], tmp_path, settings)
    changed = {"id": "long", "text": text(450, seed=1)}
    commits.append(0)
    assert [o.status for o in outcomes([changed], tmp_path, settings)] == ["done"]
    assert commits[3:5] == [100, 200]


def test_runs_again(client: Any, tmp_path: Path) -> None:
    """Only what is missing, changed or lost is read; other settings are refused."""
    rows = texts([60, 50, 40, 30])
    rows[2]["text"] = ""
    source, dumps = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps"

    def again(settings: Settings = SETTINGS, **options: Any) -> tuple[int, int, int, int]:
        found = batch(source, dumps, settings, scheduler=client, **options)
        return found.read, found.done, found.failed, found.pending

    assert again(limit=2) == (2, 2, 1, 1)
    assert again() == (1, 3, 1, 0)
    assert again() == (0, 3, 1, 0)
    stamp = (dumps / "texts" / place_of("t0")).stat().st_mtime_ns
    rows[1]["text"], rows[2]["text"] = "changed", "no longer empty"
    write(source, rows)
    assert again() == (2, 4, 0, 0)
    assert bytes(one(dumps, "t1")["tokens"]["token_id"].values[0].tolist()) == b"changed"
    assert (dumps / "texts" / place_of("t0")).stat().st_mtime_ns == stamp
    (dumps / "texts" / place_of("t3")).unlink()
    assert again() == (1, 4, 0, 0)
    (dumps / "manifest.sqlite").unlink()  # all is there: it is taken over, if the weights are the same
    assert again() == (0, 4, 0, 0)
    with pytest.raises(ValueError, match=r"window=5, but the records that are there were made with 1"):
        again(Settings(MODEL, device="cpu", backend="chunked", window=5))
    assert sorted(p.name for p in dumps.iterdir()) == ["manifest.sqlite", "texts"]


def test_what_makes_no_sense_leaves_nothing(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = write(tmp_path / "in.jsonl", texts([20]))
    wrong = [
        ({"settings": Settings("no/such")}, "model='no/such'"),
        ({"settings": Settings(MODEL, heads=(9,))}, "heads names head 9"),
        ({"settings": Settings(MODEL, window=0)}, "window=0"),
        ({"settings": Settings(MODEL, tokenizer="no/such")}, "tokenizer"),
        ({"inputs": tmp_path / "none.jsonl"}, "does not exist"),
        ({"inputs": write(tmp_path / "in.odd", [])}, "of no kind"),
        ({"shard": "3/2"}, "shard='3/2'"),
        ({"limit": 0}, "limit=0"),
        ({"dumps": ""}, "dumps is empty"),
        ({"dumps": "s3://key:secret@host/x"}, "user name or password"),
        ({"dumps": "nosuch://x/y"}, "nosuch"),
    ]
    for changes, words in wrong:
        call = {"inputs": source, "dumps": tmp_path / "dumps", "settings": SETTINGS, "scheduler": client}
        with pytest.raises((ValueError, OSError), match=words):
            batch(**{**call, **changes})  # type: ignore[arg-type]
        assert not (tmp_path / "dumps").exists(), changes


def test_shards_share_the_work(client: Any, tmp_path: Path) -> None:
    """Each has a manifest of its own; together they have every text once, and open as one."""
    source, dumps = write(tmp_path / "in.jsonl", texts([30] * 12)), tmp_path / "dumps"
    found = [batch(source, dumps, SETTINGS, scheduler=client, shard=f"{i}/3") for i in (1, 2, 3)]
    assert sum(f.read for f in found) == 12 and all(f.read for f in found)
    assert len(list(dumps.glob("manifest-?-of-3.sqlite"))) == 3
    assert statescope.open_collection(dumps)["steps"].sizes["sequence"] == 12
    assert batch(source, dumps, SETTINGS, scheduler=client).read == 0


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


def test_collection(done: tuple[Path, list[dict[str, Any]], Summary]) -> None:
    """One object: its texts are the records, whatever is asked of it; nothing is read before that."""
    dumps, rows, _ = done
    collection = statescope.open_collection(dumps)
    steps = collection["steps"].to_dataset()
    assert dict(steps.sizes) == {"sequence": 8, "layer": 4, "token": 2500, "head": 8}
    assert steps["sequence"].values.tolist() == [r["id"] for r in rows]
    assert steps["length"].values.tolist() == [len(r["text"]) for r in rows]
    assert steps["kind"].values.tolist() == [r["kind"] for r in rows]
    whole = steps["state_norm"].values
    for i, row in enumerate(rows):
        record = one(dumps, row["id"])
        found = analyses.text_of(collection, row["id"])
        for group in record.children:
            for name, variable in record[group].data_vars.items():
                np.testing.assert_array_equal(found[group][name], variable)
            for dim in ("token", "layer", "head"):
                if dim in record[group].dims:
                    np.testing.assert_array_equal(found[group][dim], record[group][dim])
        assert np.isnan(whole[i, :, len(row["text"]) :]).all()
    picked = {"sequence": [5, 0], "token": np.array([2400, 3, 1499]), "head": 2, "layer": slice(1, None, 2)}
    np.testing.assert_array_equal(
        steps["state_norm"].isel(picked), xr.DataArray(whole, dims=steps["state_norm"].dims).isel(picked)
    )
    assert collection["tokens"]["token_id"].sel(sequence="t1").values[300] == -1
    lazy = statescope.open_collection(dumps, chunks={})["steps"]["state_norm"]
    np.testing.assert_array_equal(lazy.mean("token").values, steps["state_norm"].mean("token").values)
    with pytest.raises(ValueError, match="collection of 8 texts"):
        analyses.overload(collection)


def test_commits_of_a_collection_stay_as_they_were(client: Any, tmp_path: Path) -> None:
    """What is new, changed or gone since the last commit makes a new one; the old one stays readable."""
    needs("icechunk")
    import icechunk

    from statescope.batch.snapshots import commit

    rows = texts([60, 50, 40])
    source, dumps, place = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps", tmp_path / "repository"
    command = ["batch", str(source), "-m", MODEL, "-o", str(dumps), "--backend", "chunked", "--device", "cpu"]
    command += ["--scheduler", client.scheduler.address, "--limit", "2", "--commit", str(place)]
    said = CliRunner().invoke(app, command).output
    first = commit(dumps, place)
    assert said.endswith(f"committed to {place}: snapshot {first}\n")
    rows[0]["text"], rows[1]["text"] = "changed", ""
    batch(write(source, rows), dumps, SETTINGS, scheduler=client)
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(place)))
    second = commit(dumps, repository)
    assert [s.id for s in repository.ancestry(branch="main")][:2] == [second, first]
    found = {
        id: statescope.open_collection(repository.readonly_session(snapshot_id=id).store)
        for id in (first, second)
    }
    assert found[first]["steps"]["sequence"].values.tolist() == ["t0", "t1"]
    assert found[first]["steps"]["length"].values.tolist() == [60, 50]
    assert found[second]["steps"]["sequence"].values.tolist() == ["t0", "t2"]
    now = statescope.open_collection(dumps)
    for name in ("tokens", "steps"):
        xr.testing.assert_identical(found[second][name].to_dataset().load(), now[name].to_dataset().load())
    root = zarr.open_group(repository.readonly_session(snapshot_id=second).store, mode="r")
    assert [place_of(id).removesuffix(".zip") in root for id in ("t0", "t1", "t2")] == [True, False, True]


def test_idle_memory_is_handed_back() -> None:
    """When it has grown by a third over what was left the last time, and not at every text."""
    sizes, calls = iter([500, 480, 500, 600, 650, 490, 600, 640, 640, 700, 840, 800]), list[int]()
    held = Held(lambda: next(sizes), lambda: calls.append(1))
    found = [(held.now(), len(calls)) for _ in range(8)]
    assert found == [(480, 1), (500, 1), (600, 1), (490, 2), (600, 2), (640, 3), (700, 3), (800, 4)]
    assert of_this_process().now() > 2**20


def test_commit_needs_icechunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is said before anything is read."""
    monkeypatch.setitem(sys.modules, "icechunk", None)
    source, dumps = write(tmp_path / "in.jsonl", texts([20])), tmp_path / "dumps"
    command = ["batch", str(source), "-m", MODEL, "-o", str(dumps), "--commit", str(tmp_path / "repository")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code and "pip install 'statescope-ssm[icechunk]'" in result.output
    assert not dumps.exists()


def test_corpus(done: tuple[Path, list[dict[str, Any]], Summary]) -> None:
    """Every text's verdict is the one it has alone; the worst come first."""
    dumps, rows, _ = done
    collection = statescope.open_collection(dumps)
    judged = analyses.corpus(collection, 256)
    alone = {r["id"]: analyses.overload(one(dumps, r["id"]), 256) for r in rows}
    for name, found in alone.items():
        of = judged.sel(sequence=name)
        heads = int((found["verdict"] == "overloaded").sum())
        assert int(of["overloaded_heads"]) == heads
        assert (str(of["verdict"].values) == "overloaded") == (heads > 0)
        expected = float(found["overload_ratio"].max())
        assert float(of["worst_ratio"]) == expected or (np.isnan(expected) and np.isnan(of["worst_ratio"]))
    assert judged["overloaded_heads"].values.tolist() == sorted(
        judged["overloaded_heads"].values, reverse=True
    )
    assert judged.attrs["judged"] == 7 and judged.attrs["sentence"].startswith("Of 8 texts, 7 are longer")
    share = np.mean(
        [(alone[r["id"]]["verdict"].values[0] == "overloaded") for r in rows if len(r["text"]) > 256], 0
    )
    np.testing.assert_allclose(judged["overloaded_share"], share)
    scales = analyses.by_text(analyses.time_scales, collection)
    np.testing.assert_array_equal(
        scales["half_life"].sel(sequence="t5"), analyses.time_scales(one(dumps, "t5"))["half_life"][0]
    )


def test_report_and_info(done: tuple[Path, list[dict[str, Any]], Summary], tmp_path: Path) -> None:
    dumps, _, _ = done
    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(dumps), "-o", str(page), "--train-length", "256"])
    assert result.exit_code == 0, result.output
    written = page.read_text("utf-8")
    assert "Worst texts" in written and "data:image/png" in written and "Of 8 texts" in written
    assert written.index(">t5<") < written.index(">t4<")
    result = CliRunner().invoke(app, ["info", str(dumps)])
    assert result.exit_code == 0 and "8 done, 0 failed, 0 pending" in result.output
    file = dumps / "texts" / place_of("t0")
    assert "1 files), complete" in CliRunner().invoke(app, ["info", str(file)]).output


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    """The estimate of bytes is close to what a run writes; nothing is there afterwards."""
    rows = [*texts([600, 500, 100, 90, 80]), {"id": "bad", "text": ""}]
    source, dumps = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps"
    found = estimate(source, dumps, SETTINGS, workers=2)
    assert (found.texts, found.known, len(found.unreadable)) == (5, 0, 1) and not dumps.exists()
    written = sum(o.bytes or 0 for o in outcomes(rows[:5], dumps))
    assert 0.7 * written < found.bytes < 1.4 * written
    assert found.tokens == pytest.approx(1370, rel=0.2) and found.seconds > 0


def test_bench(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are timed once they are warm, and held against a loop over the same texts."""
    from statescope.experiments.bench import apart
    from statescope.experiments.bench import batch as timed

    monkeypatch.setattr(timed, "Apart", apart.Here)
    monkeypatch.setattr(timed, "LENGTHS", {"cpu": (20, 60)})
    monkeypatch.setattr(timed, "_numbers", lambda: [1])
    monkeypatch.setattr(timed, "workers_of", lambda *_: nullcontext((client, False)))
    one, loop = timed.measure(BenchSettings.of(False, ("batch",), model=MODEL, texts=5))
    assert (one["workers"], len(one["devices"]), loop["workers"], loop["texts_read"]) == (1, 1, 0, 5)
    assert loop["workers_over_loop"] == {"1": one["tokens_per_s"] / loop["tokens_per_s"]}
    for entry in (one, loop):
        assert entry["texts_per_s"] * entry["seconds"] == pytest.approx(5)
        assert 100 < entry["tokens_per_s"] * entry["seconds"] < 300
    said = [line for entry in (one, loop) for line in timed.describe(entry)]
    assert "1 workers: " in said[0] and "5 in a loop over trace" in said[1]


@pytest.mark.parametrize(("workers", "largest"), [(1, 4 * 8192), (5, 2 * 8192), (100, 8192)])
def test_pieces_are_of_similar_sizes(workers: int, largest: int) -> None:
    """The fewer the workers, the more forward passes of 8,192 bytes a piece has, up to four."""
    sizes = np.random.default_rng(0).integers(1, 5000, 300)
    found = list(pieces([Waiting(str(i), "", "", int(n)) for i, n in enumerate(sizes)], 8192, workers))
    assert sorted(w.id for p in found for w in p) == sorted(str(i) for i in range(300))
    assert all(sum(w.size for w in p) <= largest or len(p) == 1 for p in found)
    assert max(sum(w.size for w in p) for p in found) > largest / 2
    edges = [(p[0].size, p[-1].size) for p in found]
    assert all(a[1] >= b[0] for a, b in pairwise(edges))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    asked = [Text("a", "0", place_of("a"), "text")]
    with pytest.raises(ValueError, match="other weights on this worker"):
        work(asked, SETTINGS, Facts(2048, "others", "cpu"), Dumps.at(tmp_path), "test")


def test_manifest_is_all_or_nothing(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[Row, str | None]]:
        yield Row(0, "a", "text"), "hash"
        raise KeyboardInterrupt

    with Manifest(tmp_path / "m.sqlite") as manifest:
        with pytest.raises(KeyboardInterrupt):
            manifest.register(rows())
        assert not list(manifest.texts())
    (tmp_path / "m.sqlite").write_text("no database, but long enough to look like one" * 9)
    with pytest.raises(ValueError, match="no manifest"):
        Manifest(tmp_path / "m.sqlite")
    assert sqlite3.sqlite_version_info > (3, 24)


def test_secrets_are_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcSECRETdef")
    said = without_secrets("no abcSECRETdef at https://user:pass@host/x")
    assert said == "no *** at https://***@host/x"
