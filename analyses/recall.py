"""Up to which length of context passkeys are recalled."""

from __future__ import annotations

from statistics import NormalDist

import xarray as xr

from statescope.analyses import core

ACCURACY = 0.95
"""What counts as recalled; *Stuffed Mamba*, section 5."""


def recall_length(
    results: xr.Dataset, accuracy: float = ACCURACY, every_depth: bool = False, confidence: float = 0.95
) -> xr.Dataset:
    r"""Longest context whose passkeys are recalled.

    .. math::

        T_{recall} = \max \{ T : p_{T'} > 0.95 \text{ for all tested } T' \le T \}, \quad
        p = \text{successes} / \text{trials}

    Parameters
    ----------
    results : Dataset, (length,) or (length, depth)
        ``successes`` and ``trials``, counts; coordinate ``length`` in tokens. Other dimensions are kept.
    accuracy : float
        The accuracy to exceed.
    every_depth : bool
        Demand it of the worst depth. Default: of all depths together, as the paper.
    confidence : float
        Of the intervals (Wilson's).

    Returns
    -------
    Dataset
        ``accuracy``, ``low``, ``high``, by length (and depth); ``recall_length`` in tokens, 0 if even the
        shortest fails; ``failing_length``, the first tested one that fails, NaN if none does;
        ``surely_recalled``, the longest up to which even the lower bounds exceed the accuracy; and
        ``surely_failing``, the first whose upper bound does not.

    Notes
    -----
    Trouble: below the lengths the model is used at. The grid of lengths bounds what can be said: the truth
    lies between ``recall_length`` and ``failing_length``, and with few trials only between the two sure
    ones: 32 of 32 right has the lower bound 0.89. Source: *Stuffed Mamba* (arXiv 2410.07145), section 5.
    """
    for name in ("successes", "trials"):
        if name not in results or "length" not in results[name].dims:
            raise ValueError(
                f"results lacks {name} with a dimension length; it has {list(results.data_vars)}"
            )
    ordered = results.sortby("length")
    successes, trials = ordered["successes"].astype(float), ordered["trials"].astype(float)
    if bool(((successes < 0) | (successes > trials)).any()):
        raise ValueError("results: successes lie outside 0 ... trials")
    if "depth" in successes.dims and not every_depth:
        successes, trials = successes.sum("depth"), trials.sum("depth")
    low, high = core.wilson(successes.values, trials.values, NormalDist().inv_cdf((1 + confidence) / 2))
    found = xr.Dataset({"accuracy": successes / trials.where(trials > 0)})
    found = found.assign(low=found["accuracy"].copy(data=low), high=found["accuracy"].copy(data=high))
    worst = {n: found[n].min("depth") if "depth" in found[n].dims else found[n] for n in found.data_vars}
    lengths = ordered["length"]
    right = (worst["accuracy"] > accuracy).cumprod("length").astype(bool)
    sure = (worst["low"] > accuracy).cumprod("length").astype(bool)
    values = {
        "recall_length": lengths.where(right).max("length").fillna(0),
        "failing_length": lengths.where(~right).min("length"),
        "surely_recalled": lengths.where(sure).max("length").fillna(0),
        "surely_failing": lengths.where(worst["high"] <= accuracy).min("length"),
    }
    for name, value in values.items():
        found[name] = value.astype(float).assign_attrs(long_name=name.replace("_", " "), units="token")
    return found
