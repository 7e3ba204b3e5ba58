"""mamba_ssm's own models, read in segments of any length.

mamba_ssm goes on from a state one token at a time. With ``seqlen_offset`` 0 its mixers read any number
of tokens, but as if nothing came before: the convolution pads with zeros, the scan starts from zero, and
the final states overwrite the former ones. What is missing is supplied from outside, while a capture is
active (:mod:`statescope.capture`): the inputs before the segment to the convolution, the state to the scan.
Mamba-3 has no convolution, and four states that its scan is given (:mod:`statescope.adapters.mamba3`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Entering:
    """What a mixer goes on from.

    Attributes
    ----------
    states : tuple of Tensor
        What the mixer kept: the last inputs of the convolution, (batch, channel, d_conv), and the recurrent
        state, (batch, heads, head_dim, d_state), float32; of Mamba-3 angle, state, key and value.
    kept : tuple of Tensor
        Where the mixer keeps the same for the next segment.
    """

    states: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]

    @property
    def context(self) -> int:
        """Inputs from before the segment that the convolution reads."""
        return self.states[0].shape[-1] - 1

    def extend(self, x: Tensor) -> Tensor:
        """Put the inputs before a segment in front of it, (batch, channel, time), and keep the last of both.

        The time axis stays where it was in memory, so that the convolution takes the path it always takes
        and finds its data aligned.
        """
        before = self.states[0][..., 1:].to(x.dtype)
        if x.stride(1) == 1:
            joined = torch.cat([before.transpose(1, 2), x.transpose(1, 2)], 1).transpose(1, 2)
        else:
            joined = torch.cat([before, x], -1)
        # The mixer has kept the segment alone, with zeros before it where it is shorter than this.
        self.kept[0].copy_(joined[..., -self.kept[0].shape[-1] :])
        return joined


@dataclass(eq=False)
class InferenceCache:
    """What mamba_ssm's modules read of an ``InferenceParams``, kept from segment to segment.

    States are float32: the scan ends in float32, and rounding to the model's dtype wherever a segment
    happens to end would make the numbers depend on where that is.

    Attributes
    ----------
    key_value_memory_dict : dict of int to tuple of Tensor
        By layer, what its mixer keeps; see :class:`Entering`.
    max_seqlen : int
        Tokens for which attention layers make room.
    seqlen_offset, batch_size_offset, lengths_per_sample
        Always as at the start of a text.
    """

    key_value_memory_dict: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    max_seqlen: int = 1
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    lengths_per_sample: None = None

    def enter(self, layer: int, mixer: nn.Module, batch: int) -> Entering | None:
        """Make room for what the mixer will keep; return what it kept last, None at the start of a text."""
        former = self.key_value_memory_dict.get(layer)
        if former is None:
            allocate: Any = mixer.allocate_inference_cache
            first, *others = allocate(batch, self.max_seqlen)
            self.key_value_memory_dict[layer] = (first, *(x.float() for x in others))
            return None
        kept = tuple(torch.empty_like(x) for x in former)
        self.key_value_memory_dict[layer] = kept
        return Entering(former, kept)
