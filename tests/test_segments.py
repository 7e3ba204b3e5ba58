"""How a text is cut into forward passes changes nothing, on the bundled checkpoints and book text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from tiny import Collected

import statescope
from statescope.carry import Carry
from statescope.reader import Reader
from statescope.watch import Watch

CHECKPOINTS = ("mamba2-byte-n16-t512", "mamba2-byte-n64-t512")
KEPT = {"probes": [300, -1], "snapshots": [0, 99, 299]}
RMS = 1e-5


def assert_close(got: xr.DataTree, want: xr.DataTree) -> None:
    for group in ("tokens", "steps", "snapshots", "probes"):
        for name in want[group].data_vars:
            a, b = (np.nan_to_num(record[group][name].values.astype(np.float64)) for record in (got, want))
            assert np.array_equal(got[group][name].isnull(), want[group][name].isnull()), name
            assert np.sqrt(((a - b) ** 2).mean()) <= RMS * max(np.sqrt((b**2).mean()), 1e-3), name


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize(("segment", "tokens"), [(1, 320), (7, 400), (100, 1000), (4096, 6000)])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_pass_against_segments(
    name: str, segment: int, tokens: int, backend: str, book: np.ndarray
) -> None:
    model = statescope.load(name)
    whole = statescope.trace(model, book[:tokens], segment=tokens, backend=backend, **KEPT)
    cut = statescope.trace(model, book[:tokens], segment=segment, backend=backend, **KEPT)
    assert_close(cut, whole)


@pytest.mark.parametrize("own_outputs", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_token_at_a_time(name: str, own_outputs: bool, book: np.ndarray) -> None:
    """As in generation: every token after the first through the model's single-token function."""
    model, ids = statescope.load(name), torch.tensor(book[None, :150])
    watch = Watch.resolve(tokens=150, model_layers=range(4), model_heads=8)
    reader = Reader(model, ids, watch, "chunked", own_outputs)
    carry, seen = Carry.fresh(model), Collected()
    with reader.attached():
        for stop in range(1, 151):
            reader.read(carry, stop, seen)
    want = statescope.trace(model, ids)
    for variable in want["steps"].data_vars:
        got = np.stack([seen.joined(layer, str(variable)) for layer in range(4)], 1)
        truth = want["steps"][variable].values
        assert np.sqrt(((got - truth) ** 2).mean()) <= RMS * np.sqrt((truth**2).mean()), variable
