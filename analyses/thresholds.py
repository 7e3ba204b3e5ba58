"""The training length from which a state of a given size forgets, and the length it recalls, from runs.

Everything has an interval: a threshold lies between the last training length that fails and the first that
passes, and which those are differs from seed to seed. Laws are fitted in :mod:`statescope.analyses.laws`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from statescope.analyses.passkey import wilson
from statescope.analyses.runs import FAR, RECENT, recall, recall_by_position

Array = NDArray[np.float64]

WITHIN = 0.02
"""A run forgets if its recall of recent pairs far beyond the training length is at most so much lower."""

CAPABLE = 0.9
"""A run that recalls less of its recent pairs inside the training length has not learned the task."""

LOSS_FACTOR = 2.0
"""The paper's criterion: beyond the training length, the loss is nowhere larger by more than this factor."""

RECALLED = 0.9
"""Share of right answers at a lag that counts as recalled."""

DRAWS = 1000
"""Resamples of every bootstrap; the seed is fixed."""


def learned_to_forget(
    table: xr.Dataset,
    within: float = WITHIN,
    far: int = FAR,
    recent: int = RECENT,
    criterion: str = "recall",
    capable: float = CAPABLE,
) -> xr.DataArray:
    r"""Judge of every run whether it has learned to forget.

    .. math:: r_{far} \ge r_{inside} - \text{within} \quad \text{or} \quad
        \max_{t \ge T} \overline{\ell}_t \le 2 \max_{t < T} \overline{\ell}_t

    Parameters
    ----------
    table : Dataset
        Runs, from :func:`statescope.analyses.runs.read_runs`.
    within : float
        How much recall of recent pairs may fall.
    far : int
        Tokens from which on positions are far beyond.
    recent : int
        Lags below are recent, in pairs: what a state that forgets can always hold.
    criterion : str
        ``"recall"``, the first formula, or ``"loss"``, the second, which is the paper's.
    capable : float
        Runs that recall less of recent pairs inside the training length are not judged by recall.

    Returns
    -------
    DataArray, (run)
        1 or 0; NaN for runs that were not judged.

    Notes
    -----
    Source: *Stuffed Mamba* (arXiv 2410.07145), section 4. The loss of a run that recalls all but everything
    is so small inside that the factor 2 is strict; recall says what is lost.
    """
    if criterion not in ("recall", "loss"):
        raise ValueError(f"criterion={criterion!r}; expected 'recall' or 'loss'")
    if criterion == "loss":
        loss = recall_by_position(table, recent)["loss"]
        is_inside = loss["position"] < table["train_length"]
        ratio = loss.where(~is_inside).max("position") / loss.where(is_inside).max("position")
        return (ratio <= LOSS_FACTOR).astype(float).where(ratio.notnull()).rename("forgets")
    both = recent_recall(table, far, recent)
    forgets = (both["far"] >= both["inside"] - within).astype(float)
    return forgets.where(both["inside"] >= capable).rename("forgets")


def recent_recall(table: xr.Dataset, far: int = FAR, recent: int = RECENT) -> xr.Dataset:
    """Recall of recent pairs, ``inside`` the training length and ``far`` beyond it, (run)."""
    return recall(_recent(table, recent), far)


def _recent(table: xr.Dataset, recent: int) -> xr.Dataset:
    """What was asked at short lags, all of them together."""
    return table[["asked", "right", "loss"]].isel(lag=(table["lag"] < recent).values).sum("lag")


def thresholds(
    forgets: xr.DataArray, size: str = "state_numbers", over: str = "train_length", confidence: float = 0.95
) -> xr.Dataset:
    r"""Estimate :math:`T_{forget}` for every state size: between the last length that fails and the next.

    Parameters
    ----------
    forgets : DataArray, (run)
        From :func:`learned_to_forget`; runs that differ in more than size, length and seed should have been
        taken apart.
    size, over : str
        Coordinates of the runs: what the threshold depends on, and what it is a value of.
    confidence : float
        Of all intervals.

    Returns
    -------
    Dataset, (size[, length])
        ``fraction`` of runs that forget with its Wilson interval, ``fraction_low`` and ``_high``, and
        ``runs``, (size, length). ``last_failing`` (0 if none fails) and ``first_passing`` (infinite if the
        longest fails): there and at all longer ones half of the runs or more forget. ``threshold``, their
        geometric mean, NaN where one end is open; ``low`` and ``high``: quantiles, over resampled seeds, of
        the two ends.
    """
    known = forgets.isel(run=forgets.notnull().values)
    sizes, lengths = (np.unique(forgets[name].values) for name in (size, over))
    rng = np.random.default_rng(0)
    passed, runs = np.zeros((2, len(sizes), len(lengths)))
    draws = np.zeros((DRAWS, len(sizes), len(lengths)))
    for i, n in enumerate(sizes):
        for j, t in enumerate(lengths):
            values = known.values[(known[size].values == n) & (known[over].values == t)]
            passed[i, j], runs[i, j] = values.sum(), len(values)
            with np.errstate(invalid="ignore"):
                share = passed[i, j] / runs[i, j]
                draws[:, i, j] = (
                    rng.binomial(len(values), 0 if np.isnan(share) else share, DRAWS) / runs[i, j]
                )
    with np.errstate(invalid="ignore", divide="ignore"):
        fraction = passed / runs
        low, high = wilson(passed, runs, confidence)
    last, first = _ends(fraction, lengths)
    many_last, many_first = _ends(draws, lengths)
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore"):
        middle = np.where((last > 0) & np.isfinite(first), np.sqrt(last * first), np.nan)
    dims = (size, over)
    found: dict[str, Any] = {"fraction": fraction, "fraction_low": low, "fraction_high": high, "runs": runs}
    ends = {"last_failing": last, "first_passing": first, "threshold": middle}
    ends["low"] = np.quantile(many_last, tail, axis=0, method="lower")
    ends["high"] = np.quantile(many_first, 1 - tail, axis=0, method="higher")
    result = xr.Dataset({n: (dims, v) for n, v in found.items()}, {size: sizes, over: lengths})
    for name, values in ends.items():
        result[name] = ((size,), values, {"long_name": name.replace("_", " "), "units": "tokens"})
    return result


