"""Texts, and batches of them, for the tests of ``statescope batch``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import statescope
from statescope.batch.inputs import Row
from statescope.batch.manifest import Outcome, place_of
from statescope.batch.places import Dumps
from statescope.batch.settings import Settings, Text
from statescope.batch.work import look, work

MODEL = "mamba2-byte-n16-t512"

SETTINGS = Settings(MODEL, device="cpu", backend="chunked")

IGNORED = (
    "created_at", "fingerprint", "text_id", "text_sha256", "texts_together", "weights", "settings"
)  # fmt: skip
"""Root attributes in which a batch's record differs from a trace's."""

WORDS = "The grass is green and the sky is blue over a river of stones that never ends. "


def text(length: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).permutation(list(WORDS * (length // len(WORDS) + 1)))[:length])


def write(place: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    place.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return place


def texts(lengths: Sequence[int]) -> list[dict[str, Any]]:
    return [{"id": f"t{i}", "text": text(n, i), "kind": "ab"[i % 2]} for i, n in enumerate(lengths)]


def one(dumps: Path, id: str) -> xr.DataTree:
    return statescope.open(dumps / "texts" / place_of(id))


def outcomes(rows: Sequence[dict[str, Any]], dumps: Path, settings: Settings = SETTINGS) -> list[Outcome]:
    """Let one worker read texts, without a cluster around it."""
    checked = [Row(i, r["id"], r["text"]) for i, r in enumerate(rows)]
    asked = [Text(r.id, str(r.sha256), place_of(r.id), r.content) for r in checked if r.content]
    return work(asked, settings, look(settings), Dumps.at(dumps), "test")
