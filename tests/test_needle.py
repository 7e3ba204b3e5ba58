"""Measures of the needle, against the surviving writes and states themselves, one by one in float64."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xarray as xr

from statescope.analyses import interference, output_share_of, overload_ratio, retention, share_of
from statescope.analyses.needle import MEASURES, SMALLEST, needle_measures
from statescope.schema import AT_PROBE, PER_PROBE

SEQUENCES, LAYERS, TOKENS, HEADS, KEY, VALUE = 2, 2, 40, 3, 4, 5
STARTS, STOPS = [3, 20], [9, 31]
ATTRIBUTES = {"train_length": 25, "tokens": TOKENS, "watch": json.dumps({"window": 1, "reach": TOKENS})}


def build(rng: np.random.Generator, decay: float = 0.2) -> tuple[xr.DataTree, np.ndarray]:
    """Draw writes and decays, step through them, and keep what a record keeps; also what survives."""
    shape = (SEQUENCES, LAYERS, TOKENS, HEADS)
    g = -decay * rng.random(shape)
    writes = np.einsum(
        "slthk,slthv->slthkv", rng.normal(size=(*shape, KEY)), rng.normal(size=(*shape, VALUE))
    )
    state, norms = np.zeros((SEQUENCES, LAYERS, HEADS, KEY, VALUE)), []
    for t in range(TOKENS):
        state = np.exp(g[:, :, t])[..., None, None] * state + writes[:, :, t]
        norms.append(np.linalg.norm(state, axis=(-2, -1)))
    survives = writes.copy()
    for i in range(TOKENS):
        for t in range(i + 1, TOKENS):
            survives[:, :, i] *= np.exp(g[:, :, t])[..., None, None]
    share = np.einsum("slthkv,slhkv->slth", survives, state) / (norms[-1] ** 2)[:, :, None]
    parts = np.einsum("slthkv,slhk->slthv", survives, rng.normal(size=(SEQUENCES, LAYERS, HEADS, KEY)))
    output = parts.sum(2)
    size = np.linalg.norm(output, axis=-1)
    output_share = np.einsum("slthv,slhv->slth", parts, output) / (size**2)[:, :, None]
    dims = ("sequence", "layer", "token", "head")
    at = {"token": np.arange(TOKENS)}
    steps = xr.Dataset(
        {
            "log_decay": (dims, g),
            "write_norm": (dims, np.linalg.norm(writes, axis=(-2, -1))),
            "state_norm": (dims, np.stack(norms, 2)),
        },
        at,
    )
    per_token = {"share": share, "output_share": output_share}
    per_token["output_contribution"] = np.linalg.norm(parts, axis=-1)
    probes = xr.Dataset({name: (PER_PROBE, x[:, :, None]) for name, x in per_token.items()}, at)
    probes["output_norm"] = (AT_PROBE, size[:, :, None])
    probes = probes.assign_coords(probe=[TOKENS - 1])
    record = xr.DataTree.from_dict(
        {
            "/": xr.Dataset(attrs=ATTRIBUTES),
            "steps": steps,
            "probes": probes,
        }
    )
    return record, survives


def test_measures_are_those_of_the_writes() -> None:
    record, survives = build(np.random.default_rng(0))
    found = needle_measures(record, STARTS, STOPS)
    assert set(found.data_vars) == set(MEASURES)
    assert all(v.dims == ("sequence", "layer", "head") for v in found.values())
    norms = np.linalg.norm(survives, axis=(-2, -1))
    for s, (start, stop) in enumerate(zip(STARTS, STOPS, strict=True)):
        one = found.isel(sequence=s)
        mine, later = norms[s, :, start:stop], norms[s, :, stop:]
        others = np.delete(norms[s], range(start, stop), axis=1)
        needle = np.sqrt((mine**2).sum(1))
        expected = {
            "log_contribution": np.log(needle),
            "log_live_memories": np.log(later.sum(1) ** 2 / (later**2).sum(1)),
            "log_interference": np.log(np.sqrt((others**2).sum(1)) / needle),
            "log_retention": np.log(retention(record, stop - 1, TOKENS - 1).isel(sequence=s)),
            "share": share_of(record, start, stop).isel(sequence=s, probe=-1),
            "output_share": output_share_of(record, start, stop).isel(sequence=s, probe=-1),
            "log_output_interference": np.log(
                interference(record, start, stop)["interference"].isel(sequence=s, probe=-1)
            ),
            "log_overload": np.log(overload_ratio(record).isel(sequence=s, token=-1)),
            "log_state_norm": np.log(record["steps"]["state_norm"].isel(sequence=s, token=-1)),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(one[name], values, rtol=1e-9, atol=1e-12, err_msg=name)


def test_share_of_needle_and_rest_is_one() -> None:
    record, survives = build(np.random.default_rng(1))
    whole = needle_measures(record, [0, 0], [TOKENS - 1] * 2)["share"]
    last = record["probes"]["share"].isel(probe=0, token=-1)
    np.testing.assert_allclose(whole + last, 1)
    assert survives.shape[2] == TOKENS


def test_what_has_decayed_below_all_floats_is_still_finite() -> None:
    record, _ = build(np.random.default_rng(2), decay=500.0)
    found = needle_measures(record, STARTS, STOPS)
    assert all(np.isfinite(v).all() for v in found.values())
    assert float(found["log_retention"].max()) < -1000 and float(found["log_contribution"].max()) < -1000
    record["steps"]["write_norm"][:] = 0
    found = needle_measures(record, STARTS, STOPS)
    assert all(np.isfinite(v).all() for v in found.values())
    assert float(found["log_contribution"].max()) < np.log(SMALLEST)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"starts": [3]}, "starts and stops have 1 and 2"),
        ({"starts": [9, 20]}, "a needle at 9 to 9"),
        ({"stops": [9, 40]}, "a needle at 20 to 40"),
        ({"probe": 7}, r"probes=\[-1\]"),
        ({"window": 2}, "window=1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change: dict[str, Any], named: str) -> None:
    record, _ = build(np.random.default_rng(3))
    if "probe" in change:
        record["probes"] = record["probes"].to_dataset().assign_coords(probe=[change.pop("probe")])
    if "window" in change:
        record["steps"] = record["steps"].to_dataset().isel(token=slice(1, None, change.pop("window")))
    with pytest.raises(ValueError, match=named):
        needle_measures(record, **{"starts": STARTS, "stops": STOPS, **change})
