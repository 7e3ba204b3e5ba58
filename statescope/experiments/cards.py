"""The card of a checkpoint: what it is, how it was trained, and what it shows, measured and not typed.

``card.json`` holds the numbers, ``README.md`` says them; both lie in the checkpoint's folder. Tests hold a
checkpoint against its card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from statescope import analyses
from statescope.analyses.passkey import tabulate
from statescope.experiments.passkey import passkey
from statescope.experiments.prompts import FILLER
from statescope.models import load
from statescope.tracing import trace

CARD, README, TRAINING = "card.json", "README.md", "training.json"

LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIALS = 32
SEQUENCES, SPAN = 4, 8
"""Stretches of text that are traced, and how many training lengths each has, for every checkpoint alike."""

THE_FILLER = "the paper's filler"


def write_card(
    folder: str | Path,
    haystacks: Mapping[str, str] | None = None,
    *,
    beside: str | Path | None = None,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    trials: int = TRIALS,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint, and write its card into its folder.

    Parameters
    ----------
    folder : str or Path
        A byte-level checkpoint with ``training.json`` beside it.
    haystacks : mapping of str to str, optional
        Texts to hide passkeys in besides the paper's filler, by what they are called. States are measured on
        the first of them, else on the filler.
    beside : str or Path, optional
        Another packed checkpoint, which is asked the same: what the difference in training makes.
    lengths, depths, trials, seed, progress
        Of the passkeys; see :func:`statescope.experiments.passkey.passkey`.

    Returns
    -------
    dict
        What :func:`render` takes, as it stands in ``card.json``.

    Raises
    ------
    ValueError
        If there is no ``training.json``, or passkeys cannot be asked for; nothing is written then.
    """
    folder = Path(folder)
    if not (folder / TRAINING).is_file():
        raise ValueError(f"folder={str(folder)!r} has no {TRAINING}; expected a checkpoint that was packed")
    training = _training_of(folder)
    texts: dict[str, str | None] = {**(haystacks or {}), THE_FILLER: None}
    model, first = load(folder, device="cpu"), next(iter(texts))

    def ask(who: nn.Module) -> dict[str, Any]:
        found = {}
        for name, text in texts.items():
            answers = passkey(who, lengths, depths, trials, haystack=text, seed=seed, progress=progress)
            right = answers["correct"].sum("trial").astype(int).transpose("length", "depth")
            found[name] = right.values.tolist()
        return found

    card = {
        "name": folder.name,
        "checkpoint": _checkpoint(model, folder),
        "training": training,
        "passkeys": {
            "length": list(lengths),
            "depth": list(depths),
            "trials": trials,
            "seed": seed,
            "right": ask(model),
        },
        "states": {"text": first} | measure_states(model, texts[first]),
        "measured": {
            "date": datetime.now(UTC).date().isoformat(),
            "statescope": version("statescope-ssm"),
        },
    }
    if beside is not None:
        other = load(beside, device="cpu")
        card["beside"] = {
            "differs": _differs(_training_of(Path(beside)), training),
            "right": ask(other),
            "states": {"text": first} | measure_states(other, texts[first]),
        }
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / README).write_text(render(card), encoding="utf-8")
    return card


def _training_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    return found


def _differs(other: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in other.items() if k != "made" and v != training.get(k)}


def read_card(folder: str | Path) -> dict[str, Any]:
    """Read the card in a checkpoint's folder."""
    card: dict[str, Any] = json.loads((Path(folder) / CARD).read_text(encoding="utf-8"))
    return card


