"""What a table of runs says, in sentences made from its findings: nothing is known here but the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from statescope.analyses.predictors import KNOWN

OUTCOMES = {"growth": "how much their loss grows", "recall": "how far back they recall"}
"""What predictors order runs by."""


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
        size; what more training did; from how far back is recalled; what rises or falls with the state's
        size; which measure foretells it. What cannot be said is not said, and why is.
    """
    if found["stream"] == "recall":
        forget, by_loss = (xr.Dataset.from_dict(found[n]["points"]) for n in ("forget", "forget_by_loss"))
        said = [_who(found, forget), _thresholds(found, forget), _by_loss(found, by_loss)]
    else:
        said = [f"{_kind(found)}: {found['runs']} runs."]
    said.append(_growth(found, xr.Dataset.from_dict(found["growth"]["points"])))
    if "more_training" in found:
        said.append(_more_training(found["more_training"]))
    if "passkeys" in found:
        said.append(_not_learned(found["passkeys"]))
    said.append(_lengths(found, xr.Dataset.from_dict(found["recall"]["points"])))
    said.append(_trends(found["trends"], "At the same training length", "state's size"))
    said.append(_trends(found["trends_with_length"], "With the same state", "training length"))
    for outcome, tables in found.get("predictors", {}).items():
        said.append(_predictors(OUTCOMES[outcome], tables))
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


def _by_loss(found: dict[str, Any], points: xr.Dataset) -> str:
    runs, sizes = _numbers(points["runs"]), points[found["size"]].values
    forget = np.nansum(_numbers(points["fraction"]) * runs)
    known, each = _known(found, points)
    lead = (
        f"By the paper's criterion (the loss is nowhere beyond above twice the largest inside),"
        f" {forget:.0f} of {runs.sum():.0f} forget"
    )
    if not known:
        return f"{lead}; from which training length on half of them do is known for no state size."
    trend = _trend("threshold", sizes, _numbers(points["threshold"]), found["forget_by_loss"])
    from_on = f"half of them from a training length on that is known for {known} of {len(sizes)} state sizes"
    return f"{lead}; {from_on} ({each}).{trend}"


def _growth(found: dict[str, Any], points: xr.Dataset) -> str:
    sizes, middle = points[found["size"]].values, _numbers(points["threshold"])
    known, each = _known(found, points)
    level = points.attrs.get("level", 2)
    lead = f"The loss far beyond the training length over that at its end falls to {level:g}"
    measured = np.isfinite(_numbers(points["growth"])).any(-1)
    open_ended = {"below": (middle == 0).sum(), "above": (measured & ~np.isfinite(middle)).sum()}
    at = [f"for {n} it is {side} that at all lengths tried" for side, n in open_ended.items() if n]
    rest = f"; {', '.join(at)}" if at else ""
    if not known:
        return f"{lead} inside the training lengths tried for no state size{rest}."
    law = _trend("length", sizes, middle, found["growth"])
    where = f"at a training length that is known for {known} of {len(sizes)} state sizes"
    return f"{lead} {where} ({each}){rest}.{law}"


def _known(found: dict[str, Any], points: xr.Dataset) -> tuple[int, str]:
    """How many thresholds are known, and which, with their intervals."""
    columns = (points[found["size"]].values, *(_numbers(points[n]) for n in ("threshold", "low", "high")))
    rows = [row for row in zip(*columns, strict=True) if np.isfinite(row[1]) and row[1] > 0]
    each = [f"{n:,} numbers: {t:,.0f} tokens ({_end(low)} to {_end(high)})" for n, t, low, high in rows]
    return len(rows), "; ".join(each)


def _more_training(found: dict[str, Any]) -> str:
    compared = {name: of for name, of in found.items() if name != "than" and of["p"] is not None}
    each = [
        f"{name.replace('_', ' ')} is {of['ratio']:.2f} times as large ({of['low']:.2f} to {of['high']:.2f}),"
        f" larger in {of['rises']:.0f} of {of['pairs']:.0f} (p = {of['p']:.2g})"
        for name, of in compared.items()
    ]
    what = "; ".join(each) or "nothing can be compared"
    return f"Beside the same runs after {found['than']:,} steps (same state, length and seed): {what}."


def _not_learned(found: dict[str, Any]) -> str:
    failed = found["not_learned"]
    lead = f"Of {found['asked']} runs asked for passkeys, {found['asked'] - len(failed)} learned to answer"
    if not failed:
        return f"{lead}."
    each = ", ".join(f"N={n} T={t:,} seed {s}" for n, t, s in failed)
    return f"{lead}; the others fail at the shortest prompt already and are left out: {each}."


def _trends(found: dict[str, Any], alike: str, against: str) -> str:
    known = {name: t for name, t in found.items() if t["p"] is not None}
    if not known:
        return f"{alike}, nothing varies with the {against}."
    each = [f"{n.replace('_', ' ')} {t['correlation']:+.2f} (p = {t['p']:.2g})" for n, t in known.items()]
    return f"{alike}, rank correlation with the {against}: {', '.join(each)}."


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
    each = [_fit(laws, str(name)) for name in laws["law"].values]
    return text + f" At a size left out: {', '.join(each)}. The {best} one predicts best."


def _fit(laws: xr.Dataset, name: str) -> str:
    """How well a law fits and predicts; one that levels off is no growth without bound."""
    law = laws.sel(law=name)
    r2, error = (float(_numbers(law[n])) for n in ("r2", "error"))
    base = float(_numbers(law["value"].sel(parameter="b")))
    name = f"{name} (base below 1: it levels off)" if name == "exponential" and base < 1 else name
    off = "not known" if np.isnan(error) else f"off by a factor {np.exp(error):.2f}"
    return f"{name} {off}, R2 {r2:.2f}"


def _predictors(outcome: str, tables: dict[str, Any]) -> str:
    """Say for every comparison which measure is strongest, and what was known before training."""
    each = []
    for alike, content in tables.items():
        table = xr.Dataset.from_dict(content)
        names = [str(n) for n in table["predictor"].values]
        measures = [n for n in names if n not in KNOWN]
        if not measures:
            each.append(f"among {alike}, none varies")
            continue
        p = float(_numbers(table["p"].sel(predictor=measures[0])))
        given = [_correlation(table, n) for n in KNOWN if n in names]
        beside = f"; beside it, {', '.join(given)}" if given else ""
        each.append(f"among {alike}, {_correlation(table, measures[0])}, p = {p:.2g}{beside}")
    lead = f"Of the measures read inside the training length, the one that orders runs best by {outcome}"
    return f"{lead} (rank correlation; p of the strongest of all): {'. '.join(each)}."


def _correlation(table: xr.Dataset, name: str) -> str:
    row = table.sel(predictor=name)
    value, low, high = (float(_numbers(row[n])) for n in ("correlation", "low", "high"))
    return f"{name} {value:+.2f} ({low:+.2f} to {high:+.2f})"


def _numbers(values: xr.DataArray) -> NDArray[np.float64]:
    """Values as they were: None, as JSON has it, is not finite."""
    return np.asarray(values.values, dtype=float)


def _end(value: float) -> str:
    return f"{value:,.0f}" if np.isfinite(value) else "any length"
