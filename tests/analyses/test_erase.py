"""What the delta rule erases, in the record of a model and against its states."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from records import make_record, random_truth
from tiny import build, ids
from zarr.storage import MemoryStore

import statescope
from statescope import analyses
from statescope.kernels import reference

TEXT = ids(40, sequences=2)


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_erasing_is_that_of_the_models_recurrence(family: str) -> None:
    """Layer by layer, from the recurrence itself, stepped in float64; in segments, lazily, and in windows."""
    model = build(family)
    truth = []

    def spy(layer: int, r):  # type: ignore[no-untyped-def]
        truth.append((layer, reference.scan(r)))
        return r

    statescope.trace(model, TEXT, edit=spy)
    store = MemoryStore()
    statescope.trace(model, TEXT, store=store, segment=11)
    found = analyses.erase(statescope.open(store, chunks={}))
    assert found["taken"].chunks is not None
    thinned = analyses.erase(statescope.trace(model, TEXT, window=7))
    for layer, output in truth:
        norm, strength = output.erased.numpy()
        here = found.sel(layer=layer)
        np.testing.assert_allclose(here["strength"], strength, rtol=2e-5)
        np.testing.assert_allclose(here["erased"], norm, rtol=1e-4, atol=2e-5 * norm.max())
        taken = (2 - strength) / strength * norm**2
        np.testing.assert_allclose(here["taken"], taken, rtol=2e-4, atol=2e-5 * taken.max())
        cuts = np.arange(0, 40, 7)
        wide = thinned.sel(layer=layer)
        np.testing.assert_allclose(
            wide["erased"], np.sqrt(np.add.reduceat(norm**2, cuts, axis=1)), rtol=1e-4, atol=2e-5 * norm.max()
        )
        mean = np.add.reduceat(strength, cuts, axis=1) / np.diff([*cuts, 40])[:, None]
        np.testing.assert_allclose(wide["strength"], mean, rtol=2e-5)


def test_a_record_without_it_says_why() -> None:
    record = make_record(random_truth(8))
    record.attrs["structure"] = "decay per head"
    with pytest.raises(ValueError, match=r"its model has no delta rule \(decay per head\)"):
        analyses.erase(record)
    record.attrs["structure"] = "decay per head, delta rule"
    with pytest.raises(ValueError, match="made before this was kept; trace again"):
        analyses.erase(record)


def test_an_edit_that_stops_erasing_erases_nothing() -> None:
    record = statescope.trace(build("qwen3_next"), TEXT, edit=lambda layer, r: r.replace(a=None))
    found = analyses.erase(record)
    xr.testing.assert_identical(found["taken"], xr.zeros_like(found["taken"]))
