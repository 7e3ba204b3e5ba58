"""All that a table of runs says of the two laws, as one JSON-able summary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from statescope.analyses.growth import crossings, end_and_far_losses, loss_growth, paired, trend
from statescope.analyses.laws import fit_laws
from statescope.analyses.predictors import predictors
from statescope.analyses.runs import FAR, final
from statescope.analyses.thresholds import (
    RECALLED,
    WITHIN,
    answers_passkeys,
    best_recall,
    learned_to_forget,
    passkey_lengths,
    passkey_shares,
    recall_lengths,
    recent_recall,
    thresholds,
)

ALIKE: dict[str, tuple[str, ...]] = {
    "all runs": (),
    "the same training length": ("train_length",),
    "the same training length and state": ("train_length", "state_size"),
}
"""What runs have in common that predictors are compared among."""


def budgets(table: xr.Dataset) -> Iterator[tuple[dict[str, Any], xr.Dataset]]:
    """Finished runs of one kind after another: by stream, training budget, and share of uniform lags."""
    runs, names = final(table), ("stream", "steps", "uniform")
    kinds = sorted(set(zip(*(runs[name].values.tolist() for name in names), strict=True)))
    for kind in kinds:
        same = np.logical_and.reduce([runs[n].values == v for n, v in zip(names, kind, strict=True)])
        yield dict(zip(names, kind, strict=True)), runs.isel(run=same)


def findings(
    table: xr.Dataset, far: int = FAR, within: float = WITHIN, size: str = "entries"
) -> list[dict[str, Any]]:
    """Say of every budget and kind of data who forgets, the thresholds, their laws, and what foretells them.

    Parameters
    ----------
    table : Dataset
        Runs.
    far, within
        See :func:`~statescope.analyses.thresholds.learned_to_forget`.
    size : str
        What laws are functions of: ``"entries"``, all numbers of recurrent and convolution state, as the
        paper counts, ``"state_numbers"`` or ``"state_size"``.

    Returns
    -------
    list of dict
        For each kind: what it is, ``runs``; with ``points`` and, of three points or more that are known and
        not all equal, ``laws``: ``forget`` (by recall), ``forget_by_loss`` (the paper's criterion),
        ``growth`` (the training length at which the loss beyond it grows by the paper's factor) and
        ``recall``; ``recall_falls``, the fall of recent recall by state and training length (over seeds);
        each value a dataset as :meth:`xarray.Dataset.to_dict` gives it. ``trends`` with the state size, at
        the same training length; ``trends_with_length``, with the training length, at the same state size.
        ``more_training``: growth, its losses and retention, beside the same runs at the next smaller budget.
        ``passkeys``: how many runs were asked, and which have not learned to answer and are left out.
        ``predictors`` of ``growth`` and ``recall``, among all runs and among those alike in :data:`ALIKE`.
    """
    said: list[dict[str, Any]] = []
    smaller: dict[Any, tuple[int, xr.Dataset]] = {}
    for kind, runs in budgets(table):
        found: dict[str, Any] = {"criterion": {"within": within, "far": far, "recalled": RECALLED}}
        found |= {**kind, "runs": runs.sizes["run"], "size": size} | _of_kind(runs, far, within, size)
        alike = kind["stream"], kind["uniform"]
        if alike in smaller:
            found["more_training"] = _more_training(*smaller[alike], runs, far)
        smaller[alike] = kind["steps"], runs
        said.append(found)
    return said


def _of_kind(runs: xr.Dataset, far: int, within: float, size: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    by_recall, by_loss = learned_to_forget(runs, within, far), learned_to_forget(runs, criterion="loss")
    lengths = passkey_lengths(runs) if "passkeys" in runs else recall_lengths(runs, RECALLED, far=far)
    both, growth, losses = recent_recall(runs, far), loss_growth(runs, far), end_and_far_losses(runs, far)
    falls = (both["inside"] - both["far"]).rename("fall")
    recalled = best_recall(lengths.isel(run=lengths.notnull().values), size)
    for name, points in (
        ("forget", thresholds(by_recall, size)),
        ("forget_by_loss", thresholds(by_loss, size)),
        ("growth", crossings(growth, size)),
    ):
        found[name] = _with_laws(points, "threshold", ("low", "high"))
    found["recall"] = _with_laws(recalled, "length", ("low", "high"))
    found["recall_falls"] = _plain(_by_cell(falls, size))
    of_size = {"growth": growth, "recall_falls": falls, "length_recalled": lengths} | _trending(runs)
    of_length = {"length_recalled": lengths, "loss_at_the_end": losses["end"], "loss_far": losses["far"]}
    found["trends"] = {n: _json(trend(of, size)) for n, of in of_size.items()}
    found["trends_with_length"] = {n: _json(trend(of, "train_length", size)) for n, of in of_length.items()}
    if "passkeys" in runs:
        found["passkeys"] = _learned(runs)
    if runs.sizes["run"] >= 3:
        found["predictors"] = _predictors(runs, {"growth": growth, "recall": lengths})
    return found


def _learned(runs: xr.Dataset) -> dict[str, Any]:
    """How many runs were asked for passkeys, and which have not learned to answer."""
    answers = answers_passkeys(runs)
    names = ("state_size", "train_length", "seed")
    failed = sorted(zip(*(runs[n].values[(answers == 0).values].tolist() for n in names), strict=True))
    return {"asked": int(answers.notnull().sum()), "not_learned": [list(run) for run in failed]}


def _more_training(steps: int, before: xr.Dataset, after: xr.Dataset, far: int) -> dict[str, Any]:
    """Compare runs with the same ones of fewer steps: growth, its losses, retention of the longest head."""
    found: dict[str, Any] = {"than": steps}
    found["growth"] = _json(paired(loss_growth(before, far), loss_growth(after, far)))
    losses = [end_and_far_losses(runs, far) for runs in (before, after)]
    for part, name in (("end", "loss_at_the_end"), ("far", "loss_far")):
        found[name] = _json(paired(losses[0][part], losses[1][part]))
    if "inside_retention" in before:
        old, new = (runs["inside_retention"].max(("layer", "head")) for runs in (before, after))
        found["retention"] = _json(paired(old, new))
    return found


def _predictors(runs: xr.Dataset, outcomes: dict[str, xr.DataArray]) -> dict[str, Any]:
    return {
        name: {alike: _plain(predictors(runs, outcome, within=within)) for alike, within in ALIKE.items()}
        for name, outcome in outcomes.items()
        if int(np.isfinite(outcome.values).sum()) >= 3
    }


def _with_laws(points: xr.Dataset, name: str, ends: tuple[str, str]) -> dict[str, Any]:
    size = str(next(iter(points[name].dims)))
    usable = np.isfinite(points[name].values) & (points[name].values > 0)
    found: dict[str, Any] = {"points": _plain(points)}
    if usable.sum() >= 3 and np.ptp(points[name].values[usable]) > 0:
        known = points.isel({size: usable})
        low, high = (known[end].values for end in ends)
        y = known[name].values
        low, high = np.where(low > 0, low, y / 2), np.where(np.isfinite(high), high, 2 * y)
        found["laws"] = _plain(fit_laws(known[size].values, y, low, high))
    return found


def _by_cell(values: xr.DataArray, size: str) -> xr.Dataset:
    """Mean, least and most over the runs of every state size and training length."""
    sizes, lengths = (np.unique(values[name].values) for name in (size, "train_length"))
    out = np.full((3, len(sizes), len(lengths)), np.nan)
    for i, n in enumerate(sizes):
        for j, t in enumerate(lengths):
            some = values.values[(values[size].values == n) & (values["train_length"].values == t)]
            if np.isfinite(some).any():
                out[:, i, j] = np.nanmean(some), np.nanmin(some), np.nanmax(some)
    dims = (size, "train_length")
    names = ("mean", "least", "most")
    return xr.Dataset(
        {n: (dims, v) for n, v in zip(names, out, strict=True)},
        dict(zip(dims, (sizes, lengths), strict=True)),
    )


def _trending(runs: xr.Dataset) -> dict[str, xr.DataArray]:
    """What may rise or fall with the state size: of states, the head with most."""
    names = ("inside_retention", "inside_live_memories")
    found = {n.removeprefix("inside_"): runs[n].max(("layer", "head")) for n in names if n in runs}
    if "passkeys" in runs:
        shares = passkey_shares(runs)
        found |= {f"passkeys_{part}": shares[part] for part in ("inside", "beyond")}
    return found


def _plain(dataset: xr.Dataset) -> dict[str, Any]:
    """As JSON can hold it."""
    found: dict[str, Any] = _json(dataset.to_dict())
    return found


def _json(value: Any) -> Any:
    """Five digits, and None for what is not finite."""
    if isinstance(value, dict):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value
