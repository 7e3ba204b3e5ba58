"""The demonstration: passkeys inside and beyond the training length, with the bundled checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from statescope.analyses import live_memories, overload_ratio, retention, share_of
from statescope.experiments.passkey import ask
from statescope.experiments.prompts import Haystack, Prompt
from statescope.models import bundled, load
from statescope.tracing import trace
from statescope.watch import Probes

LENGTHS = (512, 1024, 2048)
"""A checkpoint is asked at those that reach its training length, or at the longest: well inside it nothing is
to be seen."""

PROMPTS = 4
DEPTH = 0.1
SEED = 0

LEGEND = """
needle kept: of what the needle's last token wrote, in the head that keeps most; needle share: of the
state's energy, in the head that holds most; overload: state norm over its largest inside the training
length, worst head; live memories: writes a state effectively holds, worst head. All at the question."""


@dataclass(frozen=True)
class Cell:
    """One checkpoint at one prompt length."""

    model: str
    length: int
    prompts: list[Prompt]
    answers: list[str]
    record: xr.DataTree

    @property
    def right(self) -> int:
        """Prompts answered rightly."""
        return sum(a == p.passkey for a, p in zip(self.answers, self.prompts, strict=True))

    def measures(self) -> dict[str, float]:
        """State measures at the question, of the best or worst head; means over prompts."""
        prompt, last = self.prompts[0], self.length - 1  # the needle stands at the same place in all
        needle = share_of(self.record, prompt.needle_start, prompt.needle_stop).isel(probe=-1)
        kept = retention(self.record, prompt.needle_stop - 1, last)
        ratio = overload_ratio(self.record).isel(token=-1)
        live = live_memories(self.record).isel(token=-1)
        over_heads = ("layer", "head")
        return {
            "needle kept": float(kept.max(over_heads).mean()),
            "needle share": float(needle.max(over_heads).mean()),
            "overload": float(ratio.max(over_heads).mean()),
            "live memories": float(live.max(over_heads).mean()),
        }


def run(out: Path, overwrite: bool = False, say: Callable[[str], None] = print) -> list[Cell]:
    """Trace, ask, print, and write stores and picture.

    Parameters
    ----------
    out : Path
        Folder for the records (``MODEL-LENGTH.zarr``) and the picture (``passkey.png``).
    overwrite : bool
        Replace records that are already there.
    say : callable
        Takes each line that is printed.
    """
    cells = []
    say(_row("", "", "", "needle", "needle", "over-", "live", "answers"))
    say(_row("checkpoint", "tokens", "right", "kept", "share", "load", "memories", "(asked for)"))
    for cell in _cells(out, overwrite):
        cells.append(cell)
        pairs = zip(cell.answers, cell.prompts, strict=True)
        said = ", ".join(a if a == p.passkey else f"{a} ({p.passkey})" for a, p in pairs)
        kept, share, ratio, live = cell.measures().values()
        right = f"{cell.right}/{len(cell.prompts)}"
        numbers = (f"{kept:.1%}", f"{share:.1%}", f"{ratio:.2f}", f"{live:.0f}")
        say(_row(cell.model, str(cell.length), right, *numbers, said))
    say(LEGEND)
    say(f"\nrecords: {out}/*.zarr (open them with statescope.open)")
    _draw(cells, out, say)
    return cells


def _row(name: str, *columns: str) -> str:
    *numbers, last = columns
    return " ".join([f"{name:22}", *(f"{n:>8}" for n in numbers), f" {last}"])


def _cells(out: Path, overwrite: bool) -> Iterator[Cell]:
    hay = Haystack()
    for name in bundled():
        model: Any = load(name)
        trained = model.config.train_length
        for length in [n for n in LENGTHS if n >= trained] or LENGTHS[-1:]:
            rng = np.random.default_rng(SEED)
            prompts = [hay.hide(length, DEPTH, rng) for _ in range(PROMPTS)]
            ids = torch.from_numpy(np.stack([p.ids for p in prompts]))
            store = out / f"{name}-{length}.zarr"
            record = trace(
                model, ids, store=store, probes=Probes([-1]), overwrite=overwrite, backend="chunked"
            )
            yield Cell(name, length, prompts, ask(model, prompts, hay), record)


def _draw(cells: list[Cell], out: Path, say: Callable[[str], None]) -> None:
    try:
        from statescope.analyses.plots import PasskeyPanel, passkey_figure
    except ModuleNotFoundError as error:
        say(f"no picture: {error.name} is not installed (pip install 'statescope-ssm[plots]')")
        return
    panels = [
        PasskeyPanel(
            title=c.model,
            record=c.record,
            sequence=0,
            needle=slice(c.prompts[0].needle_start, c.prompts[0].needle_stop),
            passkey=c.prompts[0].passkey,
            answer=c.answers[0],
        )
        for c in cells
        if c.length == LENGTHS[-1]
    ]
    path = out / "passkey.png"
    passkey_figure(panels).savefig(path, dpi=150)
    say(f"picture: {path}")
