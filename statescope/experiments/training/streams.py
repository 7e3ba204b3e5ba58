"""What the runs read: made on the device, all runs at once, by formulas without loops over tokens.

A row is packed with sequences of one length: the training length, or for a share of the rows a random
power of two below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from statescope.experiments.prompts import FILLER, QUESTION, needle
from statescope.experiments.training.config import Config
from statescope.experiments.training.draws import Draws

SHORTEST = {"recall": 8, "text": 128}
"""Tokens of the shortest sequence a row is cut into."""

IS_SHORT, WHICH_SHORT, KEY, VALUE, IS_REPEATED, LAG, IS_UNIFORM, HAS_NEEDLE, IS_FILLER, OFFSET, GAP, DIGIT = (
    range(12)
)
"""Purposes of the draws."""


@dataclass(frozen=True)
class Batch:
    """One step of all runs.

    Attributes
    ----------
    ids, position : Tensor of int64, (run, row, token)
        What is read, and where it stands in its sequence.
    answers : Tensor of int64, (run, row, asked)
        What should follow every ``stride``-th token.
    weight : Tensor of float32, (run, row, asked)
        How much it counts in the loss; 0 where nothing is asked.
    """

    ids: Tensor
    position: Tensor
    answers: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of one step: how many, how long, and how cut.

    Attributes
    ----------
    place : Tensor, (1, row, token)
        Number of each token within the step.
    length : Tensor, (run, row, 1)
        Tokens of the sequences in a row.
    start : Tensor, (run, row, token)
        Token of the row at which its sequence begins.
    """

    place: Tensor
    length: Tensor
    start: Tensor

    @classmethod
    def cut(cls, draws: Draws, rows: int, tokens: int, longest: Tensor, short: float, shortest: int) -> Rows:
        """Cut rows into sequences; ``longest`` is the training length, (run,)."""
        token = torch.arange(tokens, device=longest.device)
        row = torch.arange(rows, device=longest.device)[None, :, None]
        longest = longest[:, None, None]
        halvings = (longest / shortest).log2().round().long().clamp(min=0)  # how often it can be cut in two
        which = (draws.uniform(WHICH_SHORT, row) * halvings).long() + 1
        is_short = (draws.uniform(IS_SHORT, row) < short) & (halvings > 0)
        length = torch.where(is_short, longest >> which.minimum(halvings), longest)
        return cls(row * tokens + token, length, token - token % length)

    @property
    def position(self) -> Tensor:
        """Where each token stands in its sequence, (run, row, token)."""
        return torch.arange(self.place.shape[-1], device=self.place.device) - self.start

    @property
    def sequence(self) -> Tensor:
        """A number for each sequence: the place of its first token, (run, row, token)."""
        return self.place[..., :1] + self.start


class Stream(Protocol):
    """A source of batches.

    Attributes
    ----------
    stride : int
        Answers are asked after every so many tokens.
    choices : int
        Answers are among the first so many token ids.
    """

    stride: int
    choices: int

    def draw(self, draws: Draws, rows: Rows) -> Batch:
        """Make one step."""
        ...


class Recall:
    """Pairs of a key and a value; with probability 1/2 a pair is an earlier one of its sequence again.

    How far back is drawn from 1 to the pairs there are: log-uniformly, for a share of the pairs uniformly.
    What is asked for is the value of every key that has been there before, among the values. Token ids are
    the values, then the keys.

    Parameters
    ----------
    keys, values : int
        Vocabulary.
    uniform : Tensor, (run,)
        Share of uniform lags, of every run.
    """

    stride = 2

    def __init__(self, keys: int, values: int, uniform: Tensor) -> None:
        self.keys, self.choices, self.uniform = keys, values, uniform[:, None, None]

    def draw(self, draws: Draws, rows: Rows) -> Batch:
        """Make one step."""
        root, repeated = self.roots(draws, rows)
        place = rows.place[..., ::2]
        key = draws.below(self.keys, KEY, place).gather(-1, root)
        value = draws.below(self.choices, VALUE, place).gather(-1, root)
        ids = torch.stack([key + self.choices, value], -1).flatten(-2)
        return Batch(ids, rows.position, value, repeated.float())

    def roots(self, draws: Draws, rows: Rows) -> tuple[Tensor, Tensor]:
        """For every pair, the one it is a repetition of (or itself), and whether it is one."""
        place, before = rows.place[..., ::2], rows.position[..., ::2] // 2
        u = draws.uniform(LAG, place)
        lag = (before + 1.0).pow(u).long()
        evenly = draws.uniform(IS_UNIFORM, place) < self.uniform
        lag = torch.where(evenly, (u * before).long() + 1, lag).clamp(min=1).minimum(before)
        repeated = (draws.uniform(IS_REPEATED, place) < 0.5) & (before > 0)
        pair = torch.arange(place.shape[-1], device=place.device)
        root = torch.where(repeated, pair - lag, pair)
        for _ in range((place.shape[-1] - 1).bit_length()):  # a repetition of a repetition: jump twice as far
            root = root.gather(-1, root)
        return root, repeated


