"""Every measure against a direct computation from the states themselves, and against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from records import KEY, VALUE, Truth, make_record, norm, random_truth
from zarr.storage import MemoryStore

import statescope
from statescope import analyses
from statescope.analyses import blocks, core

TOKENS = 57
TRAIN = 20


@pytest.fixture(scope="module")
def truth() -> Truth:
    return random_truth(TOKENS)


@pytest.fixture(scope="module")
def record(truth: Truth) -> xr.DataTree:
    loss = np.random.default_rng(1).exponential(size=(2, TOKENS))
    loss[:, 0] = np.nan
    return make_record(truth, snapshots=(0, 30, 56), probes=(25, 56), train_length=TRAIN, loss=loss)


def close(found: Any, expected: Any, rtol: float = 2e-6) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=rtol, atol=1e-9)


def still(log_decay: float, keys: np.ndarray, tokens: int) -> Truth:
    """One head with a constant decay; all values are the same."""
    value = np.broadcast_to([1.0, 0.0, 0.0], (tokens, 3))
    return Truth(
        np.full((1, 1, tokens, 1), log_decay),
        keys[None, None, :, None].astype(float),
        value[None, None, :, None],
    )


def test_statistics_are_those_of_the_states(record: xr.DataTree, truth: Truth) -> None:
    found = analyses.state_statistics(record)
    close(found["norm"], norm(truth.state))
    np.testing.assert_allclose(found["mean"], truth.state.mean((-2, -1)), atol=1e-6)
    close(found["variance"], truth.state.var((-2, -1)), rtol=1e-5)


def test_budget_adds_up(record: xr.DataTree, truth: Truth) -> None:
    found = analyses.norm_budget(record)
    close(found["decayed"], norm(truth.decayed) ** 2, rtol=1e-5)
    close(found["write"], norm(truth.write) ** 2, rtol=1e-5)
    scale = norm(truth.state) ** 2 + norm(truth.write) ** 2
    cross = 2 * (truth.decayed * truth.write).sum((-2, -1))
    assert (abs(found["cross"] - cross) / scale).max() < 1e-6
    assert (abs(found["residual"]) / scale).max() < 1e-6


def test_overload_is_relative_to_training(record: xr.DataTree, truth: Truth) -> None:
    size = norm(truth.state)
    ratio = size / size[:, :, :TRAIN].max(2, keepdims=True)
    close(analyses.overload_ratio(record), ratio)
    found = analyses.overload_growth(record)
    beyond = ratio[:, :, TRAIN:]
    t = np.arange(TRAIN, TOKENS)
    slope = [np.polyfit(t, x, 1)[0] for x in np.moveaxis(beyond, 2, -1).reshape(-1, len(t))]
    close(found["slope"].values.ravel(), slope, rtol=1e-4)
    inside = ratio[:, :, :TRAIN]
    close(found["zscore"], (beyond.mean(2) - inside.mean(2)) / inside.std(2), rtol=1e-4)
    close(found["beyond"], beyond.mean(2))


def test_memories_are_counted_from_surviving_writes(record: xr.DataTree, truth: Truth) -> None:
    found = analyses.memories(record)
    for t in range(TOKENS):
        e = norm(truth.surviving(t))
        live = e.sum(2) ** 2 / (e**2).sum(2)
        here = found.isel(token=t)
        close(here["live_memories"], live)
        close(here["load"], live / min(KEY, VALUE))
        close(here["coherence"], norm(truth.state[:, :, t]) ** 2 / (e**2).sum(2), rtol=1e-5)
        age = (e * (t - np.arange(t + 1))[:, None]).sum(2) / e.sum(2)
        np.testing.assert_allclose(here["age"], age, rtol=2e-6, atol=1e-6)
    xr.testing.assert_identical(analyses.live_memories(record), found["live_memories"])


def test_retention_is_what_survives(record: xr.DataTree, truth: Truth) -> None:
    left = norm(truth.surviving(40)[:, :, 7]) / norm(truth.write[:, :, 7])
    close(analyses.retention(record, 7, 40), left, rtol=1e-5)
    curve = analyses.retention(record, 7)
    assert curve["token"][0] == 7
    close(curve.sel(token=40), left, rtol=1e-5)
    close(curve.sel(token=7), np.ones_like(left))
    close(analyses.retention(record, 7, 7), np.ones_like(left))


def test_time_scales_are_those_of_the_decays(record: xr.DataTree, truth: Truth) -> None:
    found = analyses.time_scales(record)
    g = truth.log_decay
    close(found["half_life"], np.log(2) / -g.mean(2))
    close(found["horizon"], 1 / (1 - np.exp(g).mean(2)))
    close(found["gate_variation"], g.std(2) / -g.mean(2), rtol=1e-5)
    tau = 1 / -np.expm1(g)
    expected = np.quantile(tau, found["quantile"], axis=2, method="inverted_cdf")
    close(found["time_scale"].transpose("quantile", ...), expected, rtol=0.025)
    assert (found["count"].sum("tau") == TOKENS).all()


def test_global_heads_keep_over_the_training_length() -> None:
    g = np.log([[0.999, 0.9]])[:, None, None] * np.ones((1, 1, 100, 1))
    ones = np.ones((1, 1, 100, 2, 2))
    found = analyses.head_reach(make_record(Truth(g, ones, ones)), train_length=50)
    close(found["retention"].values.ravel(), [0.999**50, 0.9**50], rtol=1e-5)
    assert found["is_global"].values.ravel().tolist() == [True, False]


def test_snapshots_are_measured(record: xr.DataTree, truth: Truth) -> None:
    states = truth.state[:, :, [0, 30, 56]]
    extremes, outliers = analyses.state_extremes(record), analyses.state_outliers(record, top=2)
    close(extremes["largest"], abs(states).max((-2, -1)))
    assert not extremes["nonfinite"].any()
    energy = states**2
    for name, axis in (("key_share", -1), ("value_share", -2)):
        close(outliers[name], np.sort(energy.sum(axis), -1)[..., -2:].sum(-1) / energy.sum((-2, -1)), 1e-5)
    flat = states.reshape(*states.shape[:4], -1)
    centred = flat - flat.mean(-1, keepdims=True)
    close(outliers["kurtosis"], (centred**4).mean(-1) / centred.var(-1) ** 2 - 3, rtol=1e-4)


def test_rank_of_known_states() -> None:
    truth = random_truth(3)
    truth.state[0, 0, 0, 0] = np.eye(KEY, VALUE) * 3
    truth.state[0, 0, 0, 1] = np.outer(np.arange(KEY), np.ones(VALUE))
    truth.state[0, 0, 0, 2] = 0
    truth.state[0, 0, 1, 0] = np.diag([1, 0.5, 0.02, 0.005]) @ np.eye(KEY, VALUE)
    truth.state[0, 0, 1, 1, 2, 2] = np.nan
    found = analyses.state_rank(make_record(truth, snapshots=(0, 1))).isel(sequence=0, layer=0)
    full = found.isel(position=0, head=0)
    assert [float(full[n]) for n in ("rank", "utilisation")] == [4, 1]
    close([full["stable_rank"], full["nuclear_norm"], full["effective_rank"]], [4, 12, 4])
    close([found[n][0, 1] for n in ("stable_rank", "rank", "effective_rank", "utilisation")], [1, 1, 1, 0.25])
    assert found.isel(position=0, head=2).to_dataarray().isnull().all()
    assert float(found["rank"][1, 0]) == 3
    assert found.isel(position=1, head=1).to_dataarray().isnull().all()


def test_shares_and_reach_are_those_of_surviving_writes(record: xr.DataTree, truth: Truth) -> None:
    share, kept = analyses.share_of(record, 5, 30), analyses.contribution_of(record, 5, 30)
    reach = analyses.probe_reach(record, recent=6)
    for i, p in enumerate((25, 56)):
        left, state = truth.surviving(p), truth.state[:, :, p]
        e = norm(left)
        shares = (left * state[:, :, None]).sum((-2, -1)) / norm(state)[:, :, None] ** 2
        np.testing.assert_allclose(share.isel(probe=i), shares[:, :, 5:30].sum(2), rtol=1e-5, atol=1e-6)
        close(kept.isel(probe=i), np.sqrt((e[:, :, 5:30] ** 2).sum(2)))
        age = (p - np.arange(p + 1))[:, None]
        np.testing.assert_allclose(
            reach["distance"].isel(probe=i), (e * age).sum(2) / e.sum(2), rtol=1e-6, atol=1e-6
        )
        close(reach["recency"].isel(probe=i), e[:, :, -6:].sum(2) / e.sum(2))
        np.testing.assert_allclose(
            reach["recent_share"].isel(probe=i), shares[:, :, -6:].sum(2), rtol=1e-5, atol=1e-6
        )
    close(analyses.share_of(record, 0, TOKENS), np.ones(share.shape), rtol=1e-5)


def test_what_lies_before_the_reach_is_not_taken_for_nothing(truth: Truth) -> None:
    record = make_record(truth, probes=(25, 56), reach=30)
    found = analyses.share_of(record, 20, 40)
    assert found.isel(probe=1).isnull().all()  # the last probe reaches back to 27
    assert found.isel(probe=0).notnull().all()
    assert analyses.share_of(record, 30, 40).notnull().all()
    assert analyses.probe_reach(record)["distance"].isel(probe=1).isnull().all()


def test_loss_is_binned(record: xr.DataTree) -> None:
    found = analyses.loss_by_position(record, width=16)
    loss = record["tokens"]["loss"].values
    assert found["token"].values.tolist() == [15, 31, 47, 56]
    assert found["count"].values.tolist() == [30, 32, 32, 18]
    close(found["loss"], [np.nanmean(loss[:, s : s + 16]) for s in range(0, TOKENS, 16)], rtol=1e-6)
    assert (found["low"] <= found["loss"]).all() and (found["loss"] <= found["high"]).all()


def test_loss_of_one_sequence_has_an_interval_over_pieces(truth: Truth) -> None:
    record = make_record(truth, loss=np.random.default_rng(3).exponential(size=(2, TOKENS)))
    one = xr.DataTree.from_dict(
        {"/": xr.Dataset(attrs=record.attrs), "/tokens": record["tokens"].to_dataset().isel(sequence=[0])}
    )
    found = analyses.loss_by_position(one, width=19)
    assert found["loss"].attrs["interval"] == "over 8 pieces of every bin"
    assert (found["low"] < found["high"]).all()


@given(log_decay=st.floats(-800, -1e-9), tokens=st.integers(1, 40), orthogonal=st.booleans())
@settings(deadline=None, max_examples=15)
def test_constant_decay_has_closed_forms(log_decay: float, tokens: int, orthogonal: bool) -> None:
    keys = np.eye(tokens) if orthogonal else np.eye(tokens)[np.zeros(tokens, int)]
    record = make_record(still(log_decay, keys, tokens), shard=64)
    found = analyses.memories(record).isel(sequence=0, layer=0, head=0)
    n, a = np.arange(1, tokens + 1), np.float32(log_decay).astype(float)
    first, square = np.expm1(n * a) / np.expm1(a), np.expm1(2 * n * a) / np.expm1(2 * a)
    close(found["live_memories"], first**2 / square, rtol=1e-5)
    close(found["coherence"], np.ones(tokens) if orthogonal else first**2 / square, rtol=1e-5)
    scales = analyses.time_scales(record).isel(sequence=0, layer=0, head=0)
    close(scales["half_life"], np.log(2) / -a)
    assert float(scales["gate_variation"]) < 1e-6
    close(scales["horizon"], 1 / -np.expm1(a), rtol=1e-6)


@given(
    tokens=st.integers(1, 70),
    cut=st.integers(1, 70),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_blocks_make_no_difference(tokens: int, cut: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    decay, amount = -scale * rng.exponential(size=(1, 1, tokens, 2)), rng.exponential(size=(1, 1, tokens, 2))
    state, expected = np.zeros((1, 1, 2)), np.empty_like(amount)
    for t in range(tokens):
        state = np.exp(decay[:, :, t]) * state + amount[:, :, t]
        expected[:, :, t] = state
    found, carry = [], None
    for start in range(0, tokens, cut):
        part = core.log_accumulate(
            decay[:, :, start : start + cut], np.log(amount[:, :, start : start + cut]), carry
        )
        carry = part[:, :, -1:]
        found.append(np.exp(part))
    close(np.concatenate(found, 2), expected, rtol=1e-10)


PER_TOKEN: dict[str, Callable[[xr.DataTree], Any]] = {
    "state_statistics": analyses.state_statistics,
    "norm_budget": analyses.norm_budget,
    "overload_ratio": analyses.overload_ratio,
    "memories": analyses.memories,
    "live_memories": analyses.live_memories,
    "retention": lambda r: analyses.retention(r, r["steps"]["token"].values[1]),
}
REDUCED: dict[str, Callable[[xr.DataTree], Any]] = {
    "retention at": lambda r: analyses.retention(r, *r["steps"]["token"].values[[1, -2]].tolist()),
    "overload_growth": analyses.overload_growth,
    "time_scales": analyses.time_scales,
    "head_reach": analyses.head_reach,
    "state_extremes": analyses.state_extremes,
    "state_outliers": analyses.state_outliers,
    "state_rank": analyses.state_rank,
    "share_of": lambda r: analyses.share_of(r, 5, 30),
    "probe_reach": analyses.probe_reach,
    "loss_by_position": lambda r: analyses.loss_by_position(r, 16),
}


@pytest.fixture(scope="module", params=[1, 4], ids="window={}".format)
def stored(request: pytest.FixtureRequest, truth: Truth) -> MemoryStore:
    """Four chunks of tokens for every sequence and layer."""
    store = MemoryStore()
    make_record(
        truth,
        window=request.param,
        snapshots=(0, 30),
        probes=(25, 56),
        train_length=TRAIN,
        loss=np.random.default_rng(2).exponential(size=(2, TOKENS)),
        shard=16 // request.param,
        store=store,
    )
    return store


@pytest.mark.parametrize("name", [*PER_TOKEN, *REDUCED])
def test_chunks_make_no_difference(name: str, stored: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("dask")
    function = (PER_TOKEN | REDUCED)[name]
    whole, lazy = function(statescope.open(stored)), function(statescope.open(stored, chunks={}))
    if name in PER_TOKEN:
        assert len(lazy.chunksizes["token"]) == 4, "nothing may be computed yet"
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 60)
    for other in (lazy, function(statescope.open(stored))):
        xr.testing.assert_allclose(whole, other, rtol=2e-6)
        assert _attributes(whole) == _attributes(other)


def _attributes(x: Any) -> dict[str, Any]:
    return {name: variable.attrs for name, variable in _variables(x)}


def _variables(x: Any) -> list[tuple[Any, Any]]:
    return list(x.data_vars.items()) if isinstance(x, xr.Dataset) else [("", x)]


@pytest.mark.parametrize("window", [3, 8])
def test_windows_keep_what_they_can(window: int, truth: Truth, record: xr.DataTree) -> None:
    thin = make_record(truth, window=window, train_length=TRAIN)
    ends = thin["steps"]["token"].values
    close(
        analyses.retention(thin, int(ends[0]), int(ends[-1])),
        analyses.retention(record, int(ends[0]), int(ends[-1])),
        rtol=1e-5,
    )
    close(analyses.time_scales(thin)["half_life"], analyses.time_scales(record)["half_life"])
    size = norm(truth.state)
    inside = size[:, :, : ends[ends < TRAIN][-1] + 1].max(2, keepdims=True)
    close(analyses.overload_ratio(thin), size[:, :, ends] / inside)
    budget = analyses.norm_budget(thin)
    total = budget["decayed"] + budget["cross"] + budget["write"] + budget["residual"]
    close(total, size[:, :, ends] ** 2, rtol=1e-4)


@pytest.mark.parametrize("log_decay", [-1e-6, -0.01, -3.0])
def test_windows_of_even_writes_are_exact(log_decay: float) -> None:
    truth = still(log_decay, np.eye(45), 45)
    every, thin = (analyses.memories(make_record(truth, window=w)) for w in (1, 7))
    at = thin["token"].values
    for name in ("live_memories", "coherence", "age"):
        close(thin[name], every[name].sel(token=at), rtol=2e-4)


def test_every_number_is_labelled(record: xr.DataTree) -> None:
    for function in (PER_TOKEN | REDUCED).values():
        for _, variable in _variables(function(record)):
            assert variable.attrs["long_name"] and variable.attrs["units"]
