"""The benchmark verifies before it times, loses nothing to a failure, and names what it could not run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import needs
from test_cli import call

import statescope
from statescope.adapters import ADAPTERS
from statescope.experiments.bench import (
    accuracy,
    apart,
    command,
    families,
    floor,
    forward,
    scans,
    signatures,
    stream,
    subjects,
)
from statescope.experiments.bench.settings import Settings
from statescope.experiments.bench.timing import Timing, take_turns
from statescope.kernels import chunked, reference

TINY = subjects.Shape(layers=2, width=32, heads=8, value=8, key=8)
MODEL = "mamba2-byte-n16-t512"
RATES = {
    "copy_bandwidth_bytes_per_s": 1e9,
    "matrix_product_size": 8,
    "matrix_product_operations_per_s": 1e9,
}


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(subjects.SHAPES, "370M", TINY)
        patch.setattr(scans, "VERIFIED", 70)
        patch.setattr(scans, "STEPPED", 8)
        patch.setattr(accuracy, "STEPPED", 80)
        patch.setattr(floor, "rates", lambda **_: RATES)
        yield


def settings(*parts: str) -> Settings:
    chosen = Settings.of(False, lengths=(100,), rounds=1, model=MODEL, forward=40, stream=(40, 80))
    return replace(chosen, parts=parts, accuracy=(1, 63, 180), tails=(300,), tail=20, families=20)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """One run of three parts: the result file as read, what was said, and where it lies."""
    said: list[str] = []
    path = tmp_path_factory.mktemp("bench") / "result.json"
    command.run(settings("accuracy", "scan", "forward"), path, said.append)
    return json.loads(path.read_text(encoding="utf-8")), "\n".join(said), path


def test_result_says_where_it_comes_from(measured: tuple[dict[str, Any], str, Path]) -> None:
    result, said, path = measured
    assert {"device", "dtype", "date", "versions", *RATES} <= set(result) and result["failed"] == []
    assert result["command"].startswith("statescope bench --parts accuracy,scan,forward --shapes 370M")
    assert str(path.parent) not in path.read_text(encoding="utf-8")
    assert result["device"] in said


def test_errors_are_those_of_the_kernel(measured: tuple[dict[str, Any], str, Path]) -> None:
    lengths, ours, peer = measured[0]["accuracy"]
    assert [(r["tokens"], r["dtype"]) for r in lengths["rows"]] == [
        (n, d) for d in ("bfloat16", "float32") for n in (1, 63, 180)
    ]
    for row in lengths["rows"]:
        assert 0 < row["errors"]["state_norm rms"] < 1e-5 and 0 < row["errors"]["y"] < 1e-5
    agreement = lengths["chunked_against_stepping"]
    assert set(agreement) == {"first 80", "last 50"}
    assert max(max(e.values()) for e in agreement.values()) < 1e-12
    assert 0 < ours["errors"]["state_norm worst"] < 1e-5
    if not torch.cuda.is_available():
        assert "mamba_ssm" in peer["skipped"]


def test_scan_rows(measured: tuple[dict[str, Any], str, Path]) -> None:
    [entry] = measured[0]["scan"]
    rows = {row["name"]: row for row in entry["rows"]}
    assert rows["transformers in torch"]["ratios"]["transformers in torch"] == 1
    stepped = rows["one token at a time"]
    assert stepped["times_ours"] == pytest.approx(stepped["median_ms"] / rows[scans.OURS]["median_ms"])
    least = entry["floor"]
    assert least["measured_over_floor"] == pytest.approx(rows[scans.OURS]["median_ms"] / least["ms"])
    # x, y of 8 x 8; B, C of 8; dt and five fields of 8; and one state
    assert least["bytes"] == 4 * (100 * (2 * 64 + 2 * 8 + 6 * 8) + 8 * 64)
    assert least["operations"] == 100 * 2 * 8 * (5 * 64 + 64 * 32)
    if not torch.cuda.is_available():
        assert "mamba_ssm" in rows["mamba_ssm"]["skipped"] and "mamba_ssm" in measured[1]


def test_forward_rows(measured: tuple[dict[str, Any], str, Path]) -> None:
    entry, without = measured[0]["forward"]
    rows = {row["name"]: row for row in entry["rows"]}
    assert rows["transformers"]["ratios"] == {"transformers": 1}
    assert all(rows[name]["median_ms"] > 0 for name in forward.ON_CPU)
    assert sum(name.startswith("traced, ") for name in rows) == 6
    for key, rival in forward.RIVALS.items():
        if "skipped" in rows[rival]:
            assert rival == forward.ZARRS and key not in entry
        else:
            assert entry[key]["bytes"] == 5 * 4 * 8 * 40 * 4  # fields, layers, heads, tokens, float32
            ratio = rows[rival]["median_ms"] / rows[forward.TO_DISK]["median_ms"]
            assert entry[key]["ratio"] == pytest.approx(ratio)
    assert "skipped" in without


def test_plain_zarr_writes_the_same_files(tmp_path: Path) -> None:
    ids = torch.randint(0, 256, (1, 300))
    statescope.trace(MODEL, ids, store=tmp_path / "run.zarr", segment=100)
    forward.Arrays(tmp_path / "run.zarr").write(tmp_path / "again.zarr")
    first, again = (zarr.open_group(tmp_path / name, mode="r") for name in ("run.zarr/steps", "again.zarr"))
    names = {name for name, array in first.arrays() if array.ndim > 1}
    assert names == set(again.array_keys()) and len(names) == 5
    for name in names:
        a, b = first[name], again[name]
        assert (a.chunks, a.shards, a.compressors) == (b.chunks, b.shards, b.compressors)
        np.testing.assert_array_equal(a[:], b[:])
        sizes = [
            sorted(
                (p.relative_to(root).as_posix(), p.stat().st_size)
                for p in root.rglob("c/**/*")
                if p.is_file()
            )
            for root in (tmp_path / "run.zarr" / "steps" / name, tmp_path / "again.zarr" / name)
        ]
        assert sizes[0] == sizes[1] and sizes[0]


def test_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "Apart", apart.Here)
    short, long, flat = stream.measure(settings("stream"))
    assert short["tokens"] == 40 and long["tokens_per_s"] > 0 and long["store_files"] > 10
    assert flat["between"] == [40, 80] and flat["flatness"]["peak_host_bytes"] == pytest.approx(1, abs=0.2)
    assert all("skipped" not in entry for entry in (short, long))


def test_no_room_on_the_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="GB free"):
        stream.one(MODEL, 40, 1, "cpu", "float32", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_failing_contestant_is_out_and_the_rest_go_on() -> None:
    calls: list[str] = []

    def fails() -> None:
        calls.append("fails")
        raise RuntimeError("no such luck\nand more")

    good, bad = take_turns({"good": lambda: calls.append("good"), "bad": fails}, 2, "cpu", warm=1)
    assert len(good.seconds) == 2 and calls == ["good", "fails", "good", "good"]
    assert bad.row({}) == {"name": "bad", "skipped": "RuntimeError: no such luck"}


def test_a_job_that_dies_costs_its_own_result_only(capsys: pytest.CaptureFixture[str]) -> None:
    with apart.Apart({"STATESCOPE_BENCH_TEST": "1"}, without=["colorsys"]) as work:
        assert work.call("bench_jobs.works", number=2) == {"twice": 4, "seen": "1"}
        with pytest.raises(apart.Lost, match="ValueError: not like this"):
            work.call("bench_jobs.raises")
        with pytest.raises(apart.Lost, match="code -9"):
            work.call("bench_jobs.dies")
        with pytest.raises(apart.Lost, match="colorsys"):
            work.call("bench_jobs.imports")
        assert work.call("bench_jobs.works", number=3)["twice"] == 6
    said = [line.split(" s: ")[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["double 2", "double 3"]


def test_a_part_that_breaks_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(_: Settings) -> Iterator[dict[str, Any]]:
        yield {"check": "tail", "skipped": "one entry", "tail": 1, "tokens": 2, "heads": 1, "value": 1,
               "key": 1, "who": "statescope", "error": float("nan")}  # fmt: skip
        raise MemoryError("all gone")

    monkeypatch.setattr(accuracy, "measure", breaks)
    command.run(settings("accuracy", "scan"), tmp_path / "r.json", lambda _: None)
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert result["accuracy"][0]["error"] == "nan" and len(result["scan"]) == 1
    assert result["failed"] == [{"part": "accuracy", "reason": "MemoryError: all gone"}]


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = scans.scan
    monkeypatch.setattr(scans, "scan", lambda r, **how: real(r.replace(v=1.1 * r.v), **how))
    with pytest.raises(scans.WrongKernel, match="is wrong here"):
        scans.verify(TINY, "cpu", torch.float32)
    output = tmp_path / "r.json"
    code, said = call(
        "bench", "--parts", "scan", "--shapes", "370M", "--lengths", 100, "--rounds", 1, "-o", output
    )  # fmt: skip
    [entry] = json.loads(output.read_text(encoding="utf-8"))["scan"]
    assert (
        code == 1 and "rows" not in entry and "is wrong here" in entry["refused"] and "is wrong here" in said
    )


@pytest.mark.parametrize("name", subjects.SIGNATURES)
def test_signatures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "VERIFIED", 70)
    monkeypatch.setattr(signatures, "LONGEST", 50)
    for each in subjects.SIGNATURES:
        monkeypatch.setitem(subjects.SIGNATURES, each, subjects.Signature(4, 8, 8))
    _, entry = scans.measure(replace(settings("scan"), shapes=(name,), lengths=(90,)))
    assert entry["tokens"] == 50 and max(entry["errors"].values()) < 1e-5
    rows = {row["name"]: row for row in entry["rows"]}
    assert rows[signatures.PLAIN]["ratios"][signatures.PLAIN] == 1 and rows[signatures.OURS]["median_ms"] > 0
    peer = signatures.PEER_SCANS[name][0].partition(".")[0]
    assert "median_ms" in rows[peer] or rows[peer]["skipped"]
    assert any(peer in line for line in scans.describe(entry))


def test_a_wrong_signature_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = signatures.scan
    monkeypatch.setattr(signatures, "scan", lambda r: real(r.replace(v=1.1 * r.v)))
    monkeypatch.setattr(signatures, "VERIFIED", 20)
    monkeypatch.setitem(subjects.SIGNATURES, "GLA", subjects.Signature(2, 8, 8))
    [entry] = signatures.measure("GLA", settings("scan"), apart.Here())
    assert "rows" not in entry and "chunked is wrong here: error of y" in entry["refused"]


def test_families(monkeypatch: pytest.MonkeyPatch) -> None:
    every = {model for a in ADAPTERS.values() for model in a.models if model.islower()}
    assert set(families.CONFIGS) == every
    chosen = {name: families.CONFIGS[name] for name in ("mamba", "qwen3_5_text")}
    monkeypatch.setattr(families, "CONFIGS", chosen | {"falcon_mamba": {"state_size": "none"}})
    *timed, failed = families.measure(settings("families"))
    assert [entry["family"] for entry in timed] == list(chosen) and "skipped" in failed
    for entry in timed:
        rows = {row["name"]: row for row in entry["rows"]}
        assert rows[families.PLAIN]["ratios"][families.PLAIN] == 1
        assert all(rows[name]["ratios"][families.PLAIN] > 0 for name in (families.OWN, families.OURS))
        assert any("traced" in line for line in families.describe(entry))


def test_a_lost_peer_costs_its_own_row_only() -> None:
    class Fragile(apart.Here):
        def call(self, function: str, **arguments: Any) -> Any:
            if arguments.get("peer"):
                raise apart.Lost("CUDA error: an illegal memory access was encountered")
            return super().call(function, **arguments)

    where = {"shape": vars(TINY), "device": "cpu", "dtype": "float32"}
    rows = {r["name"]: r for r in scans._entry(Fragile(), 50, 1, where)["rows"]}
    assert "illegal memory access" in rows["mamba_ssm"]["skipped"] and rows[scans.OURS]["median_ms"] > 0


def test_float64_chunks_bring_the_state_to_a_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "STRETCH", 50)
    r = subjects.as_recurrence(subjects.draw(TINY, 130, "cpu", torch.bfloat16))
    want = reference.scan(r.between(0, 120, None)).final_state
    assert accuracy.relative(accuracy.state_before(r, 120), want) < 1e-13
    assert accuracy.relative(chunked.scan(r.between(0, 120, None)).final_state, want) > 1e-13  # in float32


def test_picture(measured: tuple[dict[str, Any], str, Path]) -> None:
    needs("seaborn")
    code, said = call("bench", "--draw", measured[2])
    picture = measured[2].with_suffix(".png")
    assert code == 0 and str(picture) in said and picture.read_bytes()[:4] == b"\x89PNG"


def test_picture_needs_something_to_draw(tmp_path: Path) -> None:
    needs("seaborn")
    (tmp_path / "r.json").write_text('{"device": "CPU", "dtype": "float32"}', encoding="utf-8")
    code, said = call("bench", "--draw", tmp_path / "r.json")
    assert code == 0 and "nothing to draw" in said and not (tmp_path / "r.png").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--shapes", "9B"), "shapes names '9B'"),
        (("--parts", "speed"), "parts names 'speed'"),
        (("--model", "x"), "model names 'x'"),
        (("--rounds", "-1"), "rounds"),
        (("--lengths", "0"), "lengths"),
    ],
    ids=str,
)
def test_errors_name_the_argument(arguments: tuple[str, str], named: str) -> None:
    code, said = call("bench", *arguments)
    assert code == 2 and said.startswith("error: ") and named in said


def test_a_row_without_rounds_says_so() -> None:
    assert Timing("x").row({}) == {"name": "x", "skipped": "not run"}
