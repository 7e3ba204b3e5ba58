"""The figures of a report: each with the call that makes it and how to read it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xarray as xr

from statescope.analyses import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


@dataclass(frozen=True)
class Section:
    """One figure; or, where the record does not hold what it needs, what is missing."""

    name: str
    title: str
    reading: str
    call: str
    picture: bytes | None = None
    missing: str | None = None


def sections(
    record: xr.DataTree,
    train_length: int | None,
    given: int | None,
    judged: xr.Dataset | None,
    answers: xr.Dataset | None,
) -> Iterator[Section]:
    """Draw what can be drawn, one figure at a time.

    Parameters
    ----------
    record : DataTree
        A record.
    train_length : int or None
        In tokens, if it is known; ``given``, if the user gave it, who must then write it into the calls.
    judged : Dataset or None
        What :func:`statescope.analyses.overload` gave.
    answers : Dataset or None
        From :func:`statescope.analyses.read_answers`.
    """
    more = "" if given is None else f", train_length={given}"

    def section(name: str, title: str, reading: str, figure: Figure | str, call: str) -> Section:
        if isinstance(figure, str):
            return Section(name, title, reading, call, missing=figure)
        content = io.BytesIO()
        figure.savefig(content, dpi=DPI)
        return Section(name, title, reading, call, picture=content.getvalue())

    yield section(
        "overload",
        "Overload",
        "A head above the dotted line has twice the energy it ever had in training: a state the model never"
        " learned to read. A triangle marks from where on it stays there.",
        _NO_LENGTH if judged is None else plots.overload_figure(record, train_length, judged),
        f"plots.overload_figure(record{more})",
    )
    yield section(
        "state",
        "States along the text",
        "Norm and variance should level off before the dashed line; a head that goes on growing to its right"
        " never learned to forget.",
        plots.state_figure(record, train_length),
        f"plots.state_figure(record{more})",
    )
    yield section(
        "retention",
        "Retention of the first token",
        "What is left of the first token's write: a curve still above 1/e at the dashed line belongs to a head"
        " that, in training, never had to forget.",
        plots.retention_figure(record, 0, train_length),
        f"plots.retention_figure(record, token=0{more})",
    )
    yield section(
        "decay",
        "Time scales of the decay",
        "Heads above the dashed line decay more slowly than training could show them.",
        plots.decay_figure(record, train_length),
        f"plots.decay_figure(record{more})",
    )
    losses = bool(record["tokens"]["loss"].notnull().any())
    yield section(
        "loss",
        "Loss by position",
        "A mean above the dotted line, twice the largest in training, says that the model has not learned to"
        " forget; on text that needs little context the loss stays low even where states overflow.",
        plots.loss_figure(record, train_length)
        if losses
        else "The record holds no losses.",
        f"plots.loss_figure(record{more})",
    )
    yield section(
        "rank",
        "Rank and outlier channels",
        "A utilisation of 1 leaves no direction free; a stable rank near 1, or most of the energy in one row or"
        " column, says that one channel drowns the rest.",
        plots.rank_figure(record, train_length)
        if "snapshots" in record.children
        else "The record has no snapshots: trace again with --snapshots, such as 127:4096:128.",
        f"plots.rank_figure(record{more})",
    )
    yield section(
        "strip",
        "What the last probe's state is made of",
        "The darker a token, the more of the state's energy is its own; what must be recalled should stand out.",
        *_strip(record),
    )
    if answers is not None:
        yield section(
            "passkeys",
            "Passkeys",
            "Left of the solid line passkeys are recalled; colour that fades beyond the dashed line, at early"
            " depths first, is memory lost with length.",
            plots.passkey_map(answers, train_length),
            f"plots.passkey_map(answers{more})",
        )


_NO_LENGTH = "The training length is not known: pass --train-length."


def _strip(record: xr.DataTree) -> tuple[Figure | str, str]:
    call = "plots.token_strip(record)"
    if "probes" not in record.children or not record["probes"].sizes["probe"]:
        return "The record has no probes: trace again with --probes -1.", call
    probe = int(record["probes"]["probe"].values[-1])
    if int(record["tokens"]["token_id"].max()) > 255:
        call = f"plots.token_strip(record, {probe}, pieces=[tokenizer.decode([i]) for i in ids])"
        return (
            "The record holds token ids, not their text: draw this figure with the model's tokenizer.",
            call,
        )
    return plots.token_strip(record, probe), f"plots.token_strip(record, {probe})"
