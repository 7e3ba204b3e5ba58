r"""The newlines prompt: every token is a line break, so that the states show what they do by themselves.

Source: *Stuffed Mamba* (arXiv 2410.07145), section 4.1: the smoothest of the prompts tried there; the
state statistics it shows (mean and variance of a head's entries) are alike on other texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from statescope.live import resolve
from statescope.tokens import find_tokenizer
from statescope.tracing import trace


def newlines(
    model: nn.Module | str | Path,
    tokens: int,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **settings: Any,
) -> xr.DataTree:
    r"""Trace a prompt of line breaks only.

    Parameters
    ----------
    model, tokenizer, device, dtype, **settings
        As for :func:`statescope.trace`.
    tokens : int
        Length of the prompt.

    Returns
    -------
    DataTree
        The record. Of a head's ``key x value`` entries, ``state_mean`` is the mean :math:`m`, and the
        variance is :math:`|S|^2 / (key \cdot value) - m^2`, from ``state_norm``.

    Raises
    ------
    ValueError
        If the length is no positive number, or the tokenizer has no token for a line break.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens={tokens!r}; expected a number of tokens, 1 or more")
    model, _ = resolve(model, device, dtype)
    found = find_tokenizer(tokenizer, model)
    return trace(model, newline_ids(found, tokens), **settings)


def newline_ids(tokenizer: Any, tokens: int) -> Tensor:
    """Repeat the token of a line break, (token,)."""
    encoded = tokenizer("\n", add_special_tokens=False)["input_ids"]
    breaks = [int(i) for i in encoded if tokenizer.decode([int(i)]) == "\n"]
    if len(breaks) != 1:  # some put a blank before every text, which is left out
        raise ValueError(f"tokenizer encodes a line break as {list(encoded)}; expected one token for it")
    return torch.full((tokens,), breaks[0])
