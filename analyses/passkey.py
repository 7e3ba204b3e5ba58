"""Answers to passkey prompts: the table, its accuracy, and the length up to which a model recalls.

The table has one entry for every prompt, by ``length`` (tokens), ``depth`` (0 to 1) and ``trial``:
``correct`` (1, 0; NaN if it was not asked), ``passkey``, ``answer``, ``needle_start`` and ``needle_stop``
(tokens), ``seed`` (with which the prompt can be rebuilt). Where states were measured, it also has the
measures of :func:`statescope.analyses.needle.needle_measures`, by ``layer`` and ``head``.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from statescope.analyses.needle import MEASURES

FORMAT, FORMAT_VERSION = "statescope_passkeys", 1
"""Name and value that open a file of answers."""

Row = dict[str, Any]

TEXTS = {"passkey": "passkey in the prompt", "answer": "passkey as the model said it"}
POSITIONS = {
    "needle_start": "first token of the needle",
    "needle_stop": "first token after the needle",
    "seed": "seed of the prompt",
}


def read_answers(path: str | Path) -> xr.Dataset:
    """Open a file of answers, finished or not.

    Parameters
    ----------
    path : str or Path
        What ``statescope passkey`` wrote.

    Returns
    -------
    Dataset, (length, depth, trial[, layer, head])
        The table (see this module); prompts that were not asked yet have ``correct`` NaN.

    Raises
    ------
    ValueError
        If the file is something else, or damaged; says where.
    """
    header, rows, _ = read_lines(Path(path))
    if header is None or not rows:
        raise ValueError(f"path={str(path)!r} holds no answers yet")
    return tabulate(header, rows)


def read_lines(path: Path) -> tuple[Row | None, list[Row], int]:
    """Read a file of answers.

    Returns
    -------
    header : dict or None
        Its first line; None if there is no whole line.
    rows : list of dict
        One for every prompt.
    whole : int
        Bytes of whole lines; what is beyond was cut off by a kill.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    lines: list[Row] = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no file of answers, or damaged in line {number}: {error}") from error
    foreign = (
        lines[0].get(FORMAT) != FORMAT_VERSION if lines else not f'{{"{FORMAT}'.encode().startswith(data[:9])
    )
    if foreign:
        raise ValueError(f"{path} is no file of answers (format {FORMAT_VERSION}); name another")
    return (lines[0] if lines else None), lines[1:], whole


def tabulate(header: Mapping[str, Any], rows: Sequence[Row]) -> xr.Dataset:
    """Arrange answers by length, depth and trial.

    Parameters
    ----------
    header : mapping
        Whose answers these are; becomes the attributes.
    rows : sequence of dict
        One for every prompt, in any order.
    """
    coordinates: dict[str, NDArray[Any]] = {
        "length": np.unique([row["length"] for row in rows]),
        "depth": np.unique([row["depth"] for row in rows]),
        "trial": np.arange(max(row["trial"] for row in rows) + 1),
    }
    dims = tuple(coordinates)
    shape = tuple(len(c) for c in coordinates.values())
    at = tuple(np.searchsorted(coordinates[d], [row[d] for row in rows]) for d in dims)

    def spread(values: ArrayLike, missing: Any) -> NDArray[Any]:
        given = np.asarray(values)
        out = np.full((*shape, *given.shape[1:]), missing, dtype=given.dtype)
        out[at] = given
        return out

    correct = np.array([row["answer"] == row["passkey"] for row in rows], dtype=np.float32)
    variables: dict[Hashable, Any] = {
        "correct": (dims, spread(correct, np.nan), _about("1 if answered rightly, else 0; NaN if not asked"))
    }
    for name, about in TEXTS.items():
        variables[name] = (dims, spread([row[name] for row in rows], ""), _about(about))
    for name, about in POSITIONS.items():
        variables[name] = (dims, spread(np.array([row[name] for row in rows], np.int64), -1), _about(about))
    for name in rows[0].get("measures", {}):
        values = spread(np.array([row["measures"][name] for row in rows], np.float32), np.nan)
        variables[name] = ((*dims, "layer", "head"), values, _about(MEASURES[name]))
        coordinates |= {"layer": np.array(header["layers"]), "head": np.arange(values.shape[-1])}
    table = xr.Dataset(variables, coordinates, attrs=dict(header))
    table["length"].attrs = {"long_name": "prompt length", "units": "tokens"}
    table["depth"].attrs = _about("depth of the needle: 0 at the start, 1 right before the question")
    return table


def _about(long_name: str) -> dict[str, str]:
    return {"long_name": long_name, "units": "1"}


