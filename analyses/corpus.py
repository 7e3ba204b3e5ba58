"""A collection of texts: each judged as if it stood alone, then the corpus, worst texts first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xarray as xr

from statescope.analyses.blocks import train_length as resolve
from statescope.analyses.blocks import window
from statescope.analyses.overload import VERDICTS, overload

SMALL = 256 * 2**20
"""Bytes of a text's record that is loaded at once."""

PER_TEXT = {
    "verdict": ("verdict on the worst head", "1"),
    "overloaded_heads": ("heads overloaded", "1"),
    "worst_ratio": ("largest overload ratio of a head", "1"),
    "worst_layer": ("layer of that head", "1"),
    "worst_head": ("that head", "1"),
    "judged": ("whether it is longer than the training length", "1"),
}


def text_of(collection: xr.DataTree, text: str | int) -> xr.DataTree:
    """Take one text out of a collection: a record like any other, still lazy.

    Parameters
    ----------
    collection : DataTree
        From :func:`statescope.open_collection`.
    text : str or int
        Its id, or its place in the order of the inputs.

    Raises
    ------
    TypeError, KeyError
        If it is no collection, or has no such text.
    """
    ids = _ids(collection)
    if isinstance(text, str):
        found = np.flatnonzero(ids == text)
        if not found.size:
            raise KeyError(f"text={text!r} is none of the {len(ids)} texts of this collection")
        text = int(found[0])
    groups, width = {}, window(collection)
    length = int(collection["tokens"].to_dataset()["length"][text])
    for name in collection.children:
        part = collection[name].to_dataset().isel(sequence=slice(text, text + 1 or None))
        if "token" in part.dims:
            entries = -(-length // width) if name == "steps" else length
            part = part.isel(token=slice(0, entries))
            part = part.assign_coords(token=np.minimum(part["token"], length - 1))
        for dim in ("position", "probe"):
            if dim in part.dims:
                part = part.assign_coords({dim: part[dim] % length})
        groups[f"/{name}"] = part
    attributes = {k: v for k, v in collection.attrs.items() if k not in ("collection", "texts", "failed")}
    attributes |= {"tokens": length, "committed": length, "complete": True, "text_id": str(ids[text])}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes), **groups})


def texts(collection: xr.DataTree) -> Iterator[xr.DataTree]:
    """Take the texts of a collection one by one, in the order of the inputs."""
    for i in range(len(_ids(collection))):
        yield text_of(collection, i)


def by_text(
    function: Callable[..., xr.Dataset], collection: xr.DataTree, *args: Any, **options: Any
) -> xr.Dataset:
    """Apply an analysis to every text by itself.

    Parameters
    ----------
    function : callable
        Any of :mod:`statescope.analyses`, from a record to a Dataset whose size does not depend on the text's
        length, such as ``overload``, ``time_scales`` or ``forgetting``.
    collection : DataTree
        From :func:`statescope.open_collection`.
    *args, **options
        Handed to the function.

    Returns
    -------
    Dataset
        What the function gives, along ``sequence``.
    """
    parts = [function(_at_hand(one), *args, **options) for one in texts(collection)]
    ids = _ids(collection)
    parts = [
        p if "sequence" in p.dims else p.expand_dims(sequence=[i]) for i, p in zip(ids, parts, strict=True)
    ]
    return xr.concat(
        parts, "sequence", join="exact", combine_attrs="drop", coords="different", compat="equals"
    )


