"""The figure of the loss by position, beside the paper's criterion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from statescope.analyses.forgetting import LOSS_FACTOR
from statescope.analyses.loss import loss_by_position
from statescope.analyses.plots.bins import BINS, is_long, scale_tokens
from statescope.analyses.plots.style import BOUND, MARKS, NAMED, known_length, mark_training, sheet

PARTS = 16
"""Bins of a training length, those of the criterion."""

POINTS = 80
"""Points of a curve."""


def loss_figure(
    records: xr.DataTree | Sequence[xr.DataTree],
    train_length: int | None = None,
    labels: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> Figure:
    r"""Show the mean loss by position, with its interval, and the bound of *learned to forget*.

    The dotted line is twice the largest loss inside the training length, in sixteenths of it. A mark shows
    the largest such mean beyond. Of long texts the curve is smoothed further; line and mark are not.

    Parameters
    ----------
    records : DataTree or sequence of DataTree
        One curve each.
    train_length : int, optional
        In tokens, of all of them. Default: each record's own; without one neither line is drawn.
    labels : sequence of str, optional
        Names of the curves. Default: the models'.
    confidence : float
        Of the intervals, see :func:`statescope.analyses.loss_by_position`.

    Notes
    -----
    Source: *Stuffed Mamba* (arXiv 2410.07145), figure 1 and section 4.
    """
    several = [records] if isinstance(records, xr.DataTree) else list(records)
    names = [_short(str(r.attrs["model_id"])) for r in several] if labels is None else list(labels)
    if not several or len(names) != len(several):
        raise ValueError(f"labels has {len(names)} names; expected one for each of {len(several)} records")
    lengths = [known_length(record, train_length) for record in several]
    with sheet(1, 1, 6.0, 3.4) as (figure, axes):
        ax = axes[0, 0]
        for i, (record, name, length) in enumerate(zip(several, names, lengths, strict=True)):
            _draw_loss(ax, i, record, name, length, confidence)
        longest = max(range(len(several)), key=lambda i: several[i].attrs["tokens"])
        for i, length in enumerate(sorted({n for n in lengths if n is not None})):
            mark_training(ax, length, label=i == 0)
        scale_tokens(ax, several[longest], lengths[longest])
        ax.set_ylabel("mean loss (nat)")
        ax.set_ylim(0, None)
        legend = ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar in a name is a dollar
    return figure


def _short(name: str, most: int = 36) -> str:
    """Return the end of a name, which tells folders apart; a leading underscore would hide it."""
    return (name if len(name) <= most else f"...{name[3 - most :]}").lstrip("_")


def _draw_loss(
    ax: Axes, i: int, record: xr.DataTree, name: str, length: int | None, confidence: float
) -> None:
    tokens = record["tokens"].sizes["token"]
    width = max(1, -(-tokens // BINS) if length is None else length // PARTS)
    fine = loss_by_position(record, width, confidence)
    style = NAMED[i % len(NAMED)]
    if not fine["loss"].notnull().any():
        raise ValueError(f"record of {name} has no losses: nothing was predicted")
    drawn = _coarser(fine, is_long(record, length))
    ax.fill_between(drawn["token"], drawn["low"], drawn["high"], color=style["color"], alpha=0.2, linewidth=0)
    ax.plot(
        drawn["token"], drawn["loss"], **style, label=name, marker="o" if len(drawn["token"]) == 1 else ""
    )
    if length is None:
        return
    inside = fine["loss"].where(fine["token"] < length)
    bound = LOSS_FACTOR * float(inside.max())
    beyond = fine["loss"].where(fine["token"] >= length)
    ax.axhline(
        bound, **{**BOUND, "color": style["color"]}, label=f"{LOSS_FACTOR:g} x its largest in training"
    )
    if beyond.notnull().any():
        worst = beyond.isel(token=int(beyond.argmax("token")))
        ratio = LOSS_FACTOR * float(worst) / bound
        ax.plot(
            float(worst["token"]),
            float(worst),
            MARKS[i % len(MARKS)],
            color=style["color"],
            markeredgecolor="white",
            markersize=9 - 2 * min(i, 2),
            linestyle="none",
            label=f"largest beyond: {ratio:.2f} x",
        )


def _coarser(fine: xr.Dataset, logarithmic: bool) -> xr.Dataset:
    """Average neighbouring bins where there are more than a panel can show."""
    bins = fine.sizes["token"]
    if bins <= POINTS:
        return fine
    at = np.unique((np.geomspace if logarithmic else np.linspace)(1, bins + 1, POINTS).astype(int)) - 1
    cuts = at[at < bins]
    weight = fine["count"].values.astype(float)
    total = np.add.reduceat(weight, cuts)
    found = {}
    for name in ("loss", "low", "high"):
        known = np.nan_to_num(fine[name].values)
        with np.errstate(invalid="ignore"):
            found[name] = (
                "token",
                np.add.reduceat(known * weight, cuts) / np.where(total > 0, total, np.nan),
            )
    middle = np.add.reduceat(fine["token"].values, cuts) / np.diff(cuts, append=bins)
    return xr.Dataset(found, {"token": middle})
