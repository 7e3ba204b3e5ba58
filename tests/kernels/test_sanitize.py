"""The script that is run under compute-sanitizer, here without it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from conftest import needs

needs("triton")
sys.path.insert(0, str(Path(__file__).parent))
sanitize = importlib.import_module("sanitize")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")


def test_scans_run(capsys: pytest.CaptureFixture[str]) -> None:
    sanitize.run(sanitize.SCANS[:3])
    assert "4 scans" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 1])
def test_record(code: int, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text(
        f"#!/bin/sh\necho '========= ERROR SUMMARY: {code} errors'\nexit {code}\n", encoding="utf-8"
    )
    tool.chmod(0o755)
    assert sanitize.record(tmp_path / "r.json", str(tool)) is (code == 0)
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert {"command", "date", "device", "versions", "scans"} <= set(result)
    for name in ("memcheck", "racecheck"):
        assert result["tools"][name]["summary"] == [f"ERROR SUMMARY: {code} errors"]
        assert result["tools"][name]["exit_code"] == code
