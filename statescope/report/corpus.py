"""What a report says of a collection: the corpus first, then its worst texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from statescope.analyses import corpus
from statescope.batch.collection import open_collection
from statescope.report.sections import corpus_sections
from statescope.report.verdict import ASK, Verdict

WORST = 20
"""Texts in the table."""

COLUMNS = ("text", "tokens", "mean loss", "verdict", "heads overloaded", "worst ratio", "layer", "head")


def corpus_content(place: Any, given: int | None) -> dict[str, Any]:
    """Gather what the page shows of a collection; ``given`` is the training length a user says."""
    collection = open_collection(place)
    length = collection.attrs["train_length"] if given is None else given
    judged = None if length is None else corpus(collection, length)
    return {
        "verdict": _verdict(collection, judged),
        "facts": _facts(collection, given),
        "figures": list(corpus_sections(judged, given)),
        "setup": _setup(collection.attrs["collection"]),
        "model": str(collection.attrs["model_id"]),
        "version": str(collection.attrs["statescope_version"]),
    }


def _verdict(collection: xr.DataTree, judged: xr.Dataset | None) -> Verdict:
    if judged is None:
        missing = f"No verdict: the records do not say at which length the model was trained; {ASK}."
        of = collection["tokens"].to_dataset()
        worst = of.isel(sequence=np.argsort(-of["mean_loss"].values)[:WORST])
        return Verdict((missing,), COLUMNS[:3], _rows(worst, False), None, "Texts of the largest loss")
    sentences = [judged.attrs["sentence"]]
    missing_texts = collection.attrs["failed"] + collection.attrs["pending"]
    if missing_texts:
        sentences.append(f"{missing_texts:,} more texts are missing: they failed or are not read yet.")
    rows = _rows(judged.isel(sequence=slice(0, WORST)), True)
    return Verdict(tuple(sentences), COLUMNS, rows, None, "Worst texts")


def _rows(texts: xr.Dataset, judged: bool) -> tuple[tuple[str, ...], ...]:
    rows: list[tuple[str, ...]] = []
    for i in range(texts.sizes["sequence"]):
        of = texts.isel(sequence=i)
        row: tuple[str, ...] = (
            str(of["sequence"].values),
            f"{int(of['length']):,}",
            f"{float(of['mean_loss']):.3f}",
        )
        if judged:
            ratio = float(of["worst_ratio"])
            known = np.isfinite(ratio)
            where = [str(int(of[f"worst_{n}"])) if known else "-" for n in ("layer", "head")]
            short = "" if bool(of["judged"]) else " (not longer than training)"
            row += (f"{of['verdict'].values}{short}", str(int(of["overloaded_heads"])))
            row += (f"{ratio:.2f}" if known else "-", *where)
        rows.append(row)
    return tuple(rows)


def _facts(collection: xr.DataTree, given: int | None) -> dict[str, str]:
    a, of = collection.attrs, collection["tokens"].to_dataset()
    length, loss = of["length"].values, of["mean_loss"].values
    known = "unknown" if a["train_length"] is None else f"{a['train_length']:,}"
    sizes = collection["steps"].sizes
    return {
        "collection": str(a["collection"]),
        "model": f"{a['model_id']} ({a['model_type']}, {a['dtype']})",
        "training length": f"{known if given is None else f'{given:,}, as given for this report'}",
        "texts": f"{len(length):,} done, {a['failed']:,} failed, {a['pending']:,} not read yet",
        "lengths": f"{length.min():,} to {length.max():,} tokens, median {np.median(length):,.0f}",
        "tokens": f"{length.sum():,}",
        "mean loss": f"{np.nanmean(loss):.3f} nat, by text; {np.nanmin(loss):.3f} to {np.nanmax(loss):.3f}",
        "steps": f"{sizes['layer']} layers x {sizes['head']} heads",
        "measured": f"by the {a['backend']} kernel, statescope {a['statescope_version']}",
    }


def _setup(place: str) -> str:
    return "\n".join(
        (
            "import statescope",
            "from statescope.analyses import corpus, plots",
            "",
            f"collection = statescope.open_collection({place!r})",
        )
    )
