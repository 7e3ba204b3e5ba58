"""Records made of chosen decays, keys and values, with every state they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from zarr.storage import MemoryStore

import statescope
from statescope.layout import Layout
from statescope.schema import ROOT_ATTRIBUTES
from statescope.store import RecordWriter
from statescope.watch import Watch

Array = NDArray[Any]

SEQUENCES, LAYERS, HEADS, KEY, VALUE = 2, (0, 3), (0, 1, 2), 4, 5


@dataclass
class Truth:
    """A text's writes and, by stepping, its states; arrays of (sequence, layer, token, head, ...)."""

    log_decay: Array
    key: Array
    value: Array
    query: Array | None = None

    def __post_init__(self) -> None:
        self.query = self.key if self.query is None else self.query
        shape = self.log_decay.shape
        self.tokens = shape[2]
        self.write = self.key[..., :, None] * self.value[..., None, :]
        self.state = np.zeros(self.write.shape)
        self.decayed = np.zeros(self.write.shape)
        now = np.zeros((*shape[:2], shape[3], *self.write.shape[-2:]))
        for t in range(self.tokens):
            self.decayed[:, :, t] = np.exp(self.log_decay[:, :, t])[..., None, None] * now
            now = self.decayed[:, :, t] + self.write[:, :, t]
            self.state[:, :, t] = now

    def surviving(self, t: int) -> Array:
        """What is left at ``t`` of every write up to it, (sequence, layer, token, head, key, value)."""
        after = np.cumsum(self.log_decay[:, :, t:0:-1], axis=2)[:, :, ::-1]
        kept = np.exp(np.concatenate([after, np.zeros_like(self.log_decay[:, :, :1])], axis=2))
        return kept[..., None, None] * self.write[:, :, : t + 1]

    def parts(self, t: int) -> Array:
        """What the query of ``t`` reads of every write up to it, (sequence, layer, token, head, value)."""
        return (self.query[:, :, t, None, :, :, None] * self.surviving(t)).sum(-2)

    def steps(self) -> dict[str, Array]:
        """Variables of ``/steps`` with one entry a token."""
        old, write = norm(self.decayed), norm(self.write)
        with np.errstate(invalid="ignore", divide="ignore"):
            overlap = np.where(old * write > 0, (self.decayed * self.write).sum((-2, -1)) / (old * write), 0)
        return {
            "log_decay": self.log_decay,
            "write_norm": write,
            "state_norm": norm(self.state),
            "state_mean": self.state.mean((-2, -1)),
            "write_overlap": overlap,
        }


def norm(x: Array) -> Array:
    """Frobenius norm of states."""
    return np.sqrt((x**2).sum((-2, -1)))


def random_truth(tokens: int, seed: int = 0, strength: float = 0.1) -> Truth:
    """Draw decays of all speeds, keys and values."""
    rng = np.random.default_rng(seed)
    shape = (SEQUENCES, len(LAYERS), tokens, len(HEADS))
    speed = 10.0 ** np.array([-2, 0, 1])
    return Truth(
        -strength * speed * rng.exponential(size=shape),
        rng.normal(size=(*shape, KEY)),
        rng.normal(size=(*shape, VALUE)),
        rng.normal(size=(*shape, KEY)),
    )


def probed(truth: Truth, p: int) -> dict[str, Array]:
    """Variables of ``/probes`` at one probe reaching to the start, in full; ``before`` left out."""
    left, parts, state = truth.surviving(p), truth.parts(p), truth.state[:, :, p]
    output, value = parts.sum(2), truth.value[:, :, : p + 1]
    size = np.linalg.norm(output, axis=-1)
    return {
        "contribution": norm(left),
        "share": (left * state[:, :, None]).sum((-2, -1)) / norm(state)[:, :, None] ** 2,
        "attention": (parts * value).sum(-1) / (value**2).sum(-1),
        "output_contribution": np.linalg.norm(parts, axis=-1),
        "output_share": (parts * output[:, :, None]).sum(-1) / size[:, :, None] ** 2,
        "output_norm": size,
    }


def thinned(steps: dict[str, Array], window: int) -> dict[str, Array]:
    """Thin as the tracer does; see ``statescope.watch.thin``."""
    tokens = steps["log_decay"].shape[2]
    starts = np.arange(0, tokens, window)
    last = np.minimum(starts + window, tokens) - 1
    energy = steps["write_norm"] ** 2
    total = np.add.reduceat(energy, starts, axis=2)
    return {
        "log_decay": np.add.reduceat(steps["log_decay"], starts, axis=2),
        "write_norm": np.sqrt(total),
        "state_norm": steps["state_norm"][:, :, last],
        "state_mean": steps["state_mean"][:, :, last],
        "write_overlap": np.add.reduceat(energy * steps["write_overlap"], starts, axis=2) / total,
        "state_norm_max": np.maximum.reduceat(steps["state_norm"], starts, axis=2),
    }


def make_record(
    truth: Truth,
    *,
    window: int = 1,
    snapshots: tuple[int, ...] = (),
    probes: tuple[int, ...] = (),
    reach: int | None = None,
    train_length: int | None = None,
    loss: Array | None = None,
    committed: int | None = None,
    chunks: Any = None,
    store: Any = None,
    shard: int = 16,
    steps: dict[str, Array] | None = None,
) -> xr.DataTree:
    """Write a record and open it."""
    sequences, layers, tokens, heads = truth.log_decay.shape
    key, value = truth.write.shape[-2:]
    layout = Layout(
        sequences, tokens, tuple(range(layers)), tuple(range(heads)), key, value, window, snapshots, probes,
        shard * window,
    )  # fmt: skip
    watch = Watch(layout.layers, layout.heads, snapshots, probes, reach or tokens, window)
    attributes: dict[str, Any] = {
        **dict.fromkeys(ROOT_ATTRIBUTES, "x"),
        "schema_version": 1,
        "tokens": tokens,
        "watch": watch.to_json(),
        "train_length": train_length,
        "state_shape": [key, value],
    }
    store = MemoryStore() if store is None else store
    writer = RecordWriter.create(store, layout, attributes, np.zeros((sequences, tokens), np.int64))
    variables = steps or truth.steps()
    for name, values in (thinned(variables, window) if window > 1 else variables).items():
        writer.write(f"steps/{name}", values)
    if loss is not None:
        writer.write("tokens/loss", loss)
    if snapshots:
        kept = truth.state[:, :, list(snapshots)]
        writer.write("snapshots/state", kept)
    for i, p in enumerate(probes):
        first = max(0, p - (reach or tokens) + 1)
        here = {"probe": slice(i, i + 1)}
        for name, values in probed(truth, p).items():
            if name == "output_norm":
                writer.write(f"probes/{name}", values[:, :, None], **here)
                continue
            writer.write(f"probes/{name}", values[:, :, None, first:], **here, token=slice(first, p + 1))
            if name.endswith("share"):
                writer.write(f"probes/{name}_before", values[:, :, None, :first].sum(3), **here)
    writer.commit(tokens if committed is None else committed, None if committed is None else b"carry")
    return statescope.open(store, chunks=chunks)
