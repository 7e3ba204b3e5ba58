"""Recall length and its interval, on tables whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from statescope.analyses.passkey import recall_length, wilson


def table(successes: dict[int, list[int]], trials: int) -> xr.Dataset:
    """Answers with given successes by length and depth."""
    rows = [
        [[float(t < right) for t in range(trials)] for right in by_depth] for by_depth in successes.values()
    ]
    depths = np.linspace(0, 1, len(rows[0]))
    correct = xr.DataArray(
        np.array(rows),
        {"length": list(successes), "depth": depths, "trial": range(trials)},
        ("length", "depth", "trial"),
    )
    return xr.Dataset({"correct": correct})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_wilson_is_scipys(data: st.DataObject) -> None:
    trials = data.draw(st.integers(1, 2000))
    successes = data.draw(st.integers(0, trials))
    confidence = data.draw(st.sampled_from([0.5, 0.9, 0.95, 0.999]))
    expected = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    found = wilson(np.array(successes), np.array(trials), confidence)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_recall_length_and_its_interval() -> None:
    found = recall_length(table({100: [200, 200], 200: [196, 196], 400: [191, 188], 800: [150, 9]}, 200))
    assert found["successes"].values.tolist() == [400, 392, 379, 159]
    assert found["trials"].values.tolist() == [400] * 4
    assert found["recall_length"] == 200  # at 400 tokens 94.75 % are right
    assert found["recall_length_low"] == 200 and found["recall_length_high"] == 800
    assert (found["accuracy_low"] < found["accuracy"]).all()


def test_few_trials_decide_nothing() -> None:
    found = recall_length(table({100: [4], 200: [4]}, 4))
    assert found["recall_length"] == 200
    assert found["recall_length_low"] == 0 and np.isinf(found["recall_length_high"])


def test_a_length_beyond_a_failure_does_not_count() -> None:
    found = recall_length(table({100: [100], 200: [10], 400: [100]}, 100))
    assert found["recall_length"] == 100 and np.isinf(found["recall_length_high"])
    assert recall_length(table({100: [10], 200: [100]}, 100))["recall_length"] == 0


def test_order_gaps_and_depths() -> None:
    answers = table({100: [50, 50], 200: [50, 2], 400: [2, 2]}, 50)
    by_depth = recall_length(answers.isel(length=[2, 0, 1]), over="trial")
    assert by_depth["recall_length"].values.tolist() == [200, 100]
    answers["correct"][1, 1, 10:] = np.nan
    assert recall_length(answers)["trials"].values.tolist() == [100, 60, 100]
    answers["correct"][2] = np.nan
    with pytest.raises(ValueError, match="none at length 400"):
        recall_length(answers)


def test_interval_holds_the_truth() -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([100, 200, 400, 800, 1600])
    accuracy = np.array([0.995, 0.985, 0.965, 0.9, 0.6])  # the truth: 400
    held = 0
    for _ in range(300):
        right = rng.random((5, 1, 150)) < accuracy[:, None, None]
        drawn = xr.DataArray(right.astype(float), {"length": lengths}, ("length", "depth", "trial"))
        found = recall_length(xr.Dataset({"correct": drawn}))
        held += bool(found["recall_length_low"] <= 400 < found["recall_length_high"])
    assert held / 300 >= 0.95


@pytest.mark.parametrize("arguments", [{"threshold": 95}, {"confidence": 1.0}], ids=str)
def test_wrong_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        recall_length(table({100: [1]}, 1), **arguments)
