"""Records that are short, cut off, laden with NaN or not what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from records import Truth, make_record, random_truth

from statescope import analyses

TOKENS, TRAIN = 40, 16

ALL: dict[str, Callable[[xr.DataTree], Any]] = {
    "state_statistics": analyses.state_statistics,
    "norm_budget": analyses.norm_budget,
    "overload_ratio": analyses.overload_ratio,
    "overload_growth": analyses.overload_growth,
    "memories": analyses.memories,
    "live_memories": analyses.live_memories,
    "retention": lambda r: analyses.retention(r, 0),
    "retention_at": lambda r: analyses.retention(r, 0, 0),
    "time_scales": analyses.time_scales,
    "head_reach": analyses.head_reach,
    "loss_by_position": analyses.loss_by_position,
    "overload": analyses.overload,
    "memory_span": analyses.memory_span,
    "forgetting": analyses.forgetting,
}


@pytest.fixture(scope="module")
def truth() -> Truth:
    return random_truth(TOKENS)


def broken(truth: Truth) -> dict[str, np.ndarray]:
    """Let one head's state burst at token 20."""
    steps = truth.steps()
    for name in ("state_norm", "state_mean", "write_overlap", "write_norm"):
        steps[name][0, 1, 20:, 2] = np.nan
    steps["state_norm"][0, 1, 20, 2] = np.inf
    return steps


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("name", ALL)
def test_one_token_is_a_record(name: str, window: int) -> None:
    record = make_record(random_truth(1), window=window, train_length=TRAIN)
    found = ALL[name](record)
    assert found is not None
    if name == "memories":
        assert (found["live_memories"] == 1).all() and (found["coherence"] == 1).all()
        assert (found["age"] == 0).all()
    if name in ("overload", "forgetting"):
        assert "1 tokens" in found.attrs["sentence"]
    if name == "forgetting":
        assert int(found["agree"]) == int(found["forgets_by_state"]) == -1
        assert "too little to say" in found.attrs["sentence"]


@pytest.mark.parametrize("name", ALL)
def test_an_interrupted_record_is_read_as_far_as_it_goes(name: str, truth: Truth) -> None:
    cut = make_record(truth, train_length=TRAIN, committed=24)
    short = make_record(
        Truth(*(x[:, :, :24] for x in (truth.log_decay, truth.key, truth.value))), train_length=TRAIN
    )
    found, expected = ALL[name](cut), ALL[name](short)
    xr.testing.assert_allclose(found, expected)
    if name in ("overload", "forgetting"):
        assert not found.attrs["complete"] and expected.attrs["complete"]
        assert found.attrs["sentence"].startswith("The record is interrupted.")


@pytest.mark.parametrize("name", ALL)
def test_an_empty_record_is_refused(name: str, truth: Truth) -> None:
    record = make_record(truth, train_length=TRAIN, committed=0)
    if name == "loss_by_position":
        assert ALL[name](record).sizes["token"] == 0
    else:
        with pytest.raises(ValueError, match="nothing is committed"):
            ALL[name](record)


def test_values_that_are_not_finite_stay_where_they_are(truth: Truth) -> None:
    record = make_record(truth, train_length=TRAIN, steps=broken(truth))
    clean = make_record(truth, train_length=TRAIN)
    bad = {"sequence": 0, "layer": 1, "head": 2}
    for name in ("state_statistics", "norm_budget", "overload_ratio", "memories", "retention"):
        found, expected = (_dataset(ALL[name](r)) for r in (record, clean))
        other = found["head"] != 2
        xr.testing.assert_identical(found.where(other), expected.where(other))
        assert (
            found.isel(bad).isel(token=slice(None, 20)).equals(expected.isel(bad).isel(token=slice(None, 20)))
        )
        if name != "retention":  # decays are still known
            after = found.isel(bad).isel(token=slice(21, None)).to_dataarray()
            assert (after.isnull().any("variable")).all()


def test_verdicts_name_heads_that_are_not_finite(truth: Truth) -> None:
    record = make_record(truth, train_length=TRAIN, steps=broken(truth))
    found = analyses.overload(record)
    assert (found["verdict"] == "not finite").sum() == 1
    assert found["verdict"].values[0, 1, 2] == "not finite"
    assert found["layer_verdict"].values.tolist()[0][1] == "not finite"
    assert "1 hold values that are not finite" in found.attrs["sentence"]
    assert int(analyses.forgetting(record)["forgets_by_state"]) == 0


