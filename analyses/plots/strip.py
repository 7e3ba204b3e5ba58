"""The figure of a text, coloured by what is left of each token in one state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from statescope.analyses.blocks import Array, group
from statescope.analyses.plots.bins import BINS
from statescope.analyses.plots.style import (
    DIVERGING,
    SEQUENTIAL,
    known_length,
    mark_training,
    one_of,
    sheet,
    title,
)

COLUMNS = 100
"""Characters of a line."""

TOKENS = 600
"""Tokens written out, unless told otherwise."""

LINE = 0.21
"""Height of a line, in inches."""

WIDTH = 9.0
FONT: dict[str, Any] = {"family": "DejaVu Sans Mono", "size": 72 * 0.93 * WIDTH / COLUMNS / 0.602}
"""A character of this font is 0.602 of its size wide; it comes with matplotlib."""

VISIBLE = {" ": "\N{NO-BREAK SPACE}", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u21a9"}


def token_strip(
    record: xr.DataTree,
    probe: int = -1,
    layer: int | None = None,
    head: int | None = None,
    pieces: Sequence[str] | None = None,
    *,
    quantity: str = "share",
    sequence: int = 0,
    tokens: tuple[int, int] | None = None,
) -> Figure:
    r"""Write out a text, each token coloured by what is left of it in one head's state at a probe.

    Above the text: for a share, the running sum over tokens; for a contribution, its size, and shaded what
    is written out below. Negative shares (writes that the state works against) are hatched.

    Parameters
    ----------
    record : DataTree
        A record with probes.
    probe : int
        Token whose state is looked at, one of the record's probes; negative ones count from the text's end.
    layer, head : int, optional
        Default: where ``tokens``, or else those of the first half of the text, have the largest share.
    pieces : sequence of str, optional
        The text of every token, such as ``[tokenizer.decode([i]) for i in ids]``. Default: token ids are
        bytes.
    quantity : str
        ``"share"``, signed, of the state's energy, or ``"contribution"``, the norm of what survives.
    sequence : int
        Which text.
    tokens : (int, int), optional
        First token to write out, and the one after the last. Default: the stretch of 600 tokens that makes
        up most.

    Raises
    ------
    ValueError
        If there is no such probe, layer, head, quantity or stretch, or pieces do not fit; names it.
    """
    if quantity not in ("share", "contribution"):
        raise ValueError(f"quantity={quantity!r}; expected 'share' or 'contribution'")
    probes = group(record, "probes")
    total = int(record.attrs["tokens"])
    at = one_of("probe", probe + total if probe < 0 else probe, probes["probe"])
    here = probes.sel(sequence=one_of("sequence", sequence, probes["sequence"]), probe=at)
    here = here.isel(token=slice(0, at + 1))
    layer, head = _place(here, layer, head, tokens)
    variable = here[quantity].sel(layer=layer, head=head)
    values = variable.values.astype(np.float64)
    first, stop = shown = _stretch(values, at + 1, tokens)
    ids = group(record, "tokens")["token_id"].sel(sequence=sequence).values[: at + 1]
    words = _words(ids, pieces)[slice(*shown)]
    places, lines = _wrap(words)
    sizes = (1.1, LINE * lines)
    with sheet(2, 1, WIDTH, 1.1 + sum(sizes), height_ratios=sizes) as (figure, axes):
        _draw_profile(axes[0, 0], variable, shown, known_length(record))
        axes[0, 0].set_title(
            f"state at token {at:,}, layer {layer}, head {head}; below: tokens {first:,} to {stop - 1:,}"
        )
        colours = _draw_text(axes[1, 0], words, places, lines, values[slice(*shown)], quantity)
        bar = figure.colorbar(
            colours, ax=axes[1, 0], location="bottom", aspect=60, shrink=0.6, pad=0.01,
            extend="both" if quantity == "share" else "max",  # one token may hold nearly everything
        )  # fmt: skip
        bar.set_label(
            "share of the state's energy (%), negative ones hatched"
            if quantity == "share"
            else title(variable)
        )
    return figure


def _place(
    here: xr.Dataset, layer: int | None, head: int | None, tokens: tuple[int, int] | None
) -> tuple[int, int]:
    """Layer and head asked for, or those that hold most."""
    wanted = here
    if layer is not None:
        wanted = wanted.sel(layer=[one_of("layer", layer, here["layer"])])
    if head is not None:
        wanted = wanted.sel(head=[one_of("head", head, here["head"])])
    part = slice(*tokens) if tokens is not None else slice(0, max(1, here.sizes["token"] // 2))
    held = wanted["share"].isel(token=part).sum("token").compute()
    at = held.argmax(("layer", "head"))
    return int(held["layer"][at["layer"]]), int(held["head"][at["head"]])


def _stretch(values: Array, stop: int, given: tuple[int, int] | None) -> tuple[int, int]:
    if given is not None:
        if not 0 <= given[0] < given[1] <= stop:
            raise ValueError(f"tokens={given}; expected 0 <= first < stop <= {stop}")
        return int(given[0]), int(given[1])
    if stop <= TOKENS:
        return 0, stop
    running = np.concatenate([[0], np.cumsum(np.nan_to_num(np.abs(values)))])
    start = int(np.argmax(running[TOKENS:] - running[:-TOKENS]))
    return start, start + TOKENS


def _words(ids: Array, pieces: Sequence[str] | None) -> list[str]:
    """Return what is written for every token: no breaks, nothing the font has not."""
    if pieces is None:
        if ids.size and (ids.min() < 0 or ids.max() > 255):
            raise ValueError(
                f"pieces is missing, and token id {int(ids.max())} is no byte; pass the text of every token:"
                " [tokenizer.decode([i]) for i in ids]"
            )
        pieces = _characters(bytes(ids.astype(np.uint8).tolist()))
    if len(pieces) < len(ids):
        raise ValueError(f"pieces has {len(pieces)} texts; expected one for each of {len(ids)} tokens")
    known = FT2Font(font_manager.findfont(FONT["family"])).get_charmap()
    return [
        "".join(VISIBLE.get(c, c if ord(c) in known and c.isprintable() else "\u25a1") for c in piece)
        or "\u00b7"
        for piece in list(pieces)[: len(ids)]
    ]


def _characters(text: bytes) -> list[str]:
    """Put a character of several bytes at its first byte, and nothing at the others."""
    pieces = []
    for character in text.decode("utf-8", errors="surrogateescape"):
        size = len(character.encode("utf-8", errors="surrogateescape"))
        pieces += [character, *[""] * (size - 1)]
    return pieces


def _wrap(words: Sequence[str]) -> tuple[list[tuple[int, int]], int]:
    """Line and column of every token, and how many lines there are."""
    places, line, column = [], 0, 0
    for word in words:
        if column and column + len(word) > COLUMNS:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(word)
    return places, line + 1


def _draw_profile(ax: Axes, variable: xr.DataArray, shown: tuple[int, int], length: int | None) -> None:
    token, values = variable["token"].values, variable.values.astype(np.float64)
    if variable.name == "share":
        values = 100 * np.nancumsum(values)
        ax.set_ylabel("made of tokens\nso far (%)")
    else:
        ax.set_ylabel("contribution")
    every = max(1, len(token) // BINS)
    cuts = np.arange(0, len(token), every)
    high = np.fmax.reduceat(values, cuts)
    if shown[1] - shown[0] < len(token):
        ax.axvspan(shown[0], shown[1] - 1, color="0.9", linewidth=0)
    ax.plot(token[cuts], high, color="black", linewidth=1.1, marker="" if len(cuts) > 1 else "o")
    mark_training(ax, length if length is not None and length <= token[-1] else None)
    ax.set_xlabel("token")
    ax.margins(x=0.01)


def _draw_text(
    ax: Axes,
    words: Sequence[str],
    places: Sequence[tuple[int, int]],
    lines: int,
    values: Array,
    quantity: str,
) -> ScalarMappable:
    """Write the tokens on their colours."""
    signed = quantity == "share"
    values = 100 * values if signed else values
    known = np.abs(values[np.isfinite(values)])
    top = float(np.quantile(known, 0.99)) if known.size else 0.0
    top = top or (float(known.max(initial=0)) or 1.0)
    scale = ScalarMappable(
        Normalize(-top if signed else 0, top), colormaps[DIVERGING if signed else SEQUENTIAL]
    )
    colours = scale.to_rgba(np.nan_to_num(values))
    boxes = [Rectangle((c, r), len(w), 1) for w, (r, c) in zip(words, places, strict=True)]
    ax.add_collection(PatchCollection(boxes, facecolor=colours, edgecolor="none"))
    below = [b for b, v in zip(boxes, values, strict=True) if v < -0.05 * top]
    if below:
        ax.add_collection(
            PatchCollection(below, facecolor="none", edgecolor="0.45", hatch="////", linewidth=0)
        )
    light = colours[:, :3] @ np.array([0.299, 0.587, 0.114])
    for word, (row, column), shade in zip(words, places, light, strict=True):
        ink = "black" if shade > 0.5 else "white"
        ax.text(column, row + 0.55, word, color=ink, va="center", parse_math=False, **FONT)
    ax.set(xlim=(0, COLUMNS), ylim=(lines, 0))
    ax.set_axis_off()
    return scale
