"""How the state at a probe is read: the implicit attention of its query, and what stands in its way."""

from __future__ import annotations

import numpy as np
import xarray as xr

from statescope.analyses import core
from statescope.analyses.blocks import Array
from statescope.analyses.probes import Choice, between, probe_variable, reach_of, sum_over
from statescope.schema import AT_PROBE, PER_PROBE

RECENT = 64
"""Tokens that count as recent. A fixed number, not a part of the text: so probes anywhere can be compared."""


def implicit_attention(record: xr.DataTree) -> xr.DataArray:
    r"""With which weight every probe reads the value of every token before it.

    .. math:: M_{ti} = w_i\, q_t^\top \Phi_{ti} k_i, \qquad S_t^\top q_t = \sum_{i \le t} M_{ti} v_i

    where :math:`\Phi_{ti}` is what decay and erasing after token :math:`i` leave of its key; with one decay
    per head :math:`M_{ti} = e^{G_t - G_i} w_i\, (q_t \cdot k_i)`.

    Parameters
    ----------
    record : DataTree
        A record with probes: it holds these rows of :math:`M`, and no others.

    Returns
    -------
    DataArray, (sequence, layer, probe, token, head)
        Signed, and not summing to 1: there is no softmax. As stored, lazily; NaN after the probe and before
        its reach. Where every entry decays at its own rate (Mamba-1), each column of the value has a weight
        of its own; there it is their mean, weighted by :math:`v_i^2`.

    Notes
    -----
    Trouble: rows that are alike in all heads, or whose weight is spread over everything that was ever read.
    Sources: *The Hidden Attention of Mamba Models* (arXiv 2403.01590); *Transformers are SSMs* (arXiv
    2405.21060), section 5; for the erase term, what :class:`statescope.Probes` says.
    """
    return probe_variable(record, "attention")


def mean_distance(record: xr.DataTree) -> xr.DataArray:
    r"""How far back every probe reads: its effective receptive field.

    .. math:: \frac{\sum_{i \le t} (t - i)\, |M_{ti}|}{\sum_{i \le t} |M_{ti}|}

    Parameters
    ----------
    record : DataTree
        A record whose probes reach back to the start of the text.

    Returns
    -------
    DataArray, (sequence, layer, probe, head)
        In tokens; NaN where the probe does not reach back far enough, or nothing is read.

    Notes
    -----
    Trouble: below the distance of what must be recalled, in every head; or, beyond the training length, no
    longer growing with the text. Source: *DeciMamba* (arXiv 2406.14528), section 4, without its normalisation
    by the length. :func:`statescope.analyses.probe_reach` says the same of what is stored.
    """
    moment = _total(record, weight=lambda t, p: p - t)
    return _named(moment / _total(record), "mean_distance", "mean distance of what is read", "token")


def recency_ratio(record: xr.DataTree, recent: int = RECENT) -> xr.DataArray:
    r"""How much of a probe's attention lies on the most recent tokens.

    .. math:: \frac{\sum_{t - r < i \le t} |M_{ti}|}{\sum_{i \le t} |M_{ti}|}

    Parameters
    ----------
    record : DataTree
        A record whose probes reach back to the start of the text.
    recent : int
        :math:`r`, how many tokens count as recent, the probe included: the same number at every probe, as in
        :func:`statescope.analyses.probe_reach`, so that probes anywhere in the text can be compared.

    Returns
    -------
    DataArray, (sequence, layer, probe, head)
        Between 0 and 1; among the first :math:`r` tokens it is 1. NaN as for :func:`mean_distance`.

    Notes
    -----
    Trouble: near 1 in every head: the model reads as if it had a window of :math:`r` tokens. Source:
    *RecurFormer* (arXiv 2410.12850), which replaces heads of such a kind.
    """
    if isinstance(recent, bool) or not isinstance(recent, int) or recent < 1:
        raise ValueError(f"recent={recent!r}; expected a number of tokens, 1 or more")
    near = _total(record, lambda t, p: (t <= p) & (t > p - recent))
    return _named(near / _total(record), "recency_ratio", f"attention on the last {recent} tokens", "1")