def test_a_decay_that_is_not_finite_ends_what_can_be_said(truth: Truth) -> None:
    steps = truth.steps()
    steps["log_decay"][0, 1, 10:, 2] = np.nan
    record = make_record(truth, train_length=TRAIN, steps=steps)
    kept = analyses.retention(record, 0)
    assert kept.isel(sequence=0, layer=1, head=2, token=slice(10, None)).isnull().all()
    assert kept.isel(head=[0, 1]).notnull().all()
    scales = analyses.time_scales(record)
    assert scales["half_life"].notnull().all() and int(scales["count"][0, 1, 2].sum()) == 10
    assert np.isfinite(analyses.memory_span(record)["failing_length"]).all()


def test_a_snapshot_that_is_not_finite_is_counted(truth: Truth) -> None:
    burst = random_truth(4)
    burst.state[0, 0, 1, 0, 2, 2] = np.inf
    record = make_record(burst, snapshots=(1,))
    found = analyses.state_extremes(record)
    assert int(found["nonfinite"].sum()) == 1 and np.isfinite(found["largest"]).all()
    assert analyses.state_outliers(record)["kurtosis"].isnull().sum() == 1


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (analyses.state_rank, "no /snapshots: pass snapshots= to statescope.trace"),
        (lambda r: analyses.share_of(r, 0, 1), "no /probes: pass probes= to statescope.trace"),
        (lambda r: analyses.memories(xr.DataTree()), "no /steps: open it with statescope.open"),
        (lambda r: analyses.overload(r, None), "train_length is not in the record; pass it"),
        (lambda r: analyses.overload(r, 0), "train_length=0; expected a number of tokens"),
        (lambda r: analyses.retention(r, 5, 2), "at=2 is before token=5"),
        (lambda r: analyses.retention(r, 99), "token=99 is no recorded token"),
        (lambda r: analyses.loss_by_position(r, 0), "width=0"),
        (lambda r: analyses.loss_by_position(r, 8, 95), "confidence=95"),
        (lambda r: analyses.live_memories(r.isel(token=slice(3, None))), "begins with the entry of token 3"),
    ],
)
def test_what_does_not_fit_is_named(
    function: Callable[[xr.DataTree], Any], expected: str, truth: Truth
) -> None:
    with pytest.raises(ValueError, match=expected.replace("(", r"\(")):
        function(make_record(truth))


def test_a_verdict_reuses_what_is_finished(truth: Truth) -> None:
    record = make_record(truth, train_length=TRAIN)
    judged, span = analyses.overload(record), analyses.memory_span(record)
    xr.testing.assert_identical(
        analyses.forgetting(record, judged=judged, span=span), analyses.forgetting(record)
    )
    for given in ({"judged": judged}, {"span": span}):
        with pytest.raises(
            ValueError, match=rf"{next(iter(given))} is of another record, or .* other than 8"
        ):
            analyses.forgetting(record, 8, **given)


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ("decay per head", ""),
        ("decay per entry", "mean over a head's entries"),
        ("decay per head, delta rule", "Erasing is left out"),
        ("decay per key, delta rule", "mean over a head's keys, some of which keep for longer. Erasing is"),
    ],
)
def test_what_the_decay_leaves_out_is_said(structure: str, said: str, truth: Truth) -> None:
    record = make_record(truth, train_length=TRAIN)
    record.attrs["structure"] = structure
    for name in (
        "retention",
        "retention_at",
        "head_reach",
        "memories",
        "memory_span",
        "overload",
        "forgetting",
    ):
        assert said in ALL[name](record).attrs["caveat"] and bool(said) == bool(
            ALL[name](record).attrs["caveat"]
        )
    sentence = analyses.forgetting(record).attrs["sentence"]
    assert said in sentence and sentence.endswith(".")


def test_no_record_at_all() -> None:
    with pytest.raises(TypeError, match="record is a Dataset; expected what statescope"):
        analyses.memories(xr.Dataset())  # type: ignore[arg-type]


def test_bad_probe_ranges_are_named(truth: Truth) -> None:
    record = make_record(truth, probes=(30,))
    for start, stop in ((5, 5), (-1, 3), (0, 99)):
        with pytest.raises(ValueError, match=f"start={start}, stop={stop}"):
            analyses.share_of(record, start, stop)


def test_an_early_record_does_not_say_its_states_sizes(truth: Truth) -> None:
    record = make_record(truth)
    del record.attrs["state_shape"]
    with pytest.raises(ValueError, match="pass \\(key, value\\)"):
        analyses.memories(record)
    assert float(analyses.memories(record, (4, 5))["load"].max()) > 0
    with_snapshots = make_record(truth, snapshots=(3,))
    del with_snapshots.attrs["state_shape"]
    assert analyses.memories(with_snapshots)["load"].equals(analyses.memories(record, (4, 5))["load"])


def _dataset(x: Any) -> xr.Dataset:
    return x if isinstance(x, xr.Dataset) else x.to_dataset(name="x")