def corpus(collection: xr.DataTree, train_length: int | None = None, confidence: float = 0.95) -> xr.Dataset:
    r"""Judge every text of a collection by its states, and the corpus by its texts.

    .. math::

        p = \frac{\#\{\text{texts in which a head is overloaded}\}}{\#\{\text{texts longer than } T\}}

    Parameters
    ----------
    collection : DataTree
        From :func:`statescope.open_collection`.
    train_length : int, optional
        :math:`T` in tokens. Default: the records' own.
    confidence : float
        Of the intervals on which a text's verdict rests; see :func:`~statescope.analyses.overload`.

    Returns
    -------
    Dataset, (sequence,), (layer, head)
        By text, the worst first: ``verdict``, that of its worst head; ``overloaded_heads``; ``worst_ratio``
        with ``worst_layer`` and ``worst_head``; ``judged``, whether it is longer than the
        training length, as only then a
        head can be overloaded; all coordinates of the collection. By head: ``overloaded_share``
        :math:`p` (NaN if no text is judged) and ``median_ratio`` over the texts that are judged.
        ``attrs["sentence"]`` says it in words.

    Notes
    -----
    Trouble: one head overloaded in most texts is the model's; many heads in few texts, those texts'. Source:
    ours; the verdicts are those of :func:`~statescope.analyses.overload`, text by text.
    """
    limit = resolve(collection, train_length)
    found = by_text(overload, collection, limit, None, confidence)
    coords = collection["tokens"].to_dataset().coords
    judged = (coords["length"] > limit).values
    over = (found["verdict"] == "overloaded").values
    ratio = np.where(np.isfinite(found["overload_ratio"].values), found["overload_ratio"].values, -np.inf)
    flat = ratio.reshape(len(ratio), -1)
    worst = flat.argmax(1)
    layer, head = np.unravel_index(worst, ratio.shape[1:])
    known = np.isfinite(flat.max(1))
    rank = _rank(found["verdict"].values).reshape(len(ratio), -1).max(1)
    where = [np.where(known, found[d].values[at], -1) for d, at in (("layer", layer), ("head", head))]
    largest = np.where(known, flat.max(1), np.nan)
    values = (np.array(VERDICTS)[rank], over.sum((1, 2)), largest, *where, judged)
    result = xr.Dataset(coords={n: c for n, c in coords.items() if c.dims == ("sequence",)})
    for (name, (long_name, units)), value in zip(PER_TEXT.items(), values, strict=True):
        result[name] = ("sequence", value, {"long_name": long_name, "units": units})
    result = result.assign_coords(layer=found["layer"], head=found["head"])
    share = over[judged].mean(0) if judged.any() else np.full(over.shape[1:], np.nan)
    median = np.median(ratio[judged], 0) if judged.any() else np.full(over.shape[1:], np.nan)
    attrs = {"long_name": "share of the texts in which a head is overloaded", "units": "1"}
    result["overloaded_share"] = (("layer", "head"), share, attrs)
    attrs = {"long_name": "median overload ratio over texts", "units": "1"}
    result["median_ratio"] = (("layer", "head"), np.where(np.isfinite(median), median, np.nan), attrs)
    order = np.lexsort((-np.nan_to_num(values[2], nan=-1.0), -values[1], -rank))
    result = result.isel(sequence=order)
    result.attrs = {"train_length": limit, "texts": len(ratio), "judged": int(judged.sum())}
    result.attrs["sentence"] = _sentence(result)
    return result


def _at_hand(record: xr.DataTree) -> xr.DataTree:
    """Load a record that is small: an analysis reads it layer by layer, and more than once."""
    return record.load() if sum(g.nbytes for g in record.children.values()) <= SMALL else record


def _ids(collection: xr.DataTree) -> Any:
    if not isinstance(collection, xr.DataTree) or "collection" not in collection.attrs:
        raise TypeError("collection is none; expected what statescope.open_collection returns")
    return collection["tokens"]["sequence"].values


def _rank(verdicts: Any) -> Any:
    return sum(np.where(verdicts == name, i, 0) for i, name in enumerate(VERDICTS))


def _sentence(result: xr.Dataset) -> str:
    limit, number, judged = (result.attrs[n] for n in ("train_length", "texts", "judged"))
    read = f"Of {number:,} texts, {judged:,} are longer than the training length ({limit:,} tokens)"
    broken = int((result["verdict"] == "not finite").sum())
    more = f" {broken:,} hold values that are not finite." if broken else ""
    if not judged:
        return f"{read}, so none can be called overloaded.{more}"
    texts_over = int((result["overloaded_heads"] > 0).sum())
    if not texts_over:
        return f"{read}; no head is overloaded in any of them.{more}"
    share = result["overloaded_share"]
    at = share.argmax(("layer", "head"))
    worst = share.isel(at)
    first = result.isel(sequence=0)
    return (
        f"{read}; in {texts_over:,} of these a head is overloaded, most often layer {int(worst['layer'])},"
        f" head {int(worst['head'])}: in {float(worst):.0%}. The worst text is"
        f" {str(first['sequence'].values)!r}, with {int(first['overloaded_heads'])} of {share.size} heads, up"
        f" to {float(first['worst_ratio']):.2f} times the largest state of training.{more}"
    )
