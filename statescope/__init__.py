"""Look inside the recurrent state of a language model while it reads.

>>> import statescope
>>> trace = statescope.trace("mamba2-byte-n64-t512", "The passkey is 12345.")
>>> trace["steps"]["state_norm"]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statescope.batch.collection import open_collection
    from statescope.models import bundled, load
    from statescope.record import open
    from statescope.recurrence import Recurrence
    from statescope.tracing import trace
    from statescope.watch import Probes

_HOMES = {
    "Probes": "watch",
    "Recurrence": "recurrence",
    "bundled": "models",
    "load": "models",
    "open": "record",
    "open_collection": "batch.collection",
    "trace": "tracing",
}

__all__ = ["Probes", "Recurrence", "bundled", "load", "open", "open_collection", "trace"]


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562): ``import statescope`` alone loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'statescope' has no attribute {name!r}")
    return getattr(import_module(f"statescope.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