def pairs_since(root: Tensor) -> Tensor:
    """Pairs since the same one was last seen, (..., pair); 0 where it is new."""
    pairs = root.shape[-1]
    pair = torch.arange(pairs, device=root.device)
    order = (root * pairs + pair).argsort(-1)  # by what is repeated, then by time
    sorted_root = root.gather(-1, order)
    gap = torch.zeros_like(root)
    same = sorted_root[..., 1:] == sorted_root[..., :-1]
    gap[..., 1:] = torch.where(same, order[..., 1:] - order[..., :-1], 0)
    return torch.empty_like(root).scatter_(-1, order, gap)


class Text:
    """Stretches of text as bytes; some hold a passkey and end with the question and the answer.

    The needle's distance from the question is log-uniform, and half of the haystacks are the paper's
    filler. The answer's digits count 20 in the loss, those of the needle's second mention 5, all else 1.

    Parameters
    ----------
    text : Tensor of uint8, (byte,)
        What sequences are cut from.
    passkeys : float
        Share of the sequences that hold one.
    """

    stride, choices = 1, 256

    def __init__(self, text: Tensor, passkeys: float) -> None:
        self.text, self.passkeys = text, passkeys
        sentence, question = needle("0" * 5), f" {QUESTION} "
        first = sentence.index("0" * 5)
        second = sentence.index("0" * 5, first + 1)

        def encode(content: str) -> Tensor:
            return torch.tensor(list(content.encode()), device=text.device)

        self.filler, self.needle, self.tail = encode(FILLER), encode(sentence), encode(question + "0" * 5)
        self.needle_digit = torch.full_like(self.needle, -1)
        self.needle_digit[first : first + 5] = self.needle_digit[second : second + 5] = torch.arange(5)
        self.needle_weight = torch.ones(len(self.needle), device=text.device)
        self.needle_weight[second : second + 5] = 5.0
        self.tail_digit = torch.arange(len(self.tail), device=text.device) - len(question)
        self.tail_weight = torch.where(self.tail_digit >= 0, 20.0, 1.0)

    def draw(self, draws: Draws, rows: Rows) -> Batch:
        """Make one step."""
        position, sequence = rows.position, rows.sequence
        hides = (draws.uniform(HAS_NEEDLE, sequence) < self.passkeys) & (
            rows.length >= len(self.needle) + len(self.tail)
        )
        room = rows.length - len(self.needle) - len(self.tail)
        gap = (room.clamp(min=0) + 1.0).pow(draws.uniform(GAP, sequence)).long() - 1
        in_needle = position - (room - gap)  # where it stands in the needle, and in question and answer
        in_tail = position - (rows.length - len(self.tail))
        is_needle = hides & (in_needle >= 0) & (in_needle < len(self.needle))
        is_tail = hides & (in_tail >= 0)
        straw = torch.where(hides & (in_needle >= len(self.needle)), position - len(self.needle), position)
        ids = self._haystack(draws, sequence, straw, hides)
        weight = torch.ones_like(ids, dtype=torch.float32)
        for inside, at, said, digit, counts in (
            (is_needle, in_needle, self.needle, self.needle_digit, self.needle_weight),
            (is_tail, in_tail, self.tail, self.tail_digit, self.tail_weight),
        ):
            at = at.clamp(0, len(said) - 1)
            drawn = draws.below(10, DIGIT, sequence * 8 + digit[at].clamp(min=0)) + ord("0")
            ids = torch.where(inside, torch.where(digit[at] >= 0, drawn, said[at]), ids)
            weight = torch.where(inside, counts[at], weight)
        is_first = position == 0
        weight = torch.where(is_first, 0.0, weight)  # what begins a sequence cannot be told from before
        return Batch(ids, position, ids.roll(-1, -1), torch.cat([weight[..., 1:], 0 * weight[..., :1]], -1))

    def _haystack(self, draws: Draws, sequence: Tensor, straw: Tensor, hides: Tensor) -> Tensor:
        start = draws.below(len(self.text), OFFSET, sequence)
        book = self.text[(start + straw) % len(self.text)].long()
        is_filler = hides & (draws.uniform(IS_FILLER, sequence) < 0.5)
        return torch.where(is_filler, self.filler[straw % len(self.filler)], book)


def read_corpus(path: str | Path) -> Tensor:
    """Read a text file, or all ``.txt`` files of a folder, as bytes.

    Raises
    ------
    ValueError
        If there is nothing to read; names ``corpus``.
    """
    place = Path(path)
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    content = b"\n".join(file.read_bytes() for file in files)
    if not content:
        raise ValueError(f"corpus={str(path)!r} holds no text")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def held_out(text: Tensor) -> tuple[Tensor, Tensor]:
    """Divide a corpus: what is trained on, and its last twentieth, which is not."""
    cut = len(text) - len(text) // 20
    return text[:cut], text[cut:]


def stream_of(configs: list[Config], device: torch.device) -> Stream:
    """Make the stream of runs that are trained as one."""
    first = configs[0]
    if first.stream == "text":
        return Text(held_out(read_corpus(first.corpus))[0].to(device), first.passkeys)
    uniform = torch.tensor([c.uniform for c in configs], device=device)
    return Recall(first.keys, first.values, uniform)
