"""A trace with nothing left open: what is read, how it is cut, what it is called."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from statescope.anatomy import Anatomy
from statescope.layout import Layout, shard_tokens
from statescope.live import digest, settings_of
from statescope.reader import Edit, predicts_next_token
from statescope.schema import SCHEMA_VERSION
from statescope.watch import Watch


@dataclass(frozen=True)
class Plan:
    """A trace with nothing left open.

    ``lengths`` are those of texts that are read together, in one forward pass, the shorter ones padded on the
    right; None where all sequences are of one length.
    """

    model: nn.Module
    model_id: str
    ids: Tensor
    watch: Watch
    anatomy: Anatomy
    own_outputs: bool
    edit: Edit | None
    segment: int
    train_length: int | None
    lengths: tuple[int, ...] | None = None

    @property
    def layout(self) -> Layout:
        """The shape of the record."""
        sequences, tokens = self.ids.shape
        row = 4 * sequences * len(self.watch.layers) * len(self.watch.heads)
        return Layout(
            sequences=sequences,
            tokens=tokens,
            layers=self.watch.layers,
            heads=self.watch.heads,
            key=self.anatomy.key,
            value=self.anatomy.value,
            window=self.watch.window,
            snapshots=self.watch.snapshots,
            probes=self.watch.probes,
            shard=min(shard_tokens(row, self.segment), -(-tokens // self.watch.window) * self.watch.window),
            erases=self.anatomy.structure.endswith("delta rule"),
        )

    def stop_after(self, start: int) -> int:
        """End of the segment that begins at ``start``; never one token after others.

        transformers reads a single token with a function of its own, which leaves out the limits on the
        step size that some families have.
        """
        tokens = self.ids.shape[1]
        stop = min(start + self.segment, tokens)
        return tokens if stop == tokens - 1 else stop

    def commit_after(self, start: int) -> int:
        """End of the interval that begins at ``start`` and is committed as one."""
        stop = self.stop_after(start)
        while stop < self.ids.shape[1] and stop % self.layout.shard:
            stop = self.stop_after(stop)
        return stop

    def tokens_to_read_ahead(self) -> int:
        """How far a probe's reach asks for states to be known before the trace; 0 if it does not."""
        watch, segment = self.watch, self.segment
        crossing = [p for p in watch.probes if watch.probe_start(p) < p // segment * segment]
        return (max(watch.probes) + 1) if crossing else 0

    def attributes(self) -> dict[str, Any]:
        """Root attributes of the record."""
        config: Any = self.model.config
        train_length = self.train_length or getattr(config, "train_length", None)
        return {
            "schema_version": SCHEMA_VERSION,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "statescope_version": _version("statescope-ssm"),
            "model_id": self.model_id,
            "model_type": str(getattr(config, "model_type", type(self.model).__module__.split(".")[0])),
            "train_length": train_length,
            "predicts_next_token": predicts_next_token(self.model),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "device": str(next(self.model.parameters()).device),
            "backend": self.anatomy.backend,
            "outputs": "model" if self.own_outputs else "statescope",
            "edit": _name_of(self.edit),
            "segment": self.segment,
            "versions": versions(),
            "watch": self.watch.to_json(),
            "tokens": self.ids.shape[1],
            "state_shape": [self.anatomy.key, self.anatomy.value],
            "structure": self.anatomy.structure,
            "first_nonfinite": None,
        }

    def fingerprint(self) -> Callable[[], str]:
        """Begin to hash all that decides the numbers of a record, and return what ends it."""
        of_weights = digest(self.model)
        return lambda: self._fingerprint(of_weights())

    def _fingerprint(self, of_weights: str) -> str:
        hashed = hashlib.sha256(self.ids.numpy().tobytes())
        hashed.update(of_weights.encode())
        settings = [
            asdict(self.watch), self.anatomy, self.own_outputs, _name_of(self.edit), self.segment,
            tuple(self.ids.shape), settings_of(self.model),
            [self.layout.variables(group) for group in self.layout.groups()],
        ]  # fmt: skip
        hashed.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return hashed.hexdigest()


def _name_of(function: Any) -> str | None:
    if function is None:
        return None
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


@functools.cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "mamba-ssm", "numpy", "zarr", "zarrs", "xarray"):
        if (known := _version(name)) is not None:
            found[name] = known
    return found
