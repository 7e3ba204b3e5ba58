"""The figure of which state measures foretell how a run will do beyond its training length."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from statescope.analyses.plots.style import BOUND, below, sheet
from statescope.analyses.predictors import KNOWN


def predictors_figure(found: xr.Dataset, most: int = 8) -> Figure:
    """Show the strongest predictors with their intervals, and what was known before training beside them.

    Parameters
    ----------
    found : Dataset, (predictor)
        From :func:`statescope.analyses.predictors.predictors`.
    most : int
        So many measures of the states are drawn. Training length and state size, hollow, always are.
    """
    if most < 1:
        raise ValueError(f"most={most}; expected 1 or more")
    names = [str(n) for n in found["predictor"].values]
    measures = [n for n in names if n not in KNOWN][:most]
    drawn = [n for n in names if n in measures or n in KNOWN]
    rows = found.sel(predictor=drawn)
    y = np.arange(len(drawn))
    value = rows["correlation"].values
    with sheet(1, 1, 5.6, 0.9 + 0.26 * len(drawn)) as (figure, axes):
        ax = axes[0, 0]
        ax.axvline(0, **BOUND)
        ax.hlines(y, rows["low"].values, rows["high"].values, color="0.45", linewidth=1.4)
        is_measure = np.array([n in measures for n in drawn])
        for some, face, label in (
            (is_measure, "black", "measured inside the training length"),
            (~is_measure, "white", "known before training"),
        ):
            style = {"markerfacecolor": face, "markeredgecolor": "black", "markersize": 6}
            ax.plot(value[some], y[some], "o", color="black", label=label, **style)
        ax.set(xlim=(-1.05, 1.05), ylim=(len(drawn) - 0.5, -0.5), xlabel="rank correlation with the outcome")
        ax.set_yticks(y, [n.replace("_", " ") for n in drawn])
        below(figure, ax)
    return figure
