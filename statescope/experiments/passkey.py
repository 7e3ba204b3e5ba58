"""Passkey retrieval: a five-digit number hidden in filler, asked for at the end.

Source: *Stuffed Mamba* (arXiv 2410.07145), section 3 and appendix; the filler, needle and question are
the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from statescope import caches
from statescope.adapters import Call
from statescope.capture import capture
from statescope.carry import Carry
from statescope.scan import scan

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "What is the passkey? The passkey is"
DIGITS = 5


def needle(passkey: str) -> str:
    """Say the sentence that holds the passkey."""
    return f"The passkey is {passkey}. Remember it. {passkey} is the passkey. "


@dataclass(frozen=True)
class Prompt:
    """One prompt; positions are in bytes of its text.

    Attributes
    ----------
    text : str
        What the model reads.
    passkey : str
        What it should answer.
    needle_start, needle_stop : int
        Where the needle stands.
    """

    text: str
    passkey: str
    needle_start: int
    needle_stop: int


def make_prompt(length: int, depth: float, rng: np.random.Generator, haystack: str | None = None) -> Prompt:
    """Hide a random passkey in a haystack.

    Parameters
    ----------
    length : int
        Bytes of the whole prompt, question included.
    depth : float
        Where the needle stands: 0 at the start, 1 right before the question.
    rng : numpy Generator
        Draws the passkey and where the haystack begins.
    haystack : str, optional
        ASCII text to hide it in. Default: the paper's filler.

    Raises
    ------
    ValueError
        If the length leaves no room for needle and question, or the depth is outside [0, 1].
    """
    passkey = "".join(str(d) for d in rng.integers(0, 10, DIGITS))
    sentence = needle(passkey)
    room = length - len(sentence) - len(QUESTION) - 1
    if room < 0:
        raise ValueError(f"length={length} is too short; the needle and the question need {length - room}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}; expected 0 (start) to 1 (right before the question)")
    if haystack is None:
        straw = (FILLER * (room // len(FILLER) + 1))[:room]
    elif not haystack.isascii() or len(haystack) < room:
        raise ValueError(f"haystack has {len(haystack)} characters; expected at least {room} of ASCII")
    else:
        start = int(rng.integers(0, len(haystack) - room + 1))
        straw = haystack[start : start + room]
    at = round(depth * room)
    text = straw[:at] + sentence + straw[at:] + " " + QUESTION
    return Prompt(text, passkey, at, at + len(sentence))


def answer(model: nn.Module, ids: Tensor, new_tokens: int, segment: int = 4096) -> Tensor:
    """Continue a batch of token ids greedily, our scan in the place of the model's: it is the faster one.

    Parameters
    ----------
    model : nn.Module
        A causal language model with a recurrent cache.
    ids : Tensor, (batch, time)
        Prompts of one length.
    new_tokens : int
        How many tokens to add.
    segment : int
        Tokens of one forward pass.

    Returns
    -------
    Tensor, (batch, new_tokens)
    """
    device = next(model.parameters()).device
    cache = Carry.fresh(model).cache
    fed, position = ids.to(device), 0
    chosen: list[Tensor] = []
    with torch.no_grad(), capture(model, _our_scan):
        while len(chosen) < new_tokens:
            for part in fed.split(segment, 1):
                inputs = caches.inputs(model, cache, position, part) | {"logits_to_keep": 1}
                logits = model(part, **inputs).logits
                position += part.shape[1]
            fed = logits[:, -1:].argmax(-1)
            chosen.append(fed[:, 0])
    return torch.stack(chosen, 1).cpu()


def _our_scan(layer: int, call: Call, run_own: Callable[[], Any]) -> Any:
    return call.answer(scan(call.recurrence, measure=False))


def ask(model: nn.Module, prompts: Sequence[Prompt]) -> list[str]:
    """Ask a byte-level model for the passkey of every prompt; all prompts are of one length."""
    ids = torch.tensor([list(p.text.encode("ascii")) for p in prompts])
    answers = answer(model, ids, DIGITS + 1)
    return [bytes(row.tolist()).decode("ascii", errors="replace").strip()[:DIGITS] for row in answers]
