"""The benchmark verifies before it times, and names what it could not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_cli import call

from statescope.experiments import bench

TINY = bench.Shape(layers=2, width=32, heads=8, value=8, key=8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", {"130M": TINY})
    monkeypatch.setattr(bench, "VERIFIED", 70)


def test_result_file(tmp_path: Path) -> None:
    code, said = call(
        "bench",
        "--shapes",
        "130M",
        "--lengths",
        "100",
        "--rounds",
        1,
        "--no-end-to-end",
        "-o",
        tmp_path / "r.json",
    )
    assert code == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"device", "date", "command", "versions", "copy_bandwidth_bytes_per_s"} <= set(result)
    rows = {row["name"]: row for row in result["scan"][0]["rows"]}
    assert rows["transformers in torch"]["ratio"] == 1 and rows["one token at a time"]["median_ms"] > 0
    if not torch.cuda.is_available():
        assert "mamba_ssm" in rows["mamba_ssm"]["skipped"] and "skipped" in said


def test_whole_model() -> None:
    rows = bench.bench_trace(bench.random_model(TINY, "cpu", torch.float32), tokens=40, rounds=1, segment=16)
    assert rows[0]["name"] == "plain forward" and rows[0]["ratio"] == 1
    assert all(row["median_ms"] > 0 for row in rows) and len(rows) == 6


def test_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.scan
    monkeypatch.setattr(bench, "scan", lambda r: real(r.replace(v=1.1 * r.v)))
    with pytest.raises(RuntimeError, match="is wrong here"):
        bench.verify(TINY, "cpu", torch.float32)


def test_unknown_shape_is_named() -> None:
    code, said = call("bench", "--shapes", "9B")
    assert code == 2 and "'9B'" in said