def output_share_of(record: xr.DataTree, start: int, stop: int) -> xr.DataArray:
    r"""What the tokens from ``start`` to ``stop - 1`` make up of every probe's output.

    .. math:: \sum_{i=start}^{stop-1} \frac{\langle y_t, y_{ti} \rangle}{|y_t|^2}, \qquad
        y_{ti} = M_{ti} v_i, \quad y_t = \sum_{i \le t} y_{ti}

    Parameters
    ----------
    record : DataTree
        A record with probes.
    start, stop : int
        First token, and the one after the last.

    Returns
    -------
    DataArray, (sequence, layer, probe, head)
        Signed; over all tokens it is 1. Tokens after the probe have none; NaN where some are further back
        than the probe's reach. The skip term, which bypasses the state, is not part of the output here.

    Notes
    -----
    Trouble: what is asked for makes up next to nothing of what any head reads. Source: derived.
    """
    label = f"share of tokens {start} to {stop - 1} in the output"
    return sum_over(record, "output_share", between(record, start, stop), label)


def interference(record: xr.DataTree, start: int, stop: int | None = None) -> xr.Dataset:
    r"""How much louder all other tokens are than those asked for, as every probe's query reads them.

    .. math:: \frac{\big| \sum_{i \notin A} M_{ti} v_i \big|}{\big| \sum_{i \in A} M_{ti} v_i \big|}
        = \Big( 1 + \frac{1 - 2 s}{\rho^2} \Big)^{1/2}, \qquad
        s = \frac{\langle y_t, y_A \rangle}{|y_t|^2}, \quad \rho = \frac{|y_A|}{|y_t|}

    Parameters
    ----------
    record : DataTree
        A record with probes.
    start : int
        The token asked for; or the first of several, :math:`A`.
    stop : int, optional
        The one after the last. Default: a single token.

    Returns
    -------
    Dataset, (sequence, layer, probe, head)
        ``interference``, with ``interference_low`` and ``interference_high``. Of a single token all three are
        the same, and exact. Of several a record knows their shares :math:`s` exactly, but of their joint norm
        only :math:`|s| \le \rho \le \sum_i |y_{ti}| / |y_t|`: the ends of that are the bounds, which always
        hold, and in between stands what it is if their parts are orthogonal. Infinite where nothing of them
        is read; NaN for tokens after the probe or before its reach.

    Notes
    -----
    Trouble: far above 1 in every head, at the token that is asked for. Below 3e-4 it is rounding. Source:
    *Stuffed Mamba* (arXiv 2410.07145), eq. 7, the norms of its two terms; there the query is the token's own
    key, here what the probe does ask.
    """
    stop = start + 1 if stop is None else stop
    chosen = between(record, start, stop)
    share = sum_over(record, "output_share", chosen, "")
    total = sum_over(record, "output_contribution", chosen, "")
    square = sum_over(record, "output_contribution", chosen, "", np.square)
    norm = probe_variable(record, "output_norm").transpose(*AT_PROBE).astype(np.float64)
    read = norm["probe"] >= stop - 1  # all of them, by then
    found = bound_interference(share.values, (total / norm).values, (square / norm**2).values)
    label = f"interference with token {start}" if stop == start + 1 else f"with tokens {start} to {stop - 1}"
    names = {"interference": label, "interference_low": "lower bound", "interference_high": "upper bound"}
    return xr.Dataset(
        {
            n: share.copy(data=x).where(read).assign_attrs(long_name=about, units="1")
            for (n, about), x in zip(names.items(), found, strict=True)
        }
    )


