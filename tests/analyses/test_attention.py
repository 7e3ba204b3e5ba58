"""What a probe's query reads: against the parts of its output, one by one, and against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from records import Truth, make_record, random_truth

from statescope import analyses
from statescope.analyses.attention import bound_interference

TOKENS, PROBES = 57, (25, 40, 50, 56)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return random_truth(TOKENS)


@pytest.fixture(scope="module")
def record(truth: Truth) -> xr.DataTree:
    return make_record(truth, probes=PROBES)


def close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=rtol, atol=1e-6)


def weights(truth: Truth, p: int) -> np.ndarray:
    """The probe's row, (sequence, layer, token, head): decay times query on key."""
    total = np.cumsum(truth.log_decay, axis=2)
    on_key = (truth.query[:, :, p, None] * truth.key[:, :, : p + 1]).sum(-1)
    return np.exp(total[:, :, p, None] - total[:, :, : p + 1]) * on_key


def simple(log_decay: float, keys: np.ndarray, query: np.ndarray, value: np.ndarray | None = None) -> Truth:
    """One head with a constant decay, which always asks the same."""
    tokens = len(keys)
    value = np.ones((tokens, 1)) if value is None else value
    queries = np.broadcast_to(query, keys.shape)
    keys, value, queries = (x[None, None, :, None].astype(float) for x in (keys, value, queries))
    return Truth(np.full((1, 1, tokens, 1), log_decay), keys, value, queries)


@pytest.mark.parametrize("i", range(len(PROBES)))
def test_rows_distance_and_recency(record: xr.DataTree, truth: Truth, i: int) -> None:
    p, row = PROBES[i], weights(truth, PROBES[i])
    found = analyses.implicit_attention(record).isel(probe=i)
    close(found.isel(token=slice(p + 1)), row)
    assert found.isel(token=slice(p + 1, None)).isnull().all()
    size, age = np.abs(row), (p - np.arange(p + 1))[:, None]
    close(analyses.mean_distance(record).isel(probe=i), (size * age).sum(2) / size.sum(2))
    close(analyses.recency_ratio(record, 6).isel(probe=i), size[:, :, -6:].sum(2) / size.sum(2))
    assert (analyses.recency_ratio(record) == 1).all()


def test_share_of_the_output(record: xr.DataTree, truth: Truth) -> None:
    found = analyses.output_share_of(record, 5, 30)
    for i, p in enumerate(PROBES):
        parts = truth.parts(p)
        y = parts.sum(2)
        close(found.isel(probe=i), (parts[:, :, 5:30].sum(2) * y).sum(-1) / (y**2).sum(-1), rtol=1e-4)
    close(analyses.output_share_of(record, 0, TOKENS), np.ones(found.shape), rtol=1e-4)


