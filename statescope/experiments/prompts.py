"""Passkey prompts: a five-digit number hidden in a haystack, asked for at the end, in a model's own tokens.

Source: *Stuffed Mamba* (arXiv 2410.07145), section 3 and appendix; the filler, needle and question are
the paper's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statescope.tokens import ByteTokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "What is the passkey? The passkey is"
DIGITS = 5


def needle(passkey: str) -> str:
    """Say the sentence that holds the passkey."""
    return f"The passkey is {passkey}. Remember it. {passkey} is the passkey. "


@dataclass(frozen=True)
class Prompt:
    """One prompt; positions are tokens.

    Attributes
    ----------
    ids : array of int64, (token,)
        What the model reads.
    passkey : str
        What it should answer.
    needle_start, needle_stop : int
        Where the needle stands: its first token, and the first one after it.
    """

    ids: NDArray[np.int64]
    passkey: str
    needle_start: int
    needle_stop: int


class Haystack:
    """A text to hide passkeys in.

    Parameters
    ----------
    text : str, optional
        What the passkey is hidden in; every prompt takes a stretch of it that begins at random.
        Default: the paper's filler, from its beginning, over and over.
    tokenizer : optional
        A transformers tokenizer. Default: bytes. Filler, needle and question are encoded one by one, so
        that a prompt has the very length asked for; a token that opens every text (such as ``<s>``) opens
        the prompt.

    Raises
    ------
    TypeError, ValueError
        If the text is no string, or empty.
    """

    def __init__(self, text: str | None = None, tokenizer: Any = None) -> None:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"haystack is a {type(text).__name__}; expected a text, or None for the paper's")
        if text is not None and not text:
            raise ValueError("haystack is empty; expected a text, or None for the paper's filler")
        self.tokenizer = tokenizer or ByteTokenizer()
        self._repeats = text is None
        self._straw = self._encode(FILLER if text is None else text)
        self._question = self._encode(" " + QUESTION)
        first = getattr(self.tokenizer, "bos_token_id", None)
        opens = first is not None and list(self.tokenizer("a")["input_ids"])[:1] == [first]
        self._opening = np.array([first] if opens else [], dtype=np.int64)

    def hide(self, length: int, depth: float, seed: int | np.random.Generator) -> Prompt:
        """Hide a random passkey.

        Parameters
        ----------
        length : int
            Tokens of the whole prompt, question included.
        depth : float
            Where the needle stands: 0 at the start, 1 right before the question.
        seed : int or numpy Generator
            Draws the passkey and where the stretch of text begins; the same seed gives the same prompt.

        Raises
        ------
        ValueError
            If the length leaves no room for needle and question or the haystack is too short for it, or
            the depth is outside [0, 1].
        """
        rng = np.random.default_rng(seed)
        passkey = "".join(str(d) for d in rng.integers(0, 10, DIGITS))
        sentence = self._encode(needle(passkey))
        room = length - len(self._opening) - len(sentence) - len(self._question)
        if room < 0:
            raise ValueError(
                f"length={length} is too short; the needle and the question need {length - room}"
            )
        if not 0 <= depth <= 1:
            raise ValueError(f"depth={depth}; expected 0 (start) to 1 (right before the question)")
        straw = self._stretch(room, rng)
        at = round(depth * room)
        parts = (self._opening, straw[:at], sentence, straw[at:], self._question)
        start = len(self._opening) + at
        return Prompt(np.concatenate(parts), passkey, start, start + len(sentence))

    def answer(self, ids: Any) -> str:
        """Read the digits that a model answered: the first five characters, blanks left out."""
        return str(self.tokenizer.decode([int(i) for i in ids])).strip()[:DIGITS]

    def fingerprint(self) -> str:
        """Hash of all that a seed's prompt depends on."""
        parts = (self._opening, self._straw, self._question, self._encode(needle("0123456789")))
        return hashlib.sha256(b"|".join([b"%d" % self._repeats, *(p.tobytes() for p in parts)])).hexdigest()

    def _stretch(self, room: int, rng: np.random.Generator) -> NDArray[np.int64]:
        if self._repeats:
            return np.resize(self._straw, room)
        if len(self._straw) < room:
            raise ValueError(f"haystack has {len(self._straw)} tokens; expected at least {room}")
        start = int(rng.integers(0, len(self._straw) - room + 1))
        return self._straw[start : start + room]

    def _encode(self, text: str) -> NDArray[np.int64]:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
