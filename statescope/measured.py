"""What a reading yields, layer by layer, and what takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from statescope.scan import Steps
from statescope.schema import GROUPS, PER_PROBE
from statescope.watch import Watch

STEPS = tuple(Steps.__dataclass_fields__)
"""Variables of ``("steps", None)``, in order, before windows thin them."""

Field = tuple[str, int | None]
"""Variables measured together: ``("steps", None)``, or ``("probes", p)`` for those of one probe."""

ATTRIBUTED = tuple(n for n, v in GROUPS["probes"].items() if v.dims == PER_PROBE)
"""Variables of ``("probes", p)``, in order."""

OF_PROBE = tuple(n for n in GROUPS["probes"] if n not in ATTRIBUTED)
"""Variables that are one number for a probe, in order."""

LOSS = -1
"""Stands for the loss where a layer's row is asked for."""


class Suspect(NamedTuple):
    """The one token of a segment that tells whether all of its values are finite; see :func:`suspect`."""

    token: Tensor  # (1,), counted in the segment
    values: Tensor  # (variable, batch, heads), at this token


@dataclass
class Measured:
    """What one layer yields in one segment."""

    start: int  # the segment's tokens
    stop: int
    fields: dict[Field, tuple[int, Tensor]]  # first entry, (variable, batch, entries, heads)
    states: dict[int, Tensor]  # by position: (batch, head, key, value)
    suspect: Suspect
    of_probe: dict[int, Tensor] = field(default_factory=dict)  # by probe: (variable, batch, head)


class Sink(Protocol):
    """What takes measurements as they are made."""

    def take(self, row: int, measured: Measured) -> None:
        """Take what the watched layer number ``row`` yielded in one segment; in order of depth."""
        ...

    def take_loss(self, start: int, loss: Tensor, suspect: Suspect) -> None:
        """Take the loss (batch, time) of every token of one segment."""
        ...


def suspect(values: Tensor) -> Suspect:
    """Find the first token at which a value is not finite, without waiting for the device.

    Parameters
    ----------
    values : Tensor, (variable, batch, time, heads)
        Measurements of a segment.

    Returns
    -------
    Suspect
        That token; any token if all values are finite.
    """
    spoilt = values.sum((0, 1, 3)) * 0  # 0 where all are finite, else NaN, which argmax takes for the largest
    token = spoilt.argmax(0, keepdim=True)
    return Suspect(token, values.index_select(2, token)[:, :, 0])


def place_of_nonfinite(found: Sequence[tuple[int, int, Suspect]], watch: Watch) -> dict[str, Any] | None:
    """Name the first value, in token order, that is not finite; None if there is none.

    Parameters
    ----------
    found : sequence of (int, int, Suspect)
        For every segment and layer: its first token, the layer's row (or :data:`LOSS`), and what
        :func:`suspect` says, on the host.
    watch : Watch
        What is kept.
    """
    places = [
        (start + int(x.token), row == LOSS, row, (~x.values.isfinite()).nonzero()[0].tolist())
        for start, row, x in found
        if not x.values.isfinite().all()
    ]
    if not places:
        return None
    token, is_loss, row, (variable, sequence, head) = min(places)
    if is_loss:
        return {"variable": "loss", "sequence": sequence, "token": token}
    place = {"sequence": sequence, "layer": watch.layers[row], "token": token}
    return {"variable": STEPS[variable], **place, "head": watch.heads[head]}
