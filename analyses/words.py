"""What a table of runs says, in sentences made from its findings: nothing is known here but the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

MEASURED_AGAINST = ("train_length", "state_numbers")
"""Predictors known before a run is trained: what a measure of its states must better."""


def in_words(found: dict[str, Any]) -> list[str]:
    """Say what became of the runs of one kind.

    Parameters
    ----------
    found : dict
        One entry of :func:`statescope.analyses.findings.findings`, or of the JSON it was written to.

    Returns
    -------
    list of str
        Sentences: how many runs forget; from which training length on, and how that goes with the state's
        size; from how far back is recalled; what rises or falls with the state's size; which measure
        foretells it. What cannot be said is not said, and why is.
    """
    if found["stream"] == "recall":
        forget = xr.Dataset.from_dict(found["forget"]["points"])
        said = [_who(found, forget), _thresholds(found, forget)]
    else:
        said = [f"{_kind(found)}: {found['runs']} runs."]
    if "growth" in found:
        said.append(_growth(found, xr.Dataset.from_dict(found["growth"]["points"])))
    said.append(_lengths(found, xr.Dataset.from_dict(found["recall"]["points"])))
    if "trends" in found:
        said.append(_trends(found["trends"]))
    if "predictors" in found:
        said.append(_predictors(xr.Dataset.from_dict(found["predictors"])))
    return said


def _kind(found: dict[str, Any]) -> str:
    kind = f"{found['stream']} stream, {found['steps']:,} steps"
    return kind + (f", {found['uniform']:.0%} of the lags uniform" if found["stream"] == "recall" else "")


def _who(found: dict[str, Any], points: xr.Dataset) -> str:
    runs = _numbers(points["runs"])
    judged, forget = runs.sum(), np.nansum(_numbers(points["fraction"]) * runs)
    at = found["criterion"]
    return (
        f"{_kind(found)}: {found['runs']} runs, of which {judged:.0f} can be judged (the others recall too"
        f" little even inside their training length). {forget:.0f} of them forget: from token"
        f" {at['far']:,} on, recall of recent pairs has fallen by at most {at['within']:g}."
    )


def _thresholds(found: dict[str, Any], points: xr.Dataset) -> str:
    sizes, middle = points[found["size"]].values, _numbers(points["threshold"])
    known, each = _known(found, points)
    if not known:
        return "From which training length on half of the runs forget is known for no state size."
    lead = f"The training length from which half of the runs forget is known for {known} of {len(sizes)}"
    return f"{lead} state sizes ({each}).{_trend('threshold', sizes, middle, found['forget'])}"


def _growth(found: dict[str, Any], points: xr.Dataset) -> str:
    sizes, middle = points[found["size"]].values, _numbers(points["threshold"])
    known, each = _known(found, points)
    level = points.attrs.get("level", 2)
    lead = f"The loss far beyond the training length over that at its end falls to {level:g}"
    if not known:
        return f"{lead} inside the training lengths tried for no state size."
    law = _trend("length", sizes, middle, found["growth"])
    return f"{lead} at a training length that is known for {known} of {len(sizes)} state sizes ({each}).{law}"


def _known(found: dict[str, Any], points: xr.Dataset) -> tuple[int, str]:
    """How many thresholds are known, and which, with their intervals."""
    columns = (points[found["size"]].values, *(_numbers(points[n]) for n in ("threshold", "low", "high")))
    rows = [row for row in zip(*columns, strict=True) if np.isfinite(row[1]) and row[1] > 0]
    each = [f"{n:,} numbers: {t:,.0f} tokens ({_end(low)} to {_end(high)})" for n, t, low, high in rows]
    return len(rows), "; ".join(each)


def _trends(found: dict[str, Any]) -> str:
    known = {name: t for name, t in found.items() if t["p"] is not None}
    if not known:
        return "At the same training length, nothing varies with the state's size."
    each = [f"{n.replace('_', ' ')} {t['correlation']:+.2f} (p = {t['p']:.2g})" for n, t in known.items()]
    return f"At the same training length, rank correlation with the state's size: {', '.join(each)}."


def _lengths(found: dict[str, Any], points: xr.Dataset) -> str:
    sizes, length = points[found["size"]].values, _numbers(points["length"])
    if not len(sizes):
        return "From how far back they recall is not known."
    ends = [f"{length[i]:,.0f} with {sizes[i]:,} numbers of state" for i in sorted({0, len(sizes) - 1})]
    of_text = found["stream"] == "text"
    what = "prompt from which 95 % of passkeys are recalled" if of_text else "distance recalled"
    lead = f"The longest {what}, of the best training length, is {', '.join(ends)}."
    return lead + _trend("length", sizes, length, found["recall"])


def _trend(what: str, sizes: NDArray[Any], values: NDArray[Any], found: dict[str, Any]) -> str:
    """Say whether it grows, and by which law; the power says how steeply."""
    known = np.isfinite(values) & (values > 0)
    if "laws" not in found:
        same = known.sum() >= 3 and np.ptp(values[known]) == 0
        why = "it is the same for all of them" if same else f"of {len(values)} sizes, {known.sum()} have one"
        return f" No law is fitted to the {what}: {why}."
    laws = xr.Dataset.from_dict(found["laws"])
    power = laws.sel(law="power", parameter="b")
    slope, low, high = (float(_numbers(power[n])) for n in ("value", "low", "high"))
    way = "grows" if low > 0 else "falls" if high < 0 else "neither surely grows nor surely falls"
    text = f" The {what} {way} with the state: as its {slope:.2f}th power ({low:.2f} to {high:.2f})."
    best = laws.attrs.get("best")
    if not best:
        return text + " Too few points are known to compare laws by what they predict."
    r2, error = (float(_numbers(laws[n].sel(law=best))) for n in ("r2", "error"))
    return text + (
        f" Of linear, power and exponential, the {best} one predicts a size left out best: off by a factor"
        f" {np.exp(error):.2f}, R2 {r2:.2f}."
    )


def _predictors(table: xr.Dataset) -> str:
    def one(name: str) -> str:
        row = table.sel(predictor=name)
        value, low, high = (float(_numbers(row[n])) for n in ("correlation", "low", "high"))
        return f"{name} {value:+.2f} ({low:+.2f} to {high:+.2f})"

    names = [str(n) for n in table["predictor"].values]
    measures = [n for n in names if n not in MEASURED_AGAINST]
    given = [one(n) for n in MEASURED_AGAINST if n in names]
    if not measures:
        return "No measure of the states orders the runs."
    return (
        f"Of the measures read inside the training length, {one(measures[0])} orders the runs best by the"
        f" context in which they still recall recent pairs (rank correlation); {', '.join(given)}."
    )


def _numbers(values: xr.DataArray) -> NDArray[np.float64]:
    """Values as they were: None, as JSON has it, is not finite."""
    return np.asarray(values.values, dtype=float)


def _end(value: float) -> str:
    return f"{value:,.0f}" if np.isfinite(value) else "any length"
