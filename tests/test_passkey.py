"""Passkey retrieval, held against what the checkpoints' cards say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import binomtest
from torch import nn

import statescope
from statescope.analyses.passkey import read_answers
from statescope.experiments import passkey as module
from statescope.experiments.cards import read_card
from statescope.experiments.passkey import answer, passkey
from statescope.experiments.prompts import DIGITS, QUESTION, Haystack, needle

SMALL, LARGE = "mamba2-byte-n16-t512", "mamba2-byte-n64-t512"
PROMPTS, SEED = 16, 1
LONGEST = 2048
"""Tokens of the longest prompt that a card is held at."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The checkpoint that is asked where any would do."""
    return statescope.load(SMALL)


@pytest.mark.parametrize("name", list(statescope.bundled()))
def test_checkpoints_recall_what_their_cards_say(name: str, book: np.ndarray) -> None:
    """From the training length on, in book text, with other prompts than those of the card."""
    haystack = "".join(c for c in bytes(book[:400_000].astype(np.uint8)).decode() if c.isascii())
    card = read_card(statescope.bundled()[name])
    asked, depths = card["passkeys"], card["passkeys"]["depth"]
    assert asked["trials"] == 32 and asked["seed"] != SEED
    measured = dict(zip(asked["length"], asked["right"]["book text"], strict=True))
    lengths = [n for n in measured if card["training"]["train_length"] <= n <= LONGEST]
    answers = passkey(name, lengths, depths, PROMPTS, haystack=haystack, seed=SEED, progress=False)
    for length in lengths:
        right = answers["correct"].sel(length=length).sum("trial").values
        for depth, found, expected in zip(depths, right, np.array(measured[length]) / 32, strict=True):
            # The card itself is a sample of 32: leave it one prompt of its own uncertainty.
            nearest = min(max(found / PROMPTS, expected - 1.5 / 32), expected + 1.5 / 32)
            assert binomtest(int(found), PROMPTS, min(nearest, 1.0)).pvalue > 1e-3, (
                f"{length} tokens, depth {depth}: {found}/{PROMPTS}"
            )


def test_table_says_what_was_asked_and_prompts_can_be_rebuilt(model: nn.Module) -> None:
    answers = passkey(model, [300, 200], [1, 0.5], 2, seed=7)
    assert dict(answers.sizes) == {"length": 2, "depth": 2, "trial": 2}
    assert list(answers["length"]) == [200, 300] and list(answers["depth"]) == [0.5, 1]
    hay = Haystack()
    for cell in answers.stack(prompt=("length", "depth", "trial")).transpose("prompt").prompt.values:
        one = answers.sel(dict(zip(("length", "depth", "trial"), cell, strict=True)))
        prompt = hay.hide(int(one["length"]), float(one["depth"]), int(one["seed"]))
        assert prompt.passkey == one["passkey"] and len(prompt.ids) == one["length"]
        assert (prompt.needle_start, prompt.needle_stop) == (one["needle_start"], one["needle_stop"])
        assert bool(one["correct"]) == (one["answer"] == one["passkey"])
    assert len(np.unique(answers["passkey"])) == 8 and float(answers["correct"].mean()) == 1
    other = passkey(model, [200], [0.5], 2, seed=8)
    assert not set(other["passkey"].values.ravel()) & set(answers["passkey"].values.ravel())


