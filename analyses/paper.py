"""What *Stuffed Mamba* (arXiv 2410.07145) reports of its own models: sizes, and the laws fitted to them."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

FORGET = {"slope": 5.172, "intercept": -4.469}
"""Thousand tokens per million numbers of state, and thousand tokens; section 4.2."""

RECALL = {"scale": 4.756, "base": 1.365, "offset": -0.742}
"""Thousand tokens; base per million numbers of state; section 4.3."""

MODELS = {
    "780M": (48, 1536),
    "370M": (48, 1024),
    "130M": (24, 768),
    "84.6M": (12, 768),
    "47.0M": (12, 512),
    "36.4M": (6, 512),
}
"""Layers and width; the last three were trained from scratch. Head width 64, 128 keys."""

KEYS, TAPS = 128, 4


def paper_entries(layers: ArrayLike, width: ArrayLike, keys: int = KEYS) -> np.ndarray:
    """Numbers in recurrent and convolution state: ``L (2 d N + (2 d + 2 N) 3)``."""
    d = np.asarray(width, dtype=float)
    return np.asarray(layers) * (2 * d * keys + (2 * d + 2 * keys) * (TAPS - 1))


def paper_forget(entries: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Training length up to which a state does not learn to forget, in tokens, and where it was clamped.

    The law is negative below 0.864 million numbers, where it says nothing: set to 0 there.
    """
    length = 1000 * (FORGET["slope"] * np.asarray(entries, dtype=float) / 1e6 + FORGET["intercept"])
    return np.maximum(length, 0.0), length < 0


def paper_recall(entries: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Longest context of accurate passkey retrieval, in tokens, and where a negative length was clamped."""
    grown = RECALL["base"] ** (np.asarray(entries, dtype=float) / 1e6) - 1
    length = 1000 * (RECALL["scale"] * grown + RECALL["offset"])
    return np.maximum(length, 0.0), length < 0


def paper_points() -> xr.Dataset:
    """The paper's six models, and what its laws say of them.

    Returns
    -------
    Dataset, (model)
        ``entries`` (numbers of state), ``forget_length`` and ``recall_length`` (tokens, by the laws, which
        fit its measured points with R^2 > 0.999), and ``clamped``: the first law was negative there.
        ``measured`` is 0 for the 780M model, which could not be trained far enough.
    """
    layers, width = np.array(list(MODELS.values())).T
    entries = paper_entries(layers, width)
    (forget, clamped), (recalled, _) = paper_forget(entries), paper_recall(entries)
    tokens = {"units": "tokens"}
    return xr.Dataset(
        {
            "entries": ("model", entries, {"long_name": "numbers in the state", "units": "1"}),
            "forget_length": ("model", forget, {"long_name": "training length to forget", **tokens}),
            "recall_length": ("model", recalled, {"long_name": "recall length", **tokens}),
            "clamped": ("model", clamped.astype(int)),
            "measured": ("model", [int(name != "780M") for name in MODELS]),
        },
        {"model": list(MODELS)},
    )
