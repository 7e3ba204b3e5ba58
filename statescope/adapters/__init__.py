"""One adapter per scan signature: a model's own scan call becomes a Recurrence, and back.

An adapter knows the *name* of a function that modeling code calls and nothing about models; so an
architecture is supported as soon as its modeling module calls a function of a known signature.
"""

from statescope.adapters.gated_delta import CHUNK_RULE, RECURRENT_RULE
from statescope.adapters.interface import Adapter, Call
from statescope.adapters.kda import CHUNK_KDA, RECURRENT_KDA
from statescope.adapters.lightning import LIGHTNING
from statescope.adapters.mamba1 import SELECTIVE_SCAN, SELECTIVE_SCAN_FN, SELECTIVE_UPDATE
from statescope.adapters.mamba2 import CHUNK_SCAN, CHUNK_SCAN_COMBINED, STATE_UPDATE
from statescope.adapters.mlstm import MLSTM
from statescope.adapters.rglru import RNN_SCAN
from statescope.adapters.rwkv4 import LINEAR_ATTENTION

_ALL = (
    CHUNK_SCAN,
    STATE_UPDATE,
    CHUNK_SCAN_COMBINED,
    SELECTIVE_SCAN,
    SELECTIVE_UPDATE,
    SELECTIVE_SCAN_FN,
    CHUNK_RULE,
    RECURRENT_RULE,
    CHUNK_KDA,
    RECURRENT_KDA,
    LINEAR_ATTENTION,
    RNN_SCAN,
    LIGHTNING,
    MLSTM,
)

ADAPTERS: dict[str, Adapter] = {adapter.name: adapter for adapter in _ALL}
"""Adapters by the name of what they read: a function, or class and method."""

__all__ = ["ADAPTERS", "Adapter", "Call"]
