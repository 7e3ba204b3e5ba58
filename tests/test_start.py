"""Starting is cheap: nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "xarray",
    "zarr",
    "matplotlib",
    "seaborn",
    "sklearn",
    "pandas",
    "triton",
)


@pytest.mark.parametrize(
    "start",
    ["import statescope", "from statescope.cli import app; app(['--help'], standalone_mode=False)"],
    ids=["import", "help"],
)
def test_nothing_heavy(start: str) -> None:
    code = f"{start}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_analyses_never_import_torch() -> None:
    code = "import statescope.analyses, statescope.record, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names() -> None:
    import statescope

    assert all(getattr(statescope, name) is not None for name in statescope.__all__)
    assert "trace" in dir(statescope)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = statescope.nothing_such
