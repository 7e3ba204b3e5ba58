"""The command line, run as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import statescope
from statescope.cli import app
from statescope.cli.given import integers

MODEL = "mamba2-byte-n16-t512"


def call(*arguments: object, stdin: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_trace_and_info(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The grass is green. " * 20, encoding="utf-8")
    store = tmp_path / "run.zarr"
    code, said = call("trace", MODEL, text, "-o", store, "--layers", "1:3", "--probes", "-1", "--reach", 8)
    assert code == 0
    record = statescope.open(store)
    assert record["steps"].sizes["token"] == 400 and list(record["steps"]["layer"]) == [1, 2]
    assert int(record["probes"]["share"].notnull().sum()) == 8 * 2 * 8
    assert "400 tokens" in said and "complete" in said
    assert call("info", store) == (0, said)


def test_text_itself_and_standard_input(tmp_path: Path) -> None:
    assert call("trace", MODEL, "héllo", "-o", tmp_path / "a.zarr")[0] == 0
    assert call("trace", MODEL, "-", "-o", tmp_path / "b.zarr", stdin="héllo")[0] == 0
    a, b = (statescope.open(tmp_path / name)["tokens"]["token_id"] for name in ("a.zarr", "b.zarr"))
    assert a.equals(b) and bytes(a.values[0].tolist()).decode() == "héllo"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("trace", MODEL, "", "-o", "x.zarr"), "text is empty"),
        (("trace", "no/such", "hi", "-o", "x.zarr"), "model='no/such'"),
        (("trace", MODEL, "hi", "-o", "x.zarr", "--heads", "9"), "heads names head 9"),
        (("trace", MODEL, "hi", "-o", "x.zarr", "--heads", "a"), "heads='a'"),
        (("info", "x.zarr"), "does not exist"),
    ],
    ids=str,
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, said = call(*arguments)
    assert code == 2 and said.startswith("error: ") and named in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    code, said = call("trace", MODEL, tmp_path / "binary", "-o", tmp_path / "x.zarr")
    assert code == 2 and "not UTF-8" in said


def testintegers() -> None:
    assert integers("layers", "0,3,8:12,-1") == [0, 3, 8, 9, 10, 11, -1]
    assert integers("layers", ":512:128") == [0, 128, 256, 384]
    assert integers("layers", None) is None


def test_demo(tmp_path: Path) -> None:
    code, said = call("demo", "-o", tmp_path / "demo")
    assert code == 0
    rows = [line.split() for line in said.splitlines() if line.startswith("mamba2-")]
    right = {(row[0], int(row[1])): row[2] for row in rows}
    assert right["mamba2-byte-n16-t512", 512] == right["mamba2-byte-n64-t512", 512] == "4/4"
    assert right["mamba2-byte-n16-t512", 1024] == "4/4" and right["mamba2-byte-n64-t512", 1024] == "0/4"
    assert right["mamba2-byte-n16-t512", 2048] == "3/4" and right["mamba2-byte-n64-t512", 2048] == "0/4"
    assert right["mamba2-byte-n32-t2048", 2048] == "4/4" and len(right) == 7  # it is asked there only
    assert (tmp_path / "demo" / "passkey.png").stat().st_size > 20_000
    record = statescope.open(tmp_path / "demo" / "mamba2-byte-n64-t512-2048.zarr")
    assert record.attrs["complete"] and record["probes"].sizes["token"] == 2048
