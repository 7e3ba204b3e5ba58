"""What is asked of the workers, as it travels to them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from statescope.batch.inputs import Content


@dataclass(frozen=True)
class Settings:
    """How texts are read: the arguments of :func:`statescope.trace`, as JSON can hold them.

    ``alone`` reads every text by itself: bit for bit what one call of ``trace`` gives, and slower.
    """

    model: str
    tokenizer: str | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    snapshots: tuple[int, ...] | None = None
    probes: tuple[int, ...] | None = None
    reach: int | None = None
    window: int = 1
    segment: int | None = None
    backend: str = "auto"
    device: str | None = None
    dtype: str | None = None
    train_length: int | None = None
    alone: bool = False

    def digest(self) -> str:
        """Hash of what decides the numbers, for every record."""
        return hashlib.sha256(json.dumps(self.written(), sort_keys=True).encode()).hexdigest()

    def written(self) -> dict[str, Any]:
        """What decides the numbers, for the manifest: all but the device."""
        return {k: v for k, v in asdict(self).items() if k != "device"}


@dataclass(frozen=True)
class Text:
    """One piece of work."""

    id: str
    sha256: str
    place: str
    content: Content


@dataclass(frozen=True)
class Facts:
    """What the parent learns from a worker before it hands out texts."""

    segment: int
    weights: str
    device: str
