"""What one training run is: one dataclass, checked when it is made, kept as JSON beside every checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

STREAMS = ("recall", "text")
KERNELS = ("auto", "mamba_ssm", "torch")

FREE = (
    "state_size",
    "layers",
    "width",
    "head_size",
    "chunk",
    "row",
    "rows",
    "steps",
    "warmup",
    "values",
    "keys",
)
"""Whole numbers, 1 or more."""

SHARES = ("uniform", "short", "passkeys")
"""Numbers from 0 to 1."""

OWN = ("train_length", "seed", "learning_rate", "uniform")
"""What may differ between runs that are trained as one; all else shapes the work."""


@dataclass(frozen=True)
class Config:
    """One training run.

    Attributes
    ----------
    stream : str
        ``"recall"``: pairs of key and value, see :class:`~statescope.experiments.training.streams.Recall`;
        ``"text"``: bytes with passkeys, see :class:`~statescope.experiments.training.streams.Text`.
    corpus : str
        File or folder of texts, for ``"text"``.
    state_size : int
        Keys of a head's state, N; a head's state has N x ``head_size`` numbers.
    train_length : int
        Tokens of a training sequence; the state is empty at its start. A power of two.
    seed : int
        Draws the initial weights and the data.
    steps, warmup : int
        Steps in all, and those in which the learning rate rises; then it falls by a cosine to 5 %.
    learning_rate, weight_decay, clip : float
        Of AdamW (0.9, 0.95); decay of matrices only; largest norm of a run's gradient.
    uniform : float
        Share of the lags of the recall stream drawn uniformly; the others log-uniformly.
    short : float
        Share of the rows that are cut into sequences of a random power of two below ``train_length``.
    passkeys : float
        Share of the sequences of text that hold a passkey and end with the question and the answer.
    row, rows : int
        A step reads ``rows`` rows of ``row`` tokens; sequences are packed into rows.
    layers, width, head_size, chunk : int
        The model (inner width is twice the width), and the tokens of one matrix product.
    keys, values : int
        Vocabulary of the recall stream.
    dtype : str
        ``"bfloat16"`` or ``"float32"``: what matrix products are done in; weights are float32.
    checkpoints : int
        So many checkpoints at log-spaced steps, besides the last.
    kernels : str
        What scans in training: ``"mamba_ssm"``, its kernels; ``"torch"``, our own; ``"auto"``, the first
        where it can be had, else the second. What was used, and why, is written beside the checkpoint.

    Raises
    ------
    ValueError
        If a setting makes no sense; names it.
    """

    stream: str = "recall"
    corpus: str = ""
    state_size: int = 16
    train_length: int = 64
    seed: int = 0
    steps: int = 2000
    warmup: int = 50
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    uniform: float = 0.0
    short: float = 0.5
    passkeys: float = 0.5
    row: int = 512
    rows: int = 32
    layers: int = 2
    width: int = 128
    head_size: int = 64
    chunk: int = 64
    keys: int = 4096
    values: int = 64
    dtype: str = "bfloat16"
    checkpoints: int = 0
    kernels: str = "auto"

    def __post_init__(self) -> None:
        for name in FREE:
            _whole(name, getattr(self, name), 1)
        for name in ("seed", "checkpoints"):
            _whole(name, getattr(self, name), 0)
        for name in SHARES:
            _between(name, getattr(self, name), 0, 1)
        for name in ("learning_rate", "clip"):
            _between(name, getattr(self, name), 1e-12, 1e6)
        _between("weight_decay", self.weight_decay, 0, 1e6)
        for name in (*SHARES, "learning_rate", "clip", "weight_decay"):  # 1 and 1.0 are the same run
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.stream not in STREAMS:
            raise ValueError(f"stream={self.stream!r}; expected one of {', '.join(STREAMS)}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype={self.dtype!r}; expected bfloat16 or float32")
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels={self.kernels!r}; expected one of {', '.join(KERNELS)}")
        for name in ("train_length", "row", "chunk"):
            size = getattr(self, name)
            _whole(name, size, 1)
            if size & (size - 1):
                raise ValueError(f"{name}={size}; expected a power of two")
        self._check_sizes()

    def _check_sizes(self) -> None:
        if self.row % self.train_length:
            raise ValueError(f"train_length={self.train_length} does not fit into row={self.row}")
        if 2 * self.width % self.head_size:
            raise ValueError(f"head_size={self.head_size} does not divide {2 * self.width}, twice the width")
        if self.warmup > self.steps:
            raise ValueError(f"warmup={self.warmup} is longer than steps={self.steps}")
        if self.stream == "recall" and self.train_length < 8:
            raise ValueError(f"train_length={self.train_length}; the recall stream needs 8 or more")
        if self.stream == "text" and not Path(self.corpus).exists():
            raise ValueError(f"corpus={self.corpus!r} does not exist; expected a file or folder of texts")
        if self.stream == "text" and self.passkeys and self.train_length < 128:
            raise ValueError(f"train_length={self.train_length}; a passkey and its question need 128 or more")

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.keys + self.values if self.stream == "recall" else 256

    @property
    def tokens(self) -> int:
        """Tokens read in all steps."""
        return self.steps * self.rows * self.row

    @property
    def state_numbers(self) -> int:
        """Numbers in the recurrent states of all layers: layers x heads x head size x N."""
        return self.layers * 2 * self.width * self.state_size

    @property
    def entries(self) -> int:
        """Numbers in recurrent and convolution state, as *Stuffed Mamba* counts: L (H P N + (2d + 2N) 3)."""
        return self.state_numbers + self.layers * (2 * self.width + 2 * self.state_size) * 3

    def shape(self) -> str:
        """What runs must agree in to be trained as one."""
        return _digest({k: v for k, v in asdict(self).items() if k not in OWN})

    def name(self) -> str:
        """Name of the run, for people and for folders."""
        parts = f"n{self.state_size}-t{self.train_length}-b{self.steps}-s{self.seed}"
        chosen = {
            k: v for k, v in asdict(self).items() if (k, v) != ("kernels", "auto")
        }  # as before there were any
        return f"{self.stream}-{parts}-{_digest(chosen)[:8]}"

    def marks(self) -> list[int]:
        """Steps after which a checkpoint is kept, log-spaced, the last one among them."""
        n = self.checkpoints
        first = min(20, max(1, self.steps // 4))
        spaced = {round(first * (self.steps / first) ** (i / max(n, 1))) for i in range(n)}
        return sorted(spaced | {self.steps})

    def but(self, **changes: Any) -> Config:
        """Change some settings, and check all."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Settings as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Config:
        """Read settings; what is unknown is refused."""
        unknown = set(given) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]} is no setting of a training run")
        return cls(**given)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}; expected a whole number, {least} or more")


def _between(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}; expected a number from {low:g} to {high:g}")