def test_answers_do_not_depend_on_segments_or_batches(model: nn.Module) -> None:
    hay = Haystack()
    ids = torch.from_numpy(np.stack([hay.hide(201, 0.3, seed).ids for seed in range(3)]))
    whole = answer(model, ids, DIGITS + 1, segment=4096)
    for segment in (200, 64, 50):  # 200 would leave one token over
        assert torch.equal(answer(model, ids, DIGITS + 1, segment), whole)
    assert torch.equal(torch.cat([answer(model, row[None], DIGITS + 1) for row in ids]), whole)
    with torch.no_grad():  # the model's own scan, the whole text anew for every token
        own = ids
        for _ in range(DIGITS + 1):
            own = torch.cat([own, model(own).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(own[:, 201:], whole)


def test_prompt_is_the_papers() -> None:
    prompt = Haystack().hide(700, 0.3, 1)
    text = bytes(prompt.ids.tolist()).decode()
    assert len(text) == 700 and text.endswith(" " + QUESTION)
    assert text[prompt.needle_start : prompt.needle_stop] == needle(prompt.passkey)
    assert text.startswith("The grass is green. The sky is blue.")


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_depth_ends(depth: float) -> None:
    prompt = Haystack().hide(400, depth, 2)
    at = prompt.needle_start if depth == 0 else 400 - len(QUESTION) - 1 - prompt.needle_stop
    assert at == 0


def test_haystack_of_a_user_is_cut_out_of_anywhere() -> None:
    hay = Haystack("".join(chr(97 + i % 26) for i in range(2000)) + "é")
    texts = [bytes(hay.hide(400, 1, seed).ids.tolist()).decode() for seed in range(5)]
    assert len({text[:20] for text in texts}) > 1
    assert all(text[:20] in "abcdefghijklmnopqrstuvwxyz" * 3 for text in texts)


def test_any_tokenizer(shared: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = str(shared / "data" / "tokenizers" / "gpt-neox-20b_tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=path)
    hay = Haystack(tokenizer=tokenizer)
    for seed in range(20):
        prompt = hay.hide(333, 0.4, seed)
        assert len(prompt.ids) == 333
        assert tokenizer.decode(prompt.ids[prompt.needle_start : prompt.needle_stop]) == needle(
            prompt.passkey
        )
        assert hay.answer(tokenizer(f" {prompt.passkey}. Remember")["input_ids"]) == prompt.passkey
    assert "grass is green" in tokenizer.decode(prompt.ids[:20])


def test_token_that_opens_every_text_opens_the_prompt() -> None:
    class Opening:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + list(text.encode())}

    prompt = Haystack(tokenizer=Opening()).hide(300, 0, 0)
    assert len(prompt.ids) == 300 and list(prompt.ids).count(1) == 1
    assert prompt.ids[0] == 1 and prompt.needle_start == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lengths": [20]}, "length=20"),
        ({"lengths": []}, "lengths is empty"),
        ({"lengths": [300.5]}, "lengths holds 300.5"),
        ({"depths": [0, 2]}, "depth=2"),
        ({"depths": ["deep"]}, "depths holds 'deep'"),
        ({"trials": 0}, "trials=0"),
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"haystack": "short"}, "haystack has 5 tokens"),
        ({"haystack": ""}, "haystack is empty"),
        ({"haystack": b"bytes"}, "haystack is a bytes"),
        ({"model": 3}, "model is a int"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_and_leave_nothing(
    arguments: dict[str, Any], named: str, model: nn.Module, tmp_path: Path
) -> None:
    given = {"model": model, "lengths": [300], "depths": [0.5], "trials": 1, **arguments}
    with pytest.raises((ValueError, TypeError), match=named):
        passkey(store=tmp_path / "answers.jsonl", **given)
    assert not list(tmp_path.iterdir())


GRID: dict[str, Any] = {"lengths": [150, 180], "depths": [0, 1], "trials": 6, "batch": 2}

SCRIPT = """
import sys, torch
from statescope.experiments.passkey import passkey
torch.set_num_threads(1)
passkey({model!r}, store=sys.argv[1], progress=False, **{grid!r})
"""


class Asked:
    """Counts the prompts a model was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts = 0

        def spied(model: Any, prompts: Any, hay: Any, own: Any = module.ask) -> list[str]:
            self.prompts += len(prompts)
            return own(model, prompts, hay)

        monkeypatch.setattr(module, "ask", spied)


@pytest.fixture(scope="module")
def unbroken(model: nn.Module) -> xr.Dataset:
    """The grid in one go."""
    return passkey(model, **GRID)


def test_killed_grid_goes_on(
    model: nn.Module, unbroken: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "answers.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = SCRIPT.format(model=SMALL, grid=GRID)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(store)], env=environment, stderr=subprocess.DEVNULL
    )
    while not store.exists() or store.read_bytes().count(b"\n") < 8:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = store.read_bytes()
    finished = kept.count(b"\n") - 1
    assert 7 <= finished < 24
    assert int(read_answers(store)["correct"].notnull().sum()) == finished
    asked = Asked(monkeypatch)
    resumed = passkey(model, store=store, **GRID)
    assert asked.prompts == 24 - finished and store.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    xr.testing.assert_equal(resumed, unbroken)
    passkey(model, store=store, **GRID)
    assert asked.prompts == 24 - finished
    xr.testing.assert_identical(read_answers(store), resumed)


def test_cut_at_any_byte_goes_on(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid: dict[str, Any] = {"lengths": [140], "depths": [0], "trials": 2}
    store = tmp_path / "answers.jsonl"
    whole = passkey(model, store=store, **grid)
    data = store.read_bytes()
    first, second = (i for i, byte in enumerate(data) if byte == 10 and i < len(data) - 1)
    for cut, left in [
        (0, 2),
        (5, 2),
        (first, 2),
        (first + 1, 2),
        (second, 2),
        (second + 1, 1),
        (len(data) - 1, 1),
    ]:
        store.write_bytes(data[:cut])
        asked = Asked(monkeypatch)
        xr.testing.assert_identical(passkey(model, store=store, **grid), whole)
        assert asked.prompts == left and store.read_bytes() == data
        monkeypatch.undo()


def test_grid_grows(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "answers.jsonl"
    part = passkey(model, [150], [0.5], 2, store=store)
    asked = Asked(monkeypatch)
    more = passkey(model, [150, 160], [0.5], 3, store=store)
    assert asked.prompts == 4
    xr.testing.assert_equal(more.sel(length=[150], trial=[0, 1]), part)
    xr.testing.assert_equal(passkey(model, [150], [0.5], 2, store=store), part)
    assert asked.prompts == 4


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "another seed"),
        ({"haystack": "Some other text. " * 50}, "another haystack or tokenizer"),
        ({"model": LARGE}, "another model"),
        ({"observe": print}, "another measurement of states"),
    ],
    ids=str,
)
def test_answers_of_others_are_left_alone(
    changed: dict[str, Any], named: str, model: nn.Module, tmp_path: Path
) -> None:
    store = tmp_path / "answers.jsonl"
    passkey(model, [140], [0], 1, store=store)
    before = store.read_bytes()
    with pytest.raises(ValueError, match=named):
        passkey(**{"model": model, "lengths": [150], "depths": [0], "trials": 1, "store": store, **changed})
    assert store.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"a diary\n", b"a diary", b'{"a": 1}\n', b"[1, 2]\n", b"\xff\xfe\n"], ids=str
)
def test_files_of_others_are_left_alone(content: bytes, model: nn.Module, tmp_path: Path) -> None:
    store = tmp_path / "answers.jsonl"
    store.write_bytes(content)
    with pytest.raises(ValueError, match="no file of answers"):
        passkey(model, [140], [0], 1, store=store)
    assert store.read_bytes() == content


def test_damaged_line_is_named(model: nn.Module, tmp_path: Path) -> None:
    store = tmp_path / "answers.jsonl"
    passkey(model, [140], [0], 2, store=store)
    lines = store.read_text().splitlines()
    store.write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    with pytest.raises(ValueError, match="damaged in line 2"):
        read_answers(store)


def test_place_that_cannot_be_written(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"store=.*cannot be written"):
        passkey(model, [140], [0], 1, store=tmp_path / "no" / "such" / "answers.jsonl")


def test_unfinished_file_opens_with_gaps(model: nn.Module, tmp_path: Path) -> None:
    store = tmp_path / "answers.jsonl"
    passkey(model, [140], [0, 1], 1, store=store)
    passkey(model, [150], [1], 2, store=store)
    answers = read_answers(store)
    assert answers["correct"].count("trial").values.tolist() == [[1, 1], [0, 2]]
    assert answers["passkey"].sel(length=150, depth=0, trial=0) == ""
    assert json.loads(store.read_text().splitlines()[0])["model_id"] == SMALL == answers.attrs["model_id"]
    store.write_text(store.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="no answers yet"):
        read_answers(store)
