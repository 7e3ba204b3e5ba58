"""The figures of a report: each with the call that makes it and how to read it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xarray as xr

from statescope.analyses import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120

READINGS = {
    "overload": (
        "Overload",
        "A head above the dotted line has twice the energy it ever had in training: a state the model never"
        " learned to read. A triangle marks from where on it stays there.",
    ),
    "state": (
        "States along the text",
        "Norm and variance should level off before the dashed line; a head that goes on growing to its right"
        " does not forget.",
    ),
    "retention": (
        "Retention of the first token",
        "What is left of the first token's write: a curve still above 1/e at the dashed line belongs to a"
        " head that, in training, never had to forget.",
    ),
    "decay": (
        "Time scales of the decay",
        "Heads above the dashed line decay more slowly than training could show them.",
    ),
    "loss": (
        "Loss by position",
        "A mean above the dotted line, twice the largest in training, says that the model has not learned to"
        " forget; on text that needs little context the loss stays low even where states overflow.",
    ),
    "rank": (
        "Rank and outlier channels",
        "A utilisation of 1 leaves no direction free; a stable rank near 1, or most of the energy in one row"
        " or column, says that one channel drowns the rest.",
    ),
    "strip": (
        "What the last probe's state is made of",
        "The darker a token, the more of the state's energy is its own; what must be recalled should stand"
        " out.",
    ),
    "attention": (
        "What the last probe reads",
        "Dark to the left of the dashed line is read from further back than training could show; heads whose"
        " bar is full read as if they had a short window.",
    ),
    "corpus": (
        "Overload over the corpus",
        "Left: a cross is a text in which some head surely has more than twice the energy it ever had in"
        " training (dotted). Right: a dark cell is a head that is overloaded in most texts, whatever they"
        " say: the model's fault, not one text's.",
    ),
    "passkeys": (
        "Passkeys",
        "Left of the solid line passkeys are recalled; what is lost to its right, at early depths first, is"
        " memory that did not last.",
    ),
}
"""Title, and how to read it, by figure."""


@dataclass(frozen=True)
class Section:
    """One figure; or, where the record does not hold what it needs, what is missing."""

    name: str
    call: str
    picture: bytes | None = None
    missing: str | None = None

    @property
    def title(self) -> str:
        """The heading."""
        return READINGS[self.name][0]

    @property
    def reading(self) -> str:
        """How to read the figure."""
        return READINGS[self.name][1]


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
    drawn: dict[str, tuple[str, Callable[[], Figure | str]]] = {
        "overload": (f"overload_figure(record{more})", lambda: _overload(record, train_length, judged)),
        "state": (f"state_figure(record{more})", lambda: plots.state_figure(record, train_length)),
        "retention": (
            f"retention_figure(record, token=0{more})",
            lambda: plots.retention_figure(record, 0, train_length),
        ),
        "decay": (f"decay_figure(record{more})", lambda: plots.decay_figure(record, train_length)),
        "loss": (f"loss_figure(record{more})", lambda: _loss(record, train_length)),
        "rank": (f"rank_figure(record{more})", lambda: _rank(record, train_length)),
        "strip": (_strip_call(record), lambda: _strip(record)),
        "attention": (_attention_call(record, more), lambda: _attention(record, train_length)),
    }
    if answers is not None:
        drawn["passkeys"] = f"passkey_map(answers{more})", lambda: plots.passkey_map(answers, train_length)
    for name, (call, draw) in drawn.items():
        figure = draw()
        if isinstance(figure, str):
            yield Section(name, f"plots.{call}", missing=figure)
        else:
            content = io.BytesIO()
            figure.savefig(content, dpi=DPI)
            yield Section(name, f"plots.{call}", picture=content.getvalue())


def corpus_sections(judged: xr.Dataset | None, given: int | None) -> Iterator[Section]:
    """Draw a collection; ``judged`` is what :func:`statescope.analyses.corpus` gave."""
    call = f"plots.corpus_figure(corpus(collection{'' if given is None else f', {given}'}))"
    if judged is None:
        yield Section("corpus", call, missing="The training length is not known: pass --train-length.")
        return
    content = io.BytesIO()
    plots.corpus_figure(judged).savefig(content, dpi=DPI)
    yield Section("corpus", call, picture=content.getvalue())


def _overload(record: xr.DataTree, train_length: int | None, judged: xr.Dataset | None) -> Figure | str:
    if judged is None:
        return "The training length is not known: pass --train-length."
    return plots.overload_figure(record, train_length, judged)


def _loss(record: xr.DataTree, train_length: int | None) -> Figure | str:
    if not bool(record["tokens"]["loss"].notnull().any()):
        return "The record holds no losses."
    return plots.loss_figure(record, train_length)


def _rank(record: xr.DataTree, train_length: int | None) -> Figure | str:
    if "snapshots" not in record.children or not record["snapshots"].sizes["position"]:
        return "The record holds no snapshots: trace again with --snapshots, such as 127:4096:128."
    return plots.rank_figure(record, train_length)


def _last_probe(record: xr.DataTree) -> int | None:
    if "probes" not in record.children or not record["probes"].sizes["probe"]:
        return None
    return int(record["probes"].to_dataset()["probe"].values[-1])


def _holds_bytes(record: xr.DataTree) -> bool:
    return int(record["tokens"]["token_id"].max()) <= 255


def _strip(record: xr.DataTree) -> Figure | str:
    probe = _last_probe(record)
    if probe is None:
        return "The record holds no probes: trace again with --probes -1."
    if not _holds_bytes(record):
        return "The record holds token ids, not their text: draw this figure with the model's tokenizer."
    return plots.token_strip(record, probe)


def _strip_call(record: xr.DataTree) -> str:
    probe = _last_probe(record)
    pieces = "" if _holds_bytes(record) else ", pieces=[tokenizer.decode([i]) for i in ids]"
    return f"token_strip(record, {-1 if probe is None else probe}{pieces})"


def _attention(record: xr.DataTree, train_length: int | None) -> Figure | str:
    probe = _last_probe(record)
    if probe is None:
        return "The record holds no probes: trace again with --probes -1."
    if "attention" not in record["probes"]:
        return "The record was made before probes kept what their query reads: trace again with --probes -1."
    return plots.attention_figure(record, probe, train_length)


def _attention_call(record: xr.DataTree, more: str) -> str:
    probe = _last_probe(record)
    return f"attention_figure(record, {-1 if probe is None else probe}{more})"
