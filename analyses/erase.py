"""What the delta rule takes out of a state before it writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from statescope.analyses.blocks import Array, Block, map_tokens, steps

NAMES = ("erase_norm", "erase_strength")


def erase(record: xr.DataTree) -> xr.Dataset:
    r"""How strongly every token erases along its key, and what it takes from the state.

    .. math::

        \beta_t = -a_t |k_t|^2, \qquad |E_t| = |a_t k_t (k_t^\top D_t)|_F, \qquad
        |D_t|^2 - |D_t + E_t|^2 = \frac{2 - \beta_t}{\beta_t} |E_t|^2

    with :math:`D_t` the decayed state and :math:`E_t` what the erase term adds to it, so that
    :math:`D_t + E_t` reads :math:`(1 - \beta_t)` of what it did along the key.

    Parameters
    ----------
    record : DataTree
        A record of a model with the delta rule (Gated DeltaNet, Kimi Delta Attention). With ``window=w``,
        ``strength`` is the mean over the window, ``erased`` the root of summed squares, and ``taken`` follows
        from both.

    Returns
    -------
    Dataset, (sequence, layer, token, head)
        ``strength``: 0 erases nothing, 1 all that the key reads, above 1 turns it round, and from 2 on the
        state grows; ``erased``, a norm in the state's unit; ``taken``, energy, in its square: what erasing
        takes by itself, before the token writes.

    Raises
    ------
    ValueError
        If the record does not say what is erased; says why.

    Notes
    -----
    Trouble: a strength near 0 in every head, which then forgets by its decay only; a strength above 2; or
    ``erased`` far below ``write_norm`` on average while the state grows. Sources: *Parallelizing Linear
    Transformers with the Delta Rule* (arXiv 2406.06484), eq. 1; *Gated Delta Networks* (arXiv 2412.06464).
    """
    found = steps(record)
    if not set(NAMES) <= set(found):
        kind = str(record.attrs.get("structure", "unknown structure"))
        why = (
            "it was made before this was kept; trace again"
            if kind.endswith("delta rule")
            else f"its model has no delta rule ({kind})"
        )
        raise ValueError(f"record has no steps/{NAMES[0]}: {why}")

    def take(block: Block, carry: Any) -> tuple[tuple[Array, ...], Any]:
        norm, strength = (block[n] for n in NAMES)
        with np.errstate(divide="ignore", invalid="ignore"):
            taken = np.where(strength == 0, 0.0, (2 - strength) / strength * norm**2)
        return (strength, norm, taken), None

    labels = {
        "strength": ("part erased of what the key reads", "1"),
        "erased": ("norm of what is erased", "1"),
        "taken": ("energy taken by erasing", "1"),
    }
    return map_tokens(found, NAMES, take, labels)