def _ends(fraction: Array, lengths: NDArray[Any]) -> tuple[Array, Array]:
    """Last failing and first passing length along the last axis; what was not run is passed over."""
    fails = fraction < 0.5  # NaN does not
    known = ~np.isnan(fraction)
    last = np.max(np.where(fails, lengths, 0.0), axis=-1)
    after = known & (lengths > last[..., None])
    return last, np.min(np.where(after, lengths, np.inf), axis=-1)


def recall_lengths(
    table: xr.Dataset, threshold: float = RECALLED, tokens_per_pair: int = 2, far: int = FAR
) -> xr.DataArray:
    """Longest distance from which a run recalls, far beyond its training length, (run), in tokens.

    The end of the last bin of lags at which, and at all shorter ones, the share of right answers is
    ``threshold`` or more; 0 if already the shortest lag is lost.
    """
    shares = recall(table, far)["far"]
    lags = table["lag"].values.astype(float)
    ends = np.append(lags[1:], 2 * lags[-1]) - 1
    holds = (shares >= threshold).transpose("run", "lag").values.cumprod(-1)
    longest = (holds * ends).max(-1) * tokens_per_pair
    attrs = {"long_name": "longest distance recalled", "units": "tokens"}
    return xr.DataArray(longest, table["state_numbers"].coords, ("run",), "recall_length", attrs)


def answers_passkeys(table: xr.Dataset, capable: float = CAPABLE) -> xr.DataArray:
    """Which runs have learned to answer: they recall ``capable`` of the shortest prompt's passkeys, (run).

    1 or 0; NaN for runs that were not asked. The others say nothing of how far back they would recall.
    """
    if "passkeys" not in table:
        raise ValueError("table has no passkeys; ask for them when the sweep is run")
    accuracy = table["passkeys"].mean("depth").transpose("run", "length")
    first = accuracy.notnull().values.argmax(-1)
    shortest = accuracy.isel(length=xr.DataArray(first, dims="run")).drop_vars("length")
    return (shortest >= capable).astype(float).where(shortest.notnull()).rename("answers")


def passkey_lengths(table: xr.Dataset, threshold: float = 0.95, capable: float = CAPABLE) -> xr.DataArray:
    """Longest prompt from which a run recalls passkeys at every depth together, (run), in tokens.

    The paper's :math:`T_{recall}`: accuracy of ``threshold`` or more there and at all shorter prompts; 0 if
    the shortest fails, NaN for runs that were not asked or have not learned to answer (``capable``, see
    :func:`answers_passkeys`). Source: *Stuffed Mamba*, section 4.3.
    """
    answers = answers_passkeys(table, capable)
    accuracy = table["passkeys"].mean("depth").transpose("run", "length")
    holds = (accuracy >= threshold).values.cumprod(-1)
    longest = (holds * table["length"].values).max(-1).astype(float)
    longest[(answers != 1).values] = np.nan
    attrs = {"long_name": "longest prompt recalled", "units": "tokens"}
    return xr.DataArray(longest, table["state_numbers"].coords, ("run",), "recall_length", attrs)


def passkey_shares(table: xr.Dataset, times: int = 8, capable: float = CAPABLE) -> xr.Dataset:
    """Share of passkeys recalled at all depths, in prompts ``inside`` and ``beyond`` training, (run).

    Beyond are prompts longer than the training length, up to ``times`` it. NaN for runs that have not
    learned to answer (``capable``, see :func:`answers_passkeys`).
    """
    answers = answers_passkeys(table, capable)
    accuracy, length, trained = table["passkeys"].mean("depth"), table["length"], table["train_length"]
    is_beyond = (length > trained) & (length <= times * trained)
    parts = {"inside": length <= trained, "beyond": is_beyond}
    shares = {name: accuracy.where(part).mean("length") for name, part in parts.items()}
    return xr.Dataset(shares).where(answers == 1)


def best_recall(lengths: xr.DataArray, size: str = "state_numbers", confidence: float = 0.95) -> xr.Dataset:
    """Estimate :math:`T_{recall}` for every state size: the best training length's median over seeds.

    Parameters
    ----------
    lengths : DataArray, (run)
        From :func:`recall_lengths` or, for passkeys, of the same form.
    size : str
        Coordinate that the length depends on.
    confidence : float
        Of the bootstrap over seeds.

    Returns
    -------
    Dataset, (size)
        ``length`` with ``low`` and ``high``, in tokens.
    """
    rng = np.random.default_rng(0)
    sizes, found = np.unique(lengths[size].values), []
    for n in sizes:
        of_size = lengths.isel(run=(lengths[size] == n).values)
        cells = [
            of_size.values[of_size["train_length"].values == t] for t in np.unique(of_size["train_length"])
        ]
        drawn = [np.median(rng.choice(c, (DRAWS, len(c))), axis=1) for c in cells]
        tail = (1 - confidence) / 2
        low, high = np.quantile(np.max(drawn, axis=0), (tail, 1 - tail))
        found.append((max(np.median(c) for c in cells), low, high))
    names = ("length", "low", "high")
    columns = np.array(found).reshape(-1, len(names)).T
    return xr.Dataset(
        {n: ((size,), c, {"units": "tokens"}) for n, c in zip(names, columns, strict=True)}, {size: sizes}
    )
