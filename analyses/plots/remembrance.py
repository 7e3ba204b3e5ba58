"""The figure of what predictions owe to all but the last tokens."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from statescope.analyses.core import bootstrap
from statescope.analyses.plots.style import NAMED, below, mark_training, sheet


def remembrance_figure(found: xr.Dataset, confidence: float = 0.95) -> Figure:
    """Show how far predictions from the last tokens alone are from those of the whole text.

    The mean over ends and sequences, with a bootstrap interval over them (fixed seed), and the largest.

    Parameters
    ----------
    found : Dataset
        From :func:`statescope.experiments.remembrance.remembrance`.
    confidence : float
        Of the interval.

    Notes
    -----
    A curve that is still far above 0 at the dashed line rests on what is further back than training reached.
    """
    if "remembrance" not in found:
        raise ValueError("found has no remembrance; pass what statescope.experiments.remembrance gives")
    units = found["remembrance"].stack(unit=("sequence", "end")).transpose("unit", "length").values
    lengths, known = found["length"].values, np.isfinite(units)
    low, high = bootstrap(units.astype(np.float64), confidence)
    with sheet(1, 1, 5.2, 3.3) as (figure, axes):
        ax = axes[0, 0]
        ax.fill_between(
            lengths, low, high, color="0.85", linewidth=0, label=f"mean, {confidence:.0%} interval"
        )
        mean = np.where(known, units, 0).sum(0) / known.sum(0)
        ax.plot(lengths, mean, **NAMED[0], marker="o", markersize=3.5, label="mean")
        ax.plot(lengths, np.nanmax(units, axis=0), **NAMED[2], label="largest")
        mark_training(ax, found.attrs.get("train_length"), label=True)
        ax.set(
            xscale="log",
            ylim=(0, 1),
            xlabel="last tokens read alone",
            ylabel="distance to the prediction\nfrom the whole text",
        )
        ax.set_title(f"{found.attrs['model_id']}, {found.attrs['tokens']:,} tokens", fontsize="medium")
        below(figure, ax, columns=2)
    return figure