def bound_interference(share: Array, total: Array, square: Array) -> tuple[Array, Array, Array]:
    """Interference with tokens, as if their parts were orthogonal, and its bounds.

    Parameters
    ----------
    share : array
        Their signed share of the output.
    total, square : array
        Sums of their parts' norms, and of these squared, over the output's norm (squared).
    """
    least = np.abs(share)
    most = np.maximum(total, least)

    def of(size: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.sqrt(np.maximum(1 + (1 - 2 * share) / size**2, ((1 - share) / size) ** 2))
        return np.where(size > 0, found, np.where(np.isnan(size), np.nan, np.inf))

    middle = of(np.clip(np.sqrt(square), least, most))
    ends = of(least), of(most)
    alone = total**2 <= square * (1 + 1e-12)  # a single part: its norm is known
    low, high = (np.where(alone, middle, f(*ends)) for f in (np.minimum, np.maximum))
    return middle, low, high


def effective_state_size(record: xr.DataTree, token: int, eps: float = 0.01) -> xr.Dataset:
    r"""How many directions of the past are still read after a token.

    .. math:: H = M_{t:,\,:t}, \qquad \#\{\sigma_j > \epsilon \sigma_1\}, \qquad
        \exp \Big( - \sum_j p_j \ln p_j \Big), \; p_j = \frac{\sigma_j}{\sum_l \sigma_l}

    with :math:`\sigma` the singular values of the operator's block :math:`H`: how tokens from :math:`t` on
    read those before.

    Parameters
    ----------
    record : DataTree
        A record with probes at ``token`` and after, which reach back to the start of the text. Every probe is
        a row of :math:`H`, so that neither number can exceed their count, nor the key size.
    token : int
        :math:`t`, the first token that is not part of the past.
    eps : float
        Singular values below this part of the largest do not count.

    Returns
    -------
    Dataset, (sequence, layer, head)
        ``effective_state_size``, a count, and ``entropy_state_size``; NaN where nothing of the past is read.
        In ``attrs`` how many rows (``probes``) they stand on.

    Raises
    ------
    ValueError
        If there is no such probe, one does not reach back to the start, or every entry of the state decays at
        its own rate, where each column of the value has an operator of its own.

    Notes
    -----
    Trouble: as large as the key, so that no direction is left for what comes; or near 1, so that the state's
    size is not used. It is that of the rows probed: of more probes it can only be more. Source: *Quantifying
    Memory Utilization with Effective State-Size* (arXiv 2504.19561); the tolerance there is absolute,
    which needs a scale.
    """
    if str(record.attrs.get("structure", "")).startswith("decay per entry"):
        raise ValueError(
            "record decays per entry: each column of the value is read by an operator of its own"
        )
    rows = probe_variable(record, "attention").transpose(*PER_PROBE)
    rows = rows.isel(probe=rows["probe"].values >= token)
    _check_rows(record, rows, token)
    block = rows.isel(token=slice(0, token))
    dims = ("sequence", "layer", "head")
    found = np.empty((2, *(block.sizes[d] for d in dims)))
    for layer in range(block.sizes["layer"]):
        values = block.isel(layer=layer).transpose("sequence", "head", "probe", "token").values
        found[:, :, layer] = core.ranks(core.singular_values(values.astype(np.float64)), eps)
    labels = (f"singular values above {eps:g} of the largest", "effective number of singular values")
    coords = {d: block[d] for d in dims}
    return xr.Dataset(
        {
            name: xr.DataArray(x, coords, dims, attrs={"long_name": label, "units": "1"})
            for name, x, label in zip(
                ("effective_state_size", "entropy_state_size"), found, labels, strict=True
            )
        },
        attrs={"token": token, "probes": block.sizes["probe"]},
    )


def _check_rows(record: xr.DataTree, rows: xr.DataArray, token: int) -> None:
    if not 0 < token < int(record.attrs["tokens"]) or not rows.sizes["probe"]:
        last = int(probe_variable(record, "attention")["probe"].values[-1])
        raise ValueError(f"token={token}; expected 1 or more, and no later than the last probe ({last})")
    last, reach = int(rows["probe"].values[-1]), reach_of(record)
    if reach <= last:
        raise ValueError(
            f"record: the probe at {last} reaches back to token {last - reach + 1} only; trace with a reach"
            " of all tokens"
        )


def _total(
    record: xr.DataTree, choice: Choice = lambda t, p: t <= p, weight: Choice = lambda t, p: np.ones(1)
) -> xr.DataArray:
    return sum_over(record, "attention", choice, "", np.abs, weight)


def _named(values: xr.DataArray, name: str, long_name: str, units: str) -> xr.DataArray:
    return values.rename(name).assign_attrs(long_name=long_name, units=units)