@pytest.mark.parametrize(("start", "stop"), [(3, None), (26, None), (5, 20), (10, 57)])
def test_interference_is_that_of_the_parts(
    record: xr.DataTree, truth: Truth, start: int, stop: int | None
) -> None:
    found = analyses.interference(record, start, stop)
    last = start if stop is None else stop - 1
    for i, p in enumerate(PROBES):
        here = found.isel(probe=i)
        if p < last:
            assert here.to_dataarray().isnull().all()
            continue
        parts = truth.parts(p)
        wanted = parts[:, :, start : last + 1].sum(2)
        exact = np.linalg.norm(parts.sum(2) - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        if stop is None:
            for name in found.data_vars:
                np.testing.assert_allclose(here[name], exact, rtol=1e-4, atol=1e-3)
        assert (here["interference_low"] <= exact * (1 + 1e-4) + 1e-3).all()
        assert (here["interference_high"] >= exact * (1 - 1e-4) - 1e-3).all()
        middle = here["interference"]
        assert ((here["interference_low"] <= middle) & (middle <= here["interference_high"])).all()


def test_interference_of_orthogonal_parts_is_exact() -> None:
    """Values that are orthogonal: the middle is what it is, and 0 where there is nothing else."""
    values = np.eye(6)
    truth = simple(np.log(0.5), np.ones((6, 2)), np.ones(2), values)
    record = make_record(truth, probes=(5,))
    size = 2 * 0.5 ** np.arange(5, -1, -1.0)
    for start, stop in ((0, 1), (1, 4), (2, 6)):
        others = np.delete(size, range(start, stop))
        expected = np.sqrt((others**2).sum() / (size[start:stop] ** 2).sum())
        close(analyses.interference(record, start, stop)["interference"].squeeze(), expected)
    close(analyses.interference(record, 0, 6)["interference"].squeeze(), 0)


def test_nothing_read_of_a_token_is_infinite_interference() -> None:
    keys = np.eye(4)
    record = make_record(simple(0.0, keys, np.array([0, 1.0, 1, 1])), probes=(3,))
    for name, values in analyses.interference(record, 0).items():
        assert np.isposinf(values).all(), name
    middle, low, high = bound_interference(*(np.array(x) for x in (0.5, 0.8, 0.5)))
    np.testing.assert_allclose(
        [low, middle, high], 1
    )  # with half of the output it does not depend on the norm


def test_closed_forms_of_a_constant_decay() -> None:
    """Every key the query's own: the rows are geometric; keys that are orthogonal: one token is read."""
    r = 0.9
    same = make_record(simple(np.log(r), np.ones((40, 1)), np.ones(1)), probes=(39,))
    left = r ** np.arange(39, -1, -1.0)
    close(analyses.implicit_attention(same).squeeze(), left)
    close(analyses.mean_distance(same), [[[[(left * np.arange(39, -1, -1)).sum() / left.sum()]]]])
    close(analyses.recency_ratio(same, 10), [[[[(1 - r**10) / (1 - r**40)]]]])
    close(analyses.interference(same, 39)["interference"], [[[[(left.sum() - 1)]]]])
    orthogonal = make_record(simple(np.log(r), np.eye(40), np.eye(40)[7]), probes=(39,))
    close(analyses.mean_distance(orthogonal), [[[[32]]]])
    close(analyses.recency_ratio(orthogonal, 32), [[[[0]]]])
    close(analyses.interference(orthogonal, 7)["interference"], [[[[0]]]])


def test_effective_state_size_is_of_the_operators_block(truth: Truth) -> None:
    record = make_record(truth, probes=tuple(range(30, 50)))
    found = analyses.effective_state_size(record, 30, eps=1e-4)
    rows = np.stack([weights(truth, p)[:, :, :30] for p in range(30, 50)], -1)
    for place in np.ndindex(2, 2, 3):
        sigma = np.linalg.svd(rows[(*place[:2], slice(None), place[2])], compute_uv=False)
        assert (
            found["effective_state_size"].values[place]
            == (sigma > 1e-4 * sigma[0]).sum()
            <= truth.key.shape[-1]
        )
        p = sigma[:10] / sigma.sum()
        close(found["entropy_state_size"].values[place], np.exp(-(p * np.log(p)).sum()), rtol=1e-3)
    assert found.attrs == {"token": 30, "probes": 20}
    assert (analyses.effective_state_size(record, 49)["effective_state_size"] == 1).all()


def test_effective_state_size_in_closed_form() -> None:
    """One key for all is one direction; orthogonal keys all asked for are as many as they."""
    probes = tuple(range(8, 12))
    one = make_record(simple(np.log(0.9), np.ones((12, 1)), np.ones(1)), probes=probes)
    found = analyses.effective_state_size(one, 8)
    close(found.to_dataarray().values.ravel(), [1, 1])
    keys = np.eye(4)[np.arange(12) % 4]
    truth = simple(0.0, keys, np.ones(4))
    truth.query = keys[None, None, :, None]
    many = analyses.effective_state_size(make_record(truth, probes=probes), 8)
    close(many.to_dataarray().values.ravel(), [4, 4])


EARLY: dict[str, Callable[[xr.DataTree], Any]] = {
    "attention": analyses.implicit_attention,
    "mean_distance": analyses.mean_distance,
    "recency_ratio": analyses.recency_ratio,
    "output_share": lambda r: analyses.output_share_of(r, 0, 3),
    "interference": lambda r: analyses.interference(r, 0),
    "effective_state_size": lambda r: analyses.effective_state_size(r, 20),
}


@pytest.mark.parametrize("name", EARLY)
def test_records_that_lack_what_is_needed(name: str, truth: Truth) -> None:
    with pytest.raises(ValueError, match="no /probes: pass probes="):
        EARLY[name](make_record(truth))
    record = make_record(truth, probes=(25,))
    early = record["probes"].to_dataset()[["contribution", "share", "share_before"]]
    record["probes"] = xr.DataTree(early)
    with pytest.raises(ValueError, match=r"no probes/\w+: it was made before these were kept; trace again"):
        EARLY[name](record)
    assert analyses.share_of(record, 0, 26).notnull().all()


def test_what_is_out_of_reach_is_not_taken_for_nothing(truth: Truth) -> None:
    record = make_record(truth, probes=(25, 56), reach=30)
    for found in (analyses.mean_distance(record), analyses.interference(record, 3)["interference"]):
        assert found.isel(probe=0).notnull().all() and found.isel(probe=1).isnull().all()
    assert analyses.interference(record, 27)["interference"].isel(probe=1).notnull().all()
    with pytest.raises(ValueError, match="reaches back to token 27 only"):
        analyses.effective_state_size(record, 40)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda r: analyses.recency_ratio(r, 0), "recent=0"),
        (lambda r: analyses.interference(r, 57), "start=57, stop=58"),
        (lambda r: analyses.interference(r, 5, 5), "start=5, stop=5"),
        (lambda r: analyses.effective_state_size(r, 0), "token=0"),
        (lambda r: analyses.effective_state_size(r, 57), r"token=57; expected .* the last probe \(56\)"),
    ],
)
def test_what_does_not_fit_is_named(
    record: xr.DataTree, function: Callable[[xr.DataTree], Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        function(record)


def test_no_one_operator_where_entries_decay_apart(truth: Truth) -> None:
    record = make_record(truth, probes=(56,))
    record.attrs["structure"] = "decay per entry"
    with pytest.raises(ValueError, match="decays per entry"):
        analyses.effective_state_size(record, 20)