def recall_length(
    answers: xr.Dataset,
    threshold: float = 0.95,
    confidence: float = 0.95,
    over: str | Iterable[str] = ("depth", "trial"),
) -> xr.Dataset:
    r"""Longest context from which passkeys are recalled, with an interval.

    .. math:: T_{recall} = \max \{ T : \text{accuracy}(T') \ge \text{threshold for all tested } T' \le T \}

    Parameters
    ----------
    answers : Dataset, (length, depth, trial)
        The table of answers; see this module.
    threshold : float
        Accuracy that counts as recall; the paper's 95 %.
    confidence : float
        Of every interval.
    over : str or iterable of str
        Dimensions that are pooled into one accuracy; ``"trial"`` alone gives a recall length by depth.

    Returns
    -------
    Dataset, (length, ...)
        By length: ``successes``, ``trials``, ``accuracy`` with its Wilson interval ``accuracy_low`` and
        ``accuracy_high``. Over all lengths, in tokens: ``recall_length`` (0 if the shortest length tested
        fails already) and the interval ``recall_length_low`` to ``recall_length_high``: up to the one,
        every tested length is surely recalled; at the other (infinite if there is none) and at every
        longer one tested, surely not. A ``recall_length_low`` of 0 means too few trials, or failure.

    Raises
    ------
    ValueError
        If a length has no answers, or an argument is out of range; names it.

    Notes
    -----
    Source: *Stuffed Mamba* (arXiv 2410.07145), section 4.3. The ends of the interval are two sequences of
    tests, from the shortest length up and from the longest down, each stopped at the first length that is
    not decided. If accuracy falls with length each end then errs with probability at most
    ``(1 - confidence) / 2``, however many lengths were tested. Pooled depths are strata of equal size,
    for which the interval is a little too wide, not too narrow.
    """
    for name, value in (("threshold", threshold), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value}; expected a number between 0 and 1")
    pooled = [over] if isinstance(over, str) else list(over)
    ordered = answers["correct"].sortby("length")
    successes, trials = ordered.sum(pooled), ordered.count(pooled)
    if bool((trials == 0).any()):
        empty = [int(n) for n in ordered["length"][(trials == 0).any(set(trials.dims) - {"length"})]]
        raise ValueError(f"answers has none at length {empty[0]}; finish the grid, or leave that length out")
    low, high = wilson(successes, trials, confidence)
    accuracy = successes / trials
    length = ordered["length"].astype(float)
    recalled = _unbroken(accuracy >= threshold)
    surely = _unbroken(low >= threshold)
    lost = _unbroken((high < threshold).isel(length=slice(None, None, -1))).sortby("length")
    table = xr.Dataset(
        {
            "successes": successes.assign_attrs(_about("prompts answered rightly")),
            "trials": trials.assign_attrs(_about("prompts")),
            "accuracy": accuracy.assign_attrs(_about("accuracy")),
            "accuracy_low": low.assign_attrs(_about("accuracy, lower end of the Wilson interval")),
            "accuracy_high": high.assign_attrs(_about("accuracy, upper end of the Wilson interval")),
            "recall_length": length.where(recalled, 0.0).max("length"),
            "recall_length_low": length.where(surely, 0.0).max("length"),
            "recall_length_high": length.where(lost, np.inf).min("length"),
        },
        attrs={"threshold": threshold, "confidence": confidence},
    )
    for name, about in (("", ""), ("_low", ", lower end"), ("_high", ", upper end")):
        table[f"recall_length{name}"].attrs = {"long_name": f"recall length{about}", "units": "tokens"}
    return table


def _unbroken(holds: xr.DataArray) -> xr.DataArray:
    """Whether a condition holds at a length and at all before it."""
    return holds.astype(int).cumprod("length").astype(bool).assign_coords(length=holds["length"])


def wilson(successes: Any, trials: Any, confidence: float = 0.95) -> tuple[Any, Any]:
    r"""Score interval of a proportion (Wilson 1927).

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Parameters
    ----------
    successes, trials : array
        Counts; there is at least one trial.
    confidence : float
        Probability with which the interval holds the true proportion.

    Returns
    -------
    low, high : array
        In [0, 1]; never empty, also where all or none succeeded.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / trials
    middle = p + z**2 / (2 * trials)
    half = z * np.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    low, high = np.maximum((middle - half) / scale, 0.0), np.minimum((middle + half) / scale, 1.0)
    return np.minimum(low, p), np.maximum(high, p)  # where all or none succeeded, rounding leaves p outside
