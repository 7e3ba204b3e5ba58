"""How large states are, what changes them, and how far they outgrow what was seen in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from statescope.analyses import core
from statescope.analyses.blocks import Array, Block, blocks, by_layer, map_tokens, state_shape, steps, until
from statescope.analyses.blocks import train_length as resolve
from statescope.schema import PER_STEP


def state_statistics(record: xr.DataTree, shape: tuple[int, int] | None = None) -> xr.Dataset:
    r"""Norm, mean and variance of the entries of every state.

    .. math::

        |S_t|_F, \qquad \mu_t = \frac{1}{KV} \sum_{kv} S_{kv}, \qquad
        \sigma^2_t = \frac{|S_t|^2}{KV} - \mu_t^2

    Parameters
    ----------
    record : DataTree
        A record; with ``window=w``, states at the ends of windows.
    shape : (int, int), optional
        Key and value size, :math:`K` and :math:`V`. Default: the record's own.

    Returns
    -------
    Dataset, (sequence, layer, token, head)
        ``norm`` and ``mean`` in the state's unit, ``variance`` in its square.

    Notes
    -----
    Trouble: a variance that goes on growing past the training length, or is orders of magnitude above the
    other heads'. Source: *Stuffed Mamba* (arXiv 2410.07145), section 4 and figure 6.
    """
    key, value = state_shape(record, shape)

    def statistics(block: Block, carry: Any) -> tuple[tuple[Array, ...], Any]:
        norm, mean = block["state_norm"], block["state_mean"]
        return (norm, mean, np.maximum(norm**2 / (key * value) - mean**2, 0)), None

    labels = {
        "norm": ("Frobenius norm of the state", "1"),
        "mean": ("mean entry of the state", "1"),
        "variance": ("variance of the state's entries", "1"),
    }
    return map_tokens(steps(record), ("state_norm", "state_mean"), statistics, labels)


def norm_budget(record: xr.DataTree) -> xr.Dataset:
    r"""What the energy of every state is made of: what decay left, the cross term, the write.

    .. math:: |S_t|^2 = (\alpha_t |S_{t-1}|)^2 + 2 \langle \alpha_t S_{t-1}, U_t \rangle + |U_t|^2

    Parameters
    ----------
    record : DataTree
        A record. With ``window=w``, ``decayed`` is exact, ``write`` leaves out the decay inside the window,
        ``cross`` is estimated from the mean overlap, and what that misses is in ``residual``.

    Returns
    -------
    Dataset, (sequence, layer, token, head)
        ``decayed``, ``cross``, ``write`` and ``residual``, in the state's unit squared.

    Notes
    -----
    Trouble: ``cross`` above 0 on average (writes pile up on what is stored) with ``decayed`` near the former
    energy (nothing is forgotten). A ``residual`` above rounding, 1e-5 of the sum of the terms' sizes, at
    ``window=1`` is a damaged record, or decay that differs between keys. Source: derived, from the
    recurrence; exact where one decay serves a whole head.
    """

    def split(block: Block, carry: Any) -> tuple[tuple[Array, ...], Any]:
        log_decay, write, norm, overlap = (block[n] for n in names)
        return core.budget(log_decay, write, norm, overlap, carry)

    names = ("log_decay", "write_norm", "state_norm", "write_overlap")
    labels = {
        "decayed": ("energy left of the former state", "1"),
        "cross": ("energy from the overlap of write and state", "1"),
        "write": ("energy of the write", "1"),
        "residual": ("energy unaccounted for", "1"),
    }
    return map_tokens(steps(record), names, split, labels)


def overload_ratio(record: xr.DataTree, train_length: int | None = None) -> xr.DataArray:
    r"""How far a state has outgrown what it was trained with.

    .. math:: |S_t| \,/\, \max_{s < T_{train}} |S_s|

    Parameters
    ----------
    record : DataTree
        A record longer than the training length. With ``window=w``, the largest norm is that at any token.
    train_length : int, optional
        :math:`T_{train}` in tokens. Default: the record's own.

    Returns
    -------
    DataArray, (sequence, layer, token, head)
        1 is the largest size reached inside the training length.

    Notes
    -----
    Trouble: above 1 beyond the training length, and growing: a state the model has never seen. Source:
    derived, after *Stuffed Mamba* (arXiv 2410.07145), figure 6.
    """
    found = steps(record)
    ratio = found["state_norm"] / largest_inside(found, resolve(record, train_length)).astype("float32")
    ratio = ratio.transpose(*PER_STEP).rename("overload_ratio").drop_vars("width")
    return ratio.assign_attrs(long_name="overload ratio", units="1")


def overload_growth(record: xr.DataTree, train_length: int | None = None) -> xr.Dataset:
    r"""How the norms beyond the training length differ from those inside it.

    .. math::

        \text{slope} = \frac{\operatorname{cov}(t, r_t)}{\operatorname{var}(t)}, \qquad
        z = \frac{\overline{r}_{beyond} - \overline{r}_{inside}}{\operatorname{std} r_{inside}}, \qquad
        r_t = \frac{|S_t|}{\max_{s < T_{train}} |S_s|}

    Parameters
    ----------
    record : DataTree
        A record longer than the training length. With ``window=w``, norms at the ends of windows.
    train_length : int, optional
        :math:`T_{train}` in tokens. Default: the record's own.

    Returns
    -------
    Dataset, (sequence, layer, head)
        ``slope`` of the overload ratio beyond the training length, per token (least squares); ``zscore`` and
        ``beyond``, the mean ratio there. NaN where fewer than two entries lie beyond it.

    Notes
    -----
    Trouble: a slope of the order of 1 / :math:`T_{train}` (the state grows as fast again as in training),
    a z-score above 3. Entries that are not finite are left out. Source: derived.
    """
    limit = resolve(record, train_length)
    found = steps(record)
    largest = largest_inside(found, limit)
    sums = [_moments(layer, limit) for layer in by_layer(found)]
    n0, r0, rr0, n1, t1, tt1, r1, tr1 = np.concatenate(sums, axis=2)
    scale = largest.values
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(np.maximum(rr0 / n0 - (r0 / n0) ** 2, 0))
        slope = (tr1 - t1 * r1 / n1) / (tt1 - t1**2 / n1) / scale
        values = {"slope": slope, "zscore": (r1 / n1 - r0 / n0) / spread, "beyond": r1 / n1 / scale}
    names = {
        "slope": "growth of the overload ratio beyond the training length",
        "zscore": "mean norm beyond against those inside, in their standard deviations",
        "beyond": "mean overload ratio beyond the training length",
    }
    result = {
        k: largest.copy(data=np.where(n1 > 1, v, np.nan)).assign_attrs(long_name=names[k], units="1")
        for k, v in values.items()
    }
    result["slope"].attrs["units"] = "1/token"
    return xr.Dataset(result)


def _moments(layer: xr.Dataset, limit: int) -> Array:
    """Sums of 1, r, r^2 inside, of 1, t, t^2, r, t r beyond the training length, (8, sequence, 1, head)."""
    total: Any = 0.0
    for block in blocks(layer, ("state_norm",)):
        norm, t = block["state_norm"], (block["last"] - limit)[:, None].astype(float)
        known = np.isfinite(norm)
        r, one = np.where(known, norm, 0), known.astype(float)
        inside, beyond = one * (t < 0), one * (t >= 0)
        terms = (
            inside,
            inside * r,
            inside * r**2,
            beyond,
            beyond * t,
            beyond * t**2,
            beyond * r,
            beyond * t * r,
        )
        total = total + np.stack([x.sum(2) for x in terms])
    return np.asarray(total)


def largest_inside(found: xr.Dataset, limit: int) -> xr.DataArray:
    """Largest finite norm before a token, (sequence, layer, head)."""
    name = "state_norm_max" if "state_norm_max" in found else "state_norm"
    inside = until(found, limit)
    if not inside.sizes["token"]:
        raise ValueError(f"train_length={limit} lies inside the first window; trace with a smaller window")
    largest = []
    for layer in by_layer(inside):
        parts = [np.where(np.isfinite(b[name]), b[name], 0).max(2) for b in blocks(layer, (name,))]
        largest.append(np.max(parts, axis=0))
    values = np.concatenate(largest, axis=1)
    dims = ("sequence", "layer", "head")
    return xr.DataArray(np.where(values > 0, values, np.nan), {d: found[d] for d in dims}, dims)
