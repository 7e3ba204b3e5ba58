"""Pack a trained run into a checkpoint to be passed on: mamba_ssm's format, matrices in float16."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from statescope.experiments.training.config import Config
from statescope.tokens import BYTES

WEIGHTS, SETTINGS = "model.safetensors", "run.json"

FIXED: dict[str, Any] = {
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "tie_embeddings": True,
}
"""Settings of mamba_ssm that all runs share."""


def pack(run: str | Path, folder: str | Path, table: str | Path | None = None) -> Path:
    """Write a run of :mod:`statescope.experiments.training_length` as a checkpoint to be passed on.

    Matrices are rounded to float16, half the bytes; vectors stay float32, and so does what is computed.
    :func:`statescope.load` and ``mamba_ssm`` read it.

    Parameters
    ----------
    run : str or Path
        The run's folder: ``config.json``, ``model.safetensors``, ``run.json``.
    folder : str or Path
        Gets ``config.json``, ``model.safetensors``, and ``training.json``: the run's settings, and how it was
        made.
    table : str or Path, optional
        The table with the run's row, which says how it was made. Default: the sweep's, if the run is still in
        its folder; without a row ``made.json`` beside the run, and a command made from the settings.

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
    ValueError
        If ``run`` is no run, ``folder`` holds something already, or ``table`` has no such run. Nothing is
        written then.
    """
    from safetensors.torch import load_file, save

    run, folder = Path(run), Path(folder)
    missing = [name for name in ("config.json", WEIGHTS, SETTINGS) if not (run / name).is_file()]
    if missing:
        raise ValueError(f"run={str(run)!r} has no {missing[0]}; expected a run of statescope train or sweep")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder={str(folder)!r} is not empty; name a new one")
    settings = json.loads((run / SETTINGS).read_text(encoding="utf-8"))
    facts = _facts(settings) | {"made": _made(run, table, settings)}
    weights = {_renamed(name): _smaller(w) for name, w in load_file(run / WEIGHTS).items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", _config(settings)), ("training.json", facts)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / WEIGHTS).write_bytes(save(weights, {"format": "pt"}))
    return folder


def _config(settings: dict[str, Any]) -> dict[str, Any]:
    text = settings["stream"] == "text"
    sizes = {"d_model": settings["width"], "n_layer": settings["layers"]}
    sizes["vocab_size"] = 256 if text else settings["keys"] + settings["values"]
    ssm = {"layer": "Mamba2", "d_state": settings["state_size"], "headdim": settings["head_size"]}
    return sizes | {"ssm_cfg": ssm | {"chunk_size": settings["chunk"]}, "pad_vocab_size_multiple": 1} | FIXED


def _facts(settings: dict[str, Any]) -> dict[str, Any]:
    """What a reader wants to know first, then all settings; of the corpus its name, not where it lay."""
    text = settings["stream"] == "text"
    named = settings | {"corpus": Path(settings["corpus"]).name}
    return (
        {"tokenizer": f"{BYTES}: token id = UTF-8 byte value, no special tokens"} | named if text else named
    )


def _made(run: Path, table: str | Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The row's facts; without one those beside the run, with the command that trains it by itself."""
    from statescope.analyses.runs import read_lines
    from statescope.experiments.training.cell import MADE
    from statescope.experiments.training_length import TABLE

    if table is None:
        table = run.parent.parent / TABLE
        if run.parent.name != "runs" or not table.exists():
            beside = run / MADE
            known = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
            return known | {"command": command_of(settings)}
    rows = [r for r in read_lines(Path(table))[0] if Path(r["checkpoint"]).name == run.name]
    if not rows:
        raise ValueError(f"table={str(table)!r} has no run {run.name}")
    found: dict[str, Any] = rows[-1]["made"]
    return found


def command_of(settings: dict[str, Any]) -> str:
    """Command that trains this run by itself: what it learns does not depend on those beside it."""
    given = settings | {"corpus": Path(settings["corpus"]).name}
    options = {"stream": "stream", "corpus": "corpus", "state_size": "state-size"}
    options |= {"train_length": "train-length", "steps": "steps", "seed": "seed"}
    usual = {f.name: f.default for f in fields(Config)}
    words = ["statescope train -o lab"]
    words += [f"--{option} {given[name]}" for name, option in options.items() if given[name] != ""]
    words += [
        f"--set {k}={v}" for k, v in given.items() if k not in {*options, "dtype", "warmup"} and v != usual[k]
    ]
    return " ".join([*words, f"--set dtype={given['dtype']}", f"--set warmup={given['warmup']}"])


def _renamed(name: str) -> str:
    return name.replace("backbone.embeddings.", "backbone.embedding.")


def _smaller(weight: torch.Tensor) -> torch.Tensor:
    return (weight.half() if weight.ndim > 1 else weight.float()).contiguous()