def measure_states(model: Any, text: str | None) -> dict[str, Any]:
    """Trace stretches of a text, and say what the states do within and beyond the training length."""
    tokens = SPAN * int(model.config.train_length)
    content = np.frombuffer((text or FILLER * (2 + SEQUENCES * tokens // len(FILLER))).encode(), np.uint8)
    if len(content) < SEQUENCES * tokens:
        raise ValueError(f"haystack has {len(content):,} bytes; {SEQUENCES * tokens:,} are traced")
    starts = np.linspace(0, len(content) - tokens, SEQUENCES).astype(int)
    ids = np.stack([content[start : start + tokens] for start in starts]).astype(np.int64)
    record = trace(model, ids, backend="chunked", progress=False)
    length = int(record.attrs["train_length"])
    judged, span = analyses.overload(record), analyses.memory_span(record)
    verdict = analyses.forgetting(record, judged=judged, span=span)
    held = analyses.live_memories(record).mean("sequence").max(("layer", "head"))
    ends = ("", "_low", "_high")
    return {
        "tokens": tokens,
        "sequences": SEQUENCES,
        "overloaded_heads": int(verdict["overloaded_heads"]),
        "worst_overload": _plain(judged["overload_ratio"].mean("sequence").max()),
        "loss_ratio": _plain(verdict["loss_ratio"]),
        "failing_length": [_plain(verdict[f"failing_length{end}"]) for end in ends],
        "live_memories": {
            str(n): _plain(held.sel(token=n - 1)) for n in sorted({min(length, tokens), tokens})
        },
        "sentence": verdict.attrs["sentence"],
    }


def _plain(value: Any) -> float | None:
    return float(f"{float(value):.4g}") if np.isfinite(float(value)) else None


def _checkpoint(model: Any, folder: Path) -> dict[str, Any]:
    c = model.config
    return {
        "layers": c.num_hidden_layers,
        "width": c.hidden_size,
        "heads": c.num_heads,
        "keys": c.state_size,
        "values": c.head_dim,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
    }


def recalled(asked: Mapping[str, Any], right: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """Longest prompt with 95 % right answers, in tokens, and its interval.

    ``asked`` has lengths, depths and trials, ``right`` the counts of right answers, (length, depth). See
    :func:`statescope.analyses.recall_length`.
    """
    rows = [
        {"length": n, "depth": d, "trial": t, "passkey": "1", "answer": "1" if t < count else "0"}
        | {"needle_start": 0, "needle_stop": 0, "seed": 0}
        for n, counts in zip(asked["length"], right, strict=True)
        for d, count in zip(asked["depth"], counts, strict=True)
        for t in range(asked["trials"])
    ]
    found = analyses.recall_length(tabulate({}, rows))
    length, low, high = (float(found[f"recall_length{end}"]) for end in ("", "_low", "_high"))
    return length, low, high


def render(card: Mapping[str, Any]) -> str:
    """Say what is in a card, as Markdown."""
    c, training = card["checkpoint"], card["training"]
    numbers = c["layers"] * c["heads"] * c["keys"] * c["values"]
    lines = [
        f"# {card['name']}",
        "",
        f"A byte-level Mamba-2 language model: {c['layers']} layers, width {c['width']}, {c['heads']} heads a"
        f" layer, a state of {c['keys']} x {c['values']} a head ({numbers:,} numbers in all);"
        f" {c['parameters'] / 1e6:.1f} million parameters, {c['bytes'] / 1e6:.1f} MB, matrices in float16."
        f" It was trained on sequences of {training['train_length']:,} bytes.",
        "",
        "## What it shows",
        "",
        *(f"- {sentence}" for sentence in shows(card)),
        "",
        "## Passkeys",
        "",
        f"Right answers of {card['passkeys']['trials']}, by tokens of the prompt and depth of the needle (0:"
        " at the start, 1: right before the question).",
        *(line for name, right in card["passkeys"]["right"].items() for line in _grid(card, name, right)),
        *_grids_beside(card),
        "",
        "## How it was trained",
        "",
        *_training(training),
        "",
        f"Measured with `statescope card` {card['measured']['statescope']} on {card['measured']['date']};"
        " [card.json](card.json) has the numbers, and tests hold the checkpoint against them.",
    ]
    return "\n".join(lines) + "\n"


def shows(card: Mapping[str, Any]) -> list[str]:
    """Sentences made from the numbers."""
    asked, trained = card["passkeys"], card["training"]["train_length"]
    said = [f"It {_recalls(asked, name, right, trained)}." for name, right in asked["right"].items()]
    if "beside" in card:
        differs = card["beside"]["differs"]
        what = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in differs.items())
        length = differs.get("train_length", trained)
        rows = [_recalls(asked, name, right, length) for name, right in card["beside"]["right"].items()]
        said.append(f"The same model with {what}, else trained alike, {'; it '.join(rows)}.")
    states, heads = card["states"], card["checkpoint"]["layers"] * card["checkpoint"]["heads"]
    said.append(f"Its states: {states['sentence'][0].lower()}{states['sentence'][1:]}")
    said.append(f"Its heads that outgrow what training has seen, {_overloaded(states, heads)}.")
    if "beside" in card:
        said.append(f"That other model's heads, likewise, {_overloaded(card['beside']['states'], heads)}.")
    return said


def _overloaded(states: Mapping[str, Any], heads: int) -> str:
    held = ", ".join(f"{n:,.0f} at token {int(at):,}" for at, n in states["live_memories"].items())
    worst = "" if states["worst_overload"] is None else f", the worst {states['worst_overload']:g} times"
    return (
        f"over {SPAN} training lengths of {states['text']}: {states['overloaded_heads']} of {heads}{worst};"
        f" the fullest effectively holds so many writes: {held}"
    )


def _recalls(asked: Mapping[str, Any], name: str, right: Sequence[Sequence[int]], trained: int) -> str:
    length, low, high = recalled(asked, right)
    text = f"recalls 95 % of passkeys in {name} from up to {length:,.0f} tokens"
    if length:
        text += f", {length / trained:g} x its training length"
    longest = max(asked["length"])
    lost = f"surely no more from {high:,.0f} on" if np.isfinite(high) else f"{longest:,} is the longest asked"
    return f"{text} (surely up to {low:,.0f}; {lost})"


def _grid(card: Mapping[str, Any], name: str, right: Sequence[Sequence[int]]) -> list[str]:
    asked = card["passkeys"]
    head = ["", f"In {name}:", "", "| tokens | " + " | ".join(f"depth {d:g}" for d in asked["depth"]) + " |"]
    return [
        *head,
        "|---:" * (1 + len(asked["depth"])) + "|",
        *(
            f"| {n:,} | " + " | ".join(map(str, k)) + " |"
            for n, k in zip(asked["length"], right, strict=True)
        ),
    ]


def _grids_beside(card: Mapping[str, Any]) -> list[str]:
    if "beside" not in card:
        return []
    what = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in card["beside"]["differs"].items())
    lines = ["", f"The same model with {what}, asked the same:"]
    return lines + [line for name, k in card["beside"]["right"].items() for line in _grid(card, name, k)]


def _training(training: Mapping[str, Any]) -> list[str]:
    made = training.get("made", {})
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in training.items() if key != "made"]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in made.items() if key != "command"]
    return lines + (["", f"    {made['command']}"] if "command" in made else [])
