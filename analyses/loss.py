"""How well the model predicts, by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from statescope.analyses import core
from statescope.analyses.blocks import BLOCK_NUMBERS, Array, group

PARTS = 8
"""Pieces of a bin that stand in for sequences where there is only one."""


def loss_by_position(record: xr.DataTree, width: int = 128, confidence: float = 0.95) -> xr.Dataset:
    r"""Mean loss by position in the text, with its confidence interval.

    .. math:: \overline{\ell}_b = \frac{1}{|b|} \sum_{t \in b} \ell_t, \quad \text{over all sequences}

    Parameters
    ----------
    record : DataTree
        A record, best of many sequences.
    width : int
        Tokens of a bin; the last one may be shorter.
    confidence : float
        Of the interval: a bootstrap over sequences (fixed seed); of a single one, over eighths of every bin,
        which leaves out how texts differ. Too narrow for fewer than about ten sequences.

    Returns
    -------
    Dataset, (token,)
        ``loss``, ``low`` and ``high`` in nat, and ``count``, the losses a bin holds; ``token`` is the last
        token of a bin. Losses that are not finite, as that of the first token, are left out and not counted.

    Notes
    -----
    Trouble: a mean that rises past the training length. Source: *Stuffed Mamba* (arXiv 2410.07145), figure 1.
    """
    for name, value in (("width", width), ("confidence", confidence)):
        fits = 0 < value < 1 if name == "confidence" else isinstance(value, int) and value >= 1
        if not fits:
            raise ValueError(
                f"{name}={value!r}; expected a {'number of tokens' if name == 'width' else 'part of 1'}"
            )
    loss = group(record, "tokens")["loss"].transpose("sequence", "token")
    sequences, tokens = loss.shape
    size = max(1, BLOCK_NUMBERS // (width * max(1, sequences))) * width
    rows: list[tuple[Array, ...]] = []
    for start in range(0, tokens, size):
        part = loss.isel(token=slice(start, start + size)).values.astype(np.float64)
        rows.append(_bins(part, width, confidence))
    mean, low, high, count = (
        (np.concatenate(x) for x in zip(*rows, strict=True)) if rows else [np.empty(0)] * 4
    )
    last = np.minimum(np.arange(width - 1, tokens + width - 1, width), tokens - 1)
    attrs: dict[str, Any] = {"units": "nat", "confidence": confidence}
    attrs["interval"] = "over sequences" if sequences > 1 else f"over {PARTS} pieces of every bin"
    result = xr.Dataset(coords={"token": ("token", last, {"long_name": "last token of the bin"})})
    for name, data in (("loss", mean), ("low", low), ("high", high)):
        result[name] = (
            "token",
            data,
            {"long_name": f"mean loss{'' if name == 'loss' else ', ' + name}", **attrs},
        )
    return result.assign(count=("token", count, {"long_name": "losses in the bin", "units": "1"}))


def _bins(loss: Array, width: int, confidence: float) -> tuple[Array, ...]:
    """Mean, bounds and count of every bin of (sequence, token)."""
    pieces = 1 if len(loss) > 1 else min(PARTS, width)
    piece = -(-width // pieces)
    binned = _padded(loss, width).reshape(len(loss), -1, width)
    known = np.isfinite(binned)
    count = known.sum((0, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, binned, 0).sum((0, 2)) / np.where(count > 0, count, np.nan)
        cut = _padded(binned, piece).reshape(*binned.shape[:2], -1, piece)
        found = np.isfinite(cut)
        units = np.where(found, cut, 0).sum(-1) / np.where(found.any(-1), found.sum(-1), np.nan)
    units = np.moveaxis(units, 1, -1).reshape(-1, binned.shape[1])
    return mean, *core.bootstrap(units, confidence), count


def _padded(x: Array, multiple: int) -> Array:
    missing = -x.shape[-1] % multiple
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=np.nan)
