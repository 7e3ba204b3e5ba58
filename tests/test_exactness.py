"""The record against a float64 model of the tests' own, on book text: every layer, head and token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import xarray as xr

import statescope

TOKENS = 8192
PROBES = (4000, TOKENS - 1)
CHECKPOINTS = ("mamba2-byte-n16-t512", "mamba2-byte-n64-t512")
STEPS = ("log_decay", "write_norm", "state_norm", "state_mean", "write_overlap")
RMS = 1e-5
"""Root mean square of the error over that of the truth, per layer."""


def rms(error: np.ndarray, truth: np.ndarray) -> float:
    return float(np.sqrt((error**2).mean() / (truth**2).mean()))


@pytest.fixture(scope="module", params=CHECKPOINTS)
def truth(
    request: pytest.FixtureRequest, shared: Path, book: np.ndarray
) -> tuple[Path, np.ndarray, np.ndarray, list]:
    folder = shared / "models" / request.param
    ids = book[:TOKENS]
    return folder, ids, *oracle.run(folder, ids, keep=PROBES)


@pytest.fixture(scope="module", params=["auto", "chunked"])
def record(request: pytest.FixtureRequest, truth: tuple) -> xr.DataTree:
    folder, ids, _, _ = truth
    return statescope.trace(folder, ids, probes=PROBES, snapshots=PROBES, backend=request.param)


@pytest.mark.parametrize("name", STEPS)
def test_steps(record: xr.DataTree, truth: tuple, name: str) -> None:
    got = record["steps"][name].values[0].astype(np.float64)
    assert got.shape == (4, TOKENS, 8)
    for layer, trace in enumerate(truth[3]):
        want = getattr(trace, name)
        assert rms(got[layer] - want, want) <= RMS


def test_norm_worst_token(record: xr.DataTree, truth: tuple) -> None:
    """Error of every single norm over (decayed old norm + write)."""
    for layer, trace in enumerate(truth[3]):
        old = np.exp(trace.log_decay[1:]) * trace.state_norm[:-1]
        scale = trace.write_norm + np.vstack([np.zeros((1, 8)), old])
        error = record["steps"]["state_norm"].values[0, layer] - trace.state_norm
        assert np.abs(error / scale).max() <= 1e-4


@pytest.mark.parametrize("index", range(len(PROBES)))
def test_probes(record: xr.DataTree, truth: tuple, index: int) -> None:
    probes, probe = record["probes"], PROBES[index]
    for layer, trace in enumerate(truth[3]):
        got = probes.to_dataset().isel(sequence=0, layer=layer, probe=index)
        for name, truth_of in oracle.attribute(trace, probe).items():
            found = got[name].dropna("token") if "token" in got[name].dims else got[name]
            assert found.shape == truth_of.shape and rms(found.values - truth_of, truth_of) <= RMS, name
        for name in ("share", "output_share"):
            total = got[name].sum("token") + got[f"{name}_before"]
            assert np.abs(total.values - 1).max() <= 1e-4, name


def test_snapshots(record: xr.DataTree, truth: tuple) -> None:
    for layer, trace in enumerate(truth[3]):
        for index, position in enumerate(PROBES):
            want = trace.states[position]
            assert rms(record["snapshots"]["state"].values[0, layer, index] - want, want) <= RMS


def test_loss(record: xr.DataTree, truth: tuple) -> None:
    _, ids, logits, _ = truth
    want = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:-1]), torch.tensor(ids[1:]), reduction="none"
    )
    got = record["tokens"]["loss"].values[0]
    assert np.isnan(got[0])
    assert rms(got[1:] - want.numpy(), want.numpy()) <= RMS


def test_bundled_checkpoints_are_the_shared_ones(shared: Path, book: np.ndarray) -> None:
    """Stored in float16, they predict the same byte and lose nothing."""
    ids = torch.tensor(book[None, :2048])
    for name in CHECKPOINTS:
        with torch.no_grad():
            small, full = (statescope.load(place)(ids).logits for place in (name, shared / "models" / name))
        losses = [torch.nn.functional.cross_entropy(x[0, :-1], ids[0, 1:]).item() for x in (small, full)]
        assert (small.argmax(-1) == full.argmax(-1)).float().mean() > 0.998
        assert abs(losses[0] - losses[1]) < 1e-3
