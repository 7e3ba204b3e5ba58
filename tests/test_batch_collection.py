"""A batch as one labelled object: what is read of it, committed of it and reported of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from batches import MODEL, SETTINGS, one, texts, write
from conftest import needs
from typer.testing import CliRunner

import statescope
from statescope import analyses
from statescope.batch.command import Summary, batch
from statescope.batch.manifest import place_of
from statescope.cli import app

needs("distributed")


def test_collection(batched: tuple[Path, list[dict[str, Any]], Summary]) -> None:
    """One object: its texts are the records, whatever is asked of it; nothing is read before that."""
    dumps, rows, _ = batched
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


def test_commit_needs_icechunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is said before anything is read."""
    monkeypatch.setitem(sys.modules, "icechunk", None)
    source, dumps = write(tmp_path / "in.jsonl", texts([20])), tmp_path / "dumps"
    command = ["batch", str(source), "-m", MODEL, "-o", str(dumps), "--commit", str(tmp_path / "repository")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code and "pip install 'statescope-ssm[icechunk]'" in result.output
    assert not dumps.exists()


def test_corpus(batched: tuple[Path, list[dict[str, Any]], Summary]) -> None:
    """Every text's verdict is the one it has alone; the worst come first."""
    dumps, rows, _ = batched
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


def test_report_and_info(batched: tuple[Path, list[dict[str, Any]], Summary], tmp_path: Path) -> None:
    dumps, _, _ = batched
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
