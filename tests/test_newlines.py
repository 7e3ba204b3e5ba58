"""The newlines prompt, and the state statistics that a record of it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import statescope
from statescope.cli import app
from statescope.experiments.newlines import newline_ids, newlines

MODEL = "mamba2-byte-n64-t512"


@pytest.fixture(scope="module")
def record() -> xr.DataTree:
    """Trace it once."""
    return newlines(MODEL, 300, snapshots=[0, 9, 299])


def test_every_token_is_a_line_break(record: xr.DataTree) -> None:
    assert record["tokens"]["token_id"].values.tolist() == [[10] * 300]


def test_mean_and_variance_of_every_head(record: xr.DataTree) -> None:
    states = record["snapshots"]["state"].astype("float64")
    at = states["position"].values
    steps = record["steps"].to_dataset().astype("float64").sel(token=at).rename(token="position")
    entries = states.sizes["key"] * states.sizes["value"]
    mean, square = steps["state_mean"], steps["state_norm"] ** 2 / entries
    expected = states.mean(("key", "value")).transpose(*mean.dims)
    variance = states.var(("key", "value")).transpose(*mean.dims)
    np.testing.assert_allclose(mean, expected, atol=1e-5 * float(np.sqrt(square.max())))
    np.testing.assert_allclose(square - mean**2, variance, rtol=1e-4)
    assert float(variance.min()) > 0


def test_longer_prompts_begin_alike(record: xr.DataTree) -> None:
    longer = newlines(MODEL, 500, segment=128, window=100, layers=[0, 3])
    same = record["steps"]["state_norm"].sel(token=[99, 199, 299], layer=[0, 3])
    np.testing.assert_allclose(longer["steps"]["state_norm"].isel(token=slice(3)), same, rtol=1e-5)


def test_from_the_shell(tmp_path: Path, record: xr.DataTree) -> None:
    store = tmp_path / "run.zarr"
    result = CliRunner().invoke(app, ["trace", MODEL, "--newlines", "300", "-o", str(store)])
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(
        statescope.open(store)["steps"]["state_norm"], record["steps"]["state_norm"]
    )
    for arguments in ([], ["text", "--newlines", "3"]):
        result = CliRunner().invoke(app, ["trace", MODEL, *arguments, "-o", str(tmp_path / "x.zarr")])
        assert result.exit_code == 2 and "either a text or --newlines" in result.output


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True])
def test_wrong_lengths_are_named(tokens: Any) -> None:
    with pytest.raises(ValueError, match=f"tokens={tokens}"):
        newlines(MODEL, tokens)


class Words:
    """Encodes every text alike."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Encode."""
        return {"input_ids": self.ids}

    def decode(self, ids: list[int]) -> str:
        """Decode one token."""
        return {13: "\n", 29871: ""}.get(ids[0], "?")


def test_other_tokenizers() -> None:
    assert newline_ids(Words([29871, 13]), 3).tolist() == [13, 13, 13]
    with pytest.raises(ValueError, match=r"a line break as \[7, 8\]"):
        newline_ids(Words([7, 8]), 3)
