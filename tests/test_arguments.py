"""An argument that does not fit is refused with one clear message, and nothing that exists is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refusing import TEXT, listing, refused
from tiny import VOCABULARY, build
from torch import nn

import statescope


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)).eval()


def partly(device: str) -> nn.Module:
    """Put one layer of a model elsewhere, as accelerate does with a device_map."""
    model = build("mamba2")
    model.backbone.layers[1].to(device)
    return model


def returns_a_number(layer: int, recurrence: Any) -> Any:
    return 3


def forgets_a_token(layer: int, recurrence: Any) -> Any:
    return (
        recurrence.between(1, recurrence.time, recurrence.initial_state)
        if recurrence.time > 1
        else recurrence
    )


class Unknown:
    """Anything that is no zarr store."""


FAMILIES_NAMED = ("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "falcon_h1", "zamba2")

ARGUMENTS: list[tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ("empty string", {"text": ""}, ValueError, ("text is empty", "at least one token")),
    ("empty list", {"text": []}, ValueError, ("text is empty", "at least one token")),
    ("empty batch", {"text": [[], []]}, ValueError, ("text is empty", "at least one token")),
    (
        "id too high",
        {"text": [3, 64]},
        ValueError,
        ("text has token id 64", "(0, 1)", "0 to 63", "tokenizer"),
    ),
    ("id negative", {"text": [[1, 2], [3, -4]]}, ValueError, ("text has token id -4", "(1, 1)", "0 to 63")),
    ("ids as floats", {"text": [1.0, 2.0]}, TypeError, ("text has dtype float64", "integer")),
    ("ids in bfloat16", {"text": TEXT.bfloat16()}, TypeError, ("text has dtype", "bfloat16", "integer")),
    ("ids as booleans", {"text": [True, False]}, TypeError, ("text has dtype bool", "integer")),
    ("three axes", {"text": TEXT[None]}, ValueError, ("text has 3 dimensions", "(time,) or (batch, time)")),
    ("no axis", {"text": {"input_ids": [1]}}, TypeError, ("text is a dict", "sequence of token ids")),
    ("bytes", {"text": b"abc"}, TypeError, ("text is a bytes", "sequence of token ids")),
    ("ragged lists", {"text": [[1, 2], [3]]}, ValueError, ("text holds", "different lengths", "one by one")),
    ("strings", {"text": ["one", "two"]}, TypeError, ("text is a list of strings", "one by one")),
    ("nested strings", {"text": [["one"]]}, TypeError, ("text has dtype", "integer")),
    ("no tokenizer", {"text": "hello"}, ValueError, ("tokenizer is not known", "pass tokenizer=", "'bytes'")),
    (
        "tokenizer unknown",
        {"text": "hello", "tokenizer": "no/such/tokenizer/anywhere"},
        ValueError,
        ("tokenizer", "no/such/tokenizer/anywhere"),
    ),
    ("no recurrence", {"model": gpt2}, ValueError, ("model is a GPT2LMHeadModel", *FAMILIES_NAMED)),
    ("no recurrence, string", {"model": gpt2, "text": "a"}, ValueError, ("GPT2LMHeadModel", "mamba2")),
    ("no language model", {"model": lambda: nn.Linear(2, 2).eval()}, TypeError, ("model is a Linear",)),
    ("no model", {"model": lambda: 3}, TypeError, ("model is a int", "transformers model", "folder")),
    (
        "no head",
        {"model": lambda: build("mamba2").backbone},
        ValueError,
        ("model is a Mamba2Model", "logits"),
    ),
    (
        "in training",
        {"model": lambda: build("mamba2").train()},
        ValueError,
        ("training mode", "model.eval()"),
    ),
    ("sharded", {"model": lambda: partly("meta")}, ValueError, ("weights on cpu and meta", "device_map")),
    (
        "not loaded",
        {"model": lambda: build("mamba2").to("meta")},
        ValueError,
        ("weights on meta", "one device"),
    ),
    ("layer", {"layers": [0, 7]}, ValueError, ("layers names layer 7", "0 to 2")),
    ("layer in a gap", {"model": lambda: build("bamba"), "layers": 1}, ValueError, ("layer 1", "0, 2, 3")),
    ("no layer", {"layers": []}, ValueError, ("layers names no layer", "0 to 2")),
    ("layer by name", {"layers": "first"}, ValueError, ("layers holds", "integers")),
    ("head", {"heads": 4}, ValueError, ("heads names head 4", "0 to 3")),
    ("head negative", {"heads": -1}, ValueError, ("heads names head -1", "0 to 3")),
    ("snapshot", {"snapshots": [3, 20]}, ValueError, ("snapshots names position 20", "0 to 19")),
    ("snapshot negative", {"snapshots": -21}, ValueError, ("snapshots names position -21", "0 to 19")),
    ("snapshot fraction", {"snapshots": 0.5}, ValueError, ("snapshots holds 0.5", "integers")),
    ("probe", {"probes": 99}, ValueError, ("probes names position 99", "0 to 19")),
    ("reach", {"probes": statescope.Probes([3], reach=0)}, ValueError, ("probes has reach=0", "1 token")),
    ("reach fraction", {"probes": statescope.Probes([3], reach=1.5)}, ValueError, ("probes has reach=1.5",)),
    ("window", {"window": 0}, ValueError, ("window=0", "1 or more")),
    ("window fraction", {"window": 1.5}, ValueError, ("window=1.5", "1 or more")),
    ("segment", {"segment": 0}, ValueError, ("segment=0", "1 or more")),
    ("segment boolean", {"segment": True}, ValueError, ("segment=True", "1 or more")),
    ("train length", {"train_length": 0}, ValueError, ("train_length=0", "1 or more")),
    ("backend", {"backend": "fast"}, ValueError, ("backend='fast'", "auto", "model", "chunked", "reference")),
    (
        "backend that edits not",
        {"backend": "model", "edit": returns_a_number},
        ValueError,
        ("backend='model'", "edit", "'auto'"),
    ),
    ("edit no function", {"edit": 3}, TypeError, ("edit is a int", "(layer, recurrence)")),
    ("edit nonsense", {"edit": returns_a_number}, TypeError, ("edit returned int", "layer 0", "Recurrence")),
    (
        "edit another shape",
        {"edit": forgets_a_token},
        ValueError,
        ("edit returned", "layer 0", "(1, 20, 4, 16, 8)"),
    ),
    ("device", {"device": "meta"}, ValueError, ("device='meta'", "on cpu", "move the model")),
    ("device unknown", {"device": "abacus"}, ValueError, ("device='abacus'", "'cpu'")),
    ("dtype", {"dtype": "float16"}, ValueError, ("dtype='float16'", "torch.float32", "convert")),
    ("dtype unknown", {"dtype": "float3"}, ValueError, ("dtype='float3'", "'float32'")),
    ("dtype integer", {"dtype": torch.int8}, ValueError, ("dtype=torch.int8", "floating")),
    ("store of no kind", {"store": Unknown()}, TypeError, ("store is a Unknown", "folder")),
    ("store empty", {"store": ""}, ValueError, ("store=''", "folder")),
    ("store far away", {"store": "s3://bucket/run.zarr"}, ValueError, ("store='s3://", "zarr store")),
]


@pytest.mark.parametrize(
    ("changes", "error", "words"), [c[1:] for c in ARGUMENTS], ids=[c[0] for c in ARGUMENTS]
)
def test_argument_refused(
    changes: dict[str, Any],
    error: type[Exception],
    words: tuple[str, ...],
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each argument that does not fit names itself and the remedy; no file appears or changes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    given = {"model": model, "text": TEXT, "store": tmp_path / "run.zarr", **changes}
    if callable(given["model"]) and not isinstance(given["model"], nn.Module):
        given["model"] = given["model"]()
    before = listing(tmp_path)
    refused(lambda: statescope.trace(given.pop("model"), given.pop("text"), **given), error, *words)
    assert listing(tmp_path) == before
