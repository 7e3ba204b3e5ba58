"""The sentences a report begins with, and the heads it names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from statescope.analyses import forgetting, memory_span, overload, recall_length, time_scales
from statescope.analyses.overload import VERDICTS

WORST = 12
"""Heads in the table."""

ASK = "give it: statescope report ... --train-length TOKENS"


@dataclass(frozen=True)
class Verdict:
    """What is concluded, sentence by sentence; the worst heads, a row each; what the figures can reuse."""

    sentences: tuple[str, ...]
    columns: tuple[str, ...]
    heads: tuple[tuple[str, ...], ...]
    judged: xr.Dataset | None
    title: str = "Worst heads"


def judge(record: xr.DataTree, train_length: int | None, answers: xr.Dataset | None) -> Verdict:
    """Draw the conclusions that a record, its training length and answers allow.

    Parameters
    ----------
    record : DataTree
        A record.
    train_length : int or None
        In tokens; None if neither record nor user says.
    answers : Dataset or None
        From :func:`statescope.analyses.read_answers`.
    """
    said = [] if answers is None else [_recall(answers, record)]
    if train_length is None:
        missing = f"No verdict: the record does not say at which length the model was trained; {ASK}."
        return Verdict((missing, *said), *_slowest(record), None, "Slowest heads")
    judged, span = overload(record, train_length), memory_span(record, train_length)
    sentences = (
        judged.attrs["sentence"],
        forgetting(record, train_length, judged=judged, span=span).attrs["sentence"],
        _span(span, train_length),
    )
    return Verdict((*sentences, *said), *_worst(judged, span), judged)


def _span(span: xr.Dataset, train_length: int) -> str:
    half = span["half_energy"].values
    known = half[np.isfinite(half)]
    if not known.size:
        return "There is too little to say how long its heads keep a memory."
    longer = int((known > train_length).sum())
    return (
        f"The median head keeps half of a memory's energy for {np.median(known):,.1f} tokens, the longest for"
        f" {known.max():,.0f}; {longer} of {known.size} keep it for longer than the {train_length:,} of"
        " training."
    )


def _recall(answers: xr.Dataset, record: xr.DataTree) -> str:
    asked = answers.isel(length=answers["correct"].notnull().any(("depth", "trial")).values)
    if not asked.sizes["length"]:
        return "The file of answers holds none yet."
    found = recall_length(asked)
    length, low, high = (float(found[f"recall_length{end}"]) for end in ("", "_low", "_high"))
    surely = f"surely up to {low:,.0f}" if low else "no length is sure"
    bound = f"not beyond {high:,.0f}" if np.isfinite(high) else "no upper bound"
    sentence = (
        f"Asked for {int(found['trials'].sum()):,} passkeys of up to {int(asked['length'].max()):,} tokens,"
        f" it recalls 95 % of them up to {length:,.0f} tokens ({surely}, {bound})."
    )
    asked_of, read_by = str(answers.attrs.get("model_id")), str(record.attrs["model_id"])
    if asked_of != read_by:
        sentence += f" But the answers are those of {asked_of}, and the record is that of {read_by}."
    return sentence


def _worst(judged: xr.Dataset, span: xr.Dataset) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    columns = (
        "layer",
        "head",
        "verdict",
        "overload ratio",
        "95 % interval",
        "overloaded from",
        "retention over training",
        "live memories",
        "half energy (tokens)",
    )
    ratio = judged["overload_ratio"].mean("sequence")
    key = ratio if bool(ratio.notnull().any()) else judged["retention"].mean("sequence")
    rows = []
    for layer, head in _order(key):
        of = judged.sel(layer=layer, head=head)
        low, high = float(of["low"].mean()), float(of["high"].mean())
        verdicts = [v for v in reversed(VERDICTS) if (of["verdict"] == v).any()]
        rows.append(
            (
                str(layer),
                str(head),
                " / ".join(verdicts),
                _number(float(of["overload_ratio"].mean())),
                f"{low:.2f} to {high:.2f}" if np.isfinite(low) else "-",
                _number(float(of["onset"].median()), ",.0f"),
                _number(float(of["retention"].mean()), ".3g"),
                _number(float(of["live_memories"].mean()), ",.1f"),
                _number(float(span["half_energy"].sel(layer=layer, head=head)), ",.1f"),
            )
        )
    return columns, tuple(rows)


def _slowest(record: xr.DataTree) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Without a training length: the heads that forget most slowly."""
    found = time_scales(record)[["half_life", "gate_variation"]].mean("sequence")
    rows = []
    for layer, head in _order(found["half_life"]):
        of = found.sel(layer=layer, head=head)
        rows.append((str(layer), str(head), *(_number(float(of[n]), ",.3g") for n in of)))
    return ("layer", "head", "half-life (tokens)", "variation of the log decay"), tuple(rows)


def _order(key: xr.DataArray) -> list[tuple[int, int]]:
    """Layers and heads of the largest values, largest first."""
    values = key.transpose("layer", "head").values
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values), axis=None, kind="stable")[:WORST]
    layers, heads = np.unravel_index(order, values.shape)
    return [(int(key["layer"][a]), int(key["head"][b])) for a, b in zip(layers, heads, strict=True)]


def _number(value: float, form: str = ".2f") -> str:
    return format(value, form) if np.isfinite(value) else ("-" if np.isnan(value) else "infinite")
