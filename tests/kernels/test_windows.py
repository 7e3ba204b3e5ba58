"""Thinning against numpy in float64; the kernel in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import needs
from tiny import thinned

needs("triton")

from statescope.kernels.windows import ENTRIES, in_one_pass, thin  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUNCTIONS = pytest.mark.parametrize("function", [in_one_pass, thin])


def draw(time: int, heads: int, seed: int = 0) -> np.ndarray:
    steps = np.random.default_rng(seed).standard_normal((5, 2, time, heads)).astype("f4")
    steps[1:3] = np.abs(steps[1:3])
    return steps


@FUNCTIONS
@pytest.mark.parametrize(("time", "window"), [(1, 2), (7, 2), (64, 64), (130, 64), (200, 100), (61, 150)])
@pytest.mark.parametrize("heads", [1, 3, 33])
def test_against_numpy(time: int, window: int, heads: int, function) -> None:
    steps = draw(time, heads)
    steps[1, :, : window + 1, 0] = 0  # nothing is written in the first window
    expected = thinned(steps, window)
    found = function(torch.from_numpy(steps).to(DEVICE), window).cpu()
    assert found.dtype == torch.float32 and found.shape == (6, 2, -(-time // window), heads)
    assert list(expected) == list(ENTRIES)
    for got, (name, values) in zip(found, expected.items(), strict=True):
        np.testing.assert_allclose(got, values, rtol=2e-6, atol=1e-6, err_msg=name)


@FUNCTIONS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_not_finite_stays_in_its_entry(function) -> None:
    steps = draw(20, 3)
    steps[0, 0, 3, 0], steps[1, 0, 7, 1] = np.nan, np.inf
    steps[2, 1, 10, 2], steps[2, 1, 16, 0], steps[4, 1, 2, 1] = np.nan, np.inf, np.nan
    found = function(torch.from_numpy(steps).to(DEVICE), 5).cpu().numpy()
    clean = function(torch.from_numpy(np.nan_to_num(steps, posinf=0.0)).to(DEVICE), 5).cpu().numpy()
    spoilt = {(0, 0, 0, 0), (1, 0, 1, 1), (4, 0, 1, 1), (5, 1, 2, 2), (5, 1, 3, 0), (4, 1, 0, 1)}
    assert {tuple(map(int, at)) for at in np.argwhere(~np.isfinite(found))} == spoilt
    assert np.isnan(found[5, 1, 2, 2]) and found[5, 1, 3, 0] == np.inf and found[1, 0, 1, 1] == np.inf
    same = np.isfinite(found)
    np.testing.assert_array_equal(found[same], clean[same])
