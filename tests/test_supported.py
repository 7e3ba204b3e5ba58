"""The table of what is supported: true, complete, and the one in the README."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import needs
from test_fla import MODELS
from tiny import CONFIGS
from typer.testing import CliRunner

from statescope.adapters import ADAPTERS
from statescope.cli import app
from statescope.supported import HEADINGS, as_markdown, as_text, example, rows


def test_readme_has_the_table() -> None:
    """``statescope models --format md`` makes what the README says."""
    needs("triton")
    printed = CliRunner().invoke(app, ["models", "--format", "md"])
    assert printed.exit_code == 0 and printed.stdout == as_markdown()
    assert as_markdown() in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_table_is_complete() -> None:
    """Every adapter has a row, every model type a tiny model in the tests of all families."""
    found = rows()
    assert {r.signature for r in found} == {a.signature for a in ADAPTERS.values()}
    for adapter in ADAPTERS.values():
        row = next(r for r in found if r.signature == adapter.signature)
        alike = (", ".join(adapter.models), adapter.structure, adapter.note)
        assert (row.models, row.structure, row.note) == alike
        assert example(adapter.structure).structure == adapter.structure
    named = {name for adapter in ADAPTERS.values() for name in adapter.models if " " not in name}
    assert named == {*CONFIGS, *MODELS}
    assert all(row.cpu == "chunked" and row.gpu in ("fused", "chunked") for row in found)


def test_text() -> None:
    """One paragraph per scan, with all its columns."""
    printed = CliRunner().invoke(app, ["models"]).stdout
    assert printed == as_text()
    paragraphs = printed.split("\n\n")
    assert len(paragraphs) == len(rows())
    for row, paragraph in zip(rows(), paragraphs, strict=True):
        assert all(text in paragraph for text in row)
        assert all(f"  {heading} " in paragraph for heading in HEADINGS[1:-1])


def test_structure_is_known() -> None:
    with pytest.raises(ValueError, match="structure='decay per mood' is none"):
        example("decay per mood")
