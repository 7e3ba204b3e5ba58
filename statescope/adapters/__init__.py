"""One adapter per scan signature: a model's own scan call becomes a Recurrence, and back.

An adapter knows the *name* of a function that modeling code calls and nothing about models; so an
architecture is supported as soon as its modeling module calls a function of a known signature.
"""

from statescope.adapters.gated_delta import (
    CHUNK_DELTA,
    CHUNK_GATED,
    CHUNK_KDA_OF_FLA,
    CHUNK_RULE,
    RECURRENT_DELTA,
    RECURRENT_GATED,
    RECURRENT_KDA_OF_FLA,
    RECURRENT_RULE,
)
from statescope.adapters.gla import CHUNK_GLA, RECURRENT_GLA
from statescope.adapters.interface import Adapter, Call
from statescope.adapters.kda import CHUNK_KDA, RECURRENT_KDA
from statescope.adapters.lightning import LIGHTNING
from statescope.adapters.mamba1 import SELECTIVE_SCAN, SELECTIVE_SCAN_FN, SELECTIVE_UPDATE
from statescope.adapters.mamba2 import CHUNK_SCAN, CHUNK_SCAN_COMBINED, STATE_UPDATE
from statescope.adapters.mamba2_of_fla import IN_KERNELS, IN_TORCH
from statescope.adapters.mamba3 import MIMO, SISO
from statescope.adapters.mlstm import MLSTM
from statescope.adapters.retention import (
    CHUNK_RETENTION,
    FUSED_RETENTION,
    PARALLEL_RETENTION,
    RECURRENT_RETENTION,
)
from statescope.adapters.rglru import RNN_SCAN
from statescope.adapters.rwkv4 import LINEAR_ATTENTION
from statescope.adapters.rwkv6 import CHUNK_RWKV6, RECURRENT_RWKV6
from statescope.adapters.rwkv7 import CHUNK_RWKV7, RECURRENT_RWKV7

_ALL = (
    CHUNK_SCAN,
    STATE_UPDATE,
    CHUNK_SCAN_COMBINED,
    SELECTIVE_SCAN,
    SELECTIVE_UPDATE,
    SELECTIVE_SCAN_FN,
    SISO,
    MIMO,
    CHUNK_RULE,
    RECURRENT_RULE,
    CHUNK_KDA,
    RECURRENT_KDA,
    LINEAR_ATTENTION,
    RNN_SCAN,
    LIGHTNING,
    MLSTM,
    CHUNK_GLA,
    RECURRENT_GLA,
    CHUNK_RETENTION,
    FUSED_RETENTION,
    RECURRENT_RETENTION,
    PARALLEL_RETENTION,
    CHUNK_DELTA,
    RECURRENT_DELTA,
    CHUNK_GATED,
    RECURRENT_GATED,
    CHUNK_KDA_OF_FLA,
    RECURRENT_KDA_OF_FLA,
    CHUNK_RWKV6,
    RECURRENT_RWKV6,
    CHUNK_RWKV7,
    RECURRENT_RWKV7,
    IN_TORCH,
    IN_KERNELS,
)

ADAPTERS: dict[str, Adapter] = {adapter.name: adapter for adapter in _ALL}
"""Adapters by the name of what they read: a function, or class and method."""

__all__ = ["ADAPTERS", "Adapter", "Call"]
