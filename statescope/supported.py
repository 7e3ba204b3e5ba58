"""What is supported, in words; made from the adapters themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch

from statescope.adapters import ADAPTERS, Adapter
from statescope.recurrence import Recurrence
from statescope.scan import choose, on_gpu


class Row(NamedTuple):
    """One scan signature; :data:`HEADINGS` says what the columns are."""

    signature: str
    models: str
    structure: str
    cpu: str
    gpu: str
    outputs: str
    segments: str
    note: str


HEADINGS = Row("scan", "models", "recurrence", "on a CPU", "on a GPU", "outputs", "segments", "to know")
"""Headings of the columns."""


def rows() -> list[Row]:
    """One row for every scan signature, in the order of the adapters.

    ``on a CPU`` and ``on a GPU`` name the kernel that measures, and computes the outputs if asked to;
    ``outputs`` says whether the model's own outputs can be kept, bit for bit, and replaced by ours.
    """
    first: dict[str, Adapter] = {}
    for adapter in ADAPTERS.values():
        first.setdefault(adapter.signature, adapter)
    return [_row(adapter) for adapter in first.values()]


def _row(adapter: Adapter) -> Row:
    recurrence = example(adapter.structure)
    return Row(
        adapter.signature,
        ", ".join(adapter.models),
        adapter.structure,
        choose(recurrence),
        on_gpu(recurrence),
        "kept or replaced",
        "any length",
        adapter.note,
    )


def example(structure: str) -> Recurrence:
    """Make a recurrence of a structure, of one token.

    Parameters
    ----------
    structure : str
        As :attr:`~statescope.recurrence.Recurrence.structure` says it.

    Raises
    ------
    ValueError
        If there is no such structure.
    """
    decay, _, erase = structure.partition(", ")
    one = torch.ones(1, 1, 1, 16)
    shapes = {"decay per head": (), "decay per key": (16,), "decay per entry": (16, 16)}
    if decay not in shapes or erase not in ("", "delta rule", "erase term"):
        raise ValueError(f"structure={structure!r} is none of the equation's")
    a = {"": None, "delta rule": one[..., 0], "erase term": one}[erase]
    return Recurrence(
        q=one,
        k=one,
        v=one,
        log_decay=-torch.ones(1, 1, 1, *shapes[decay]),
        a=a,
        b=a if erase == "erase term" else None,
    )


def as_markdown() -> str:
    """Write the table as the README has it."""
    lines = [HEADINGS, Row(*["---"] * len(HEADINGS)), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def as_text() -> str:
    """Write the table as a terminal shows it: one paragraph per scan."""
    paragraphs = []
    for row in rows():
        lines = zip(HEADINGS[1:], row[1:], strict=True)
        paragraphs.append(
            "\n".join([row.signature, *(f"  {name:11} {text}" for name, text in lines if text)])
        )
    return "\n\n".join(paragraphs) + "\n"
