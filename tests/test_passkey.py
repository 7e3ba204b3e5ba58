"""Passkey retrieval, held against the accuracies measured when the checkpoints were trained."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

import statescope
from statescope.experiments.passkey import QUESTION, ask, make_prompt, needle

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEASURED = {
    ("mamba2-byte-n16-t512", 512): (1, 1, 1, 1, 1),
    ("mamba2-byte-n16-t512", 1024): (1, 1, 1, 1, 1),
    ("mamba2-byte-n16-t512", 2048): (0.56, 0.91, 1, 1, 1),
    ("mamba2-byte-n64-t512", 512): (1, 1, 1, 1, 1),
    ("mamba2-byte-n64-t512", 1024): (0.12, 0.34, 1, 1, 1),
    ("mamba2-byte-n64-t512", 2048): (0, 0.03, 0.16, 0.84, 1),
}
"""Accuracy by depth, 32 prompts each, book text as the haystack."""

PROMPTS = 16


@pytest.mark.parametrize(("name", "length"), MEASURED, ids=str)
def test_accuracies_of_the_training_run(name: str, length: int, book: np.ndarray) -> None:
    haystack = "".join(c for c in bytes(book[:400_000].astype(np.uint8)).decode() if c.isascii())
    model = statescope.load(name)
    rng = np.random.default_rng(0)
    prompts = [make_prompt(length, depth, rng, haystack) for depth in DEPTHS for _ in range(PROMPTS)]
    right = np.array([a == p.passkey for a, p in zip(ask(model, prompts), prompts, strict=True)])
    for depth, found, expected in zip(
        DEPTHS, right.reshape(-1, PROMPTS).sum(1), MEASURED[name, length], strict=True
    ):
        # The table itself is a sample of 32: leave it one prompt of its own uncertainty.
        nearest = min(max(found / PROMPTS, expected - 1.5 / 32), expected + 1.5 / 32)
        assert binomtest(int(found), PROMPTS, min(nearest, 1.0)).pvalue > 1e-3, (
            f"depth {depth}: {found}/{PROMPTS}"
        )


def test_prompt_is_the_papers() -> None:
    prompt = make_prompt(700, 0.3, np.random.default_rng(1))
    assert len(prompt.text) == 700 and prompt.text.endswith(" " + QUESTION)
    assert prompt.text[prompt.needle_start : prompt.needle_stop] == needle(prompt.passkey)
    assert prompt.text.startswith("The grass is green. The sky is blue.")


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_depth_ends(depth: float) -> None:
    prompt = make_prompt(400, depth, np.random.default_rng(2))
    at = prompt.needle_start if depth == 0 else 400 - len(QUESTION) - 1 - prompt.needle_stop
    assert at == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"length": 20, "depth": 0}, "length=20"),
        ({"length": 500, "depth": 2}, "depth=2"),
        ({"length": 500, "depth": 0, "haystack": "short"}, "haystack"),
        ({"length": 500, "depth": 0, "haystack": "é" * 900}, "haystack"),
    ],
)
def test_bad_prompts_are_named(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_prompt(rng=np.random.default_rng(0), **arguments)
