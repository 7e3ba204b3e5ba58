"""Batches: texts read together and alone, again and in shards."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import IGNORED, MODEL, SETTINGS, one, outcomes, text, texts, write
from conftest import needs
from tiny import assert_close, assert_identical, build

import statescope
from statescope.batch import drafts
from statescope.batch import work as working
from statescope.batch.command import Summary, batch
from statescope.batch.manifest import place_of
from statescope.batch.settings import Settings
from statescope.store import RecordWriter

needs("distributed")


def test_as_one_by_one(batched: tuple[Path, list[dict[str, Any]], Summary]) -> None:
    """Read alone a text's record is that of a trace, bit for bit; read together, to rounding."""
    dumps, rows, summary = batched
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
    """In other families, and beside attention; nor does that of a GPU's rows, which all texts have."""
    model, own = build(family), working._width
    assert own((40, 65), torch.device("cpu")) == 65 and own((40, 65), torch.device("cuda")) == 128
    monkeypatch.setattr(working, "_width", lambda lengths, _: own(lengths, torch.device("cuda")))
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
