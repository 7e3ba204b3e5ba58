"""A small model called like mamba_ssm's ``MambaLMHeadModel``; its scan is a loop in float64.

It has the call structure that the project relies on (the names and arguments of the module's functions,
the inference cache, reading on by single tokens) and mamba_ssm's limits: with ``seqlen_offset`` 0 a mixer
reads as if nothing came before and overwrites both states, with another it reads one token.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu, softplus

causal_conv1d_fn = None


@dataclass
class InferenceParams:
    """What a text's forward passes share."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Any = None


@dataclass
class MambaConfig:
    """Settings of a model."""

    d_model: int = 32
    n_layer: int = 3
    vocab_size: int = 64
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """Step through the recurrence in float64; outputs in the dtype of x, the state in float32."""
    assert cu_seqlens is None and not return_varlen_states
    batch, time, heads, size = x.shape
    step = dt.double() if dt_bias is None else dt.double() + dt_bias.double()
    step = (softplus(step) if dt_softplus else step).clamp(*dt_limit)
    keys, queries = (t.double().repeat_interleave(heads // B.shape[2], 2) for t in (B, C))
    state = torch.zeros(batch, heads, size, B.shape[3], dtype=torch.float64)
    if initial_states is not None:
        state = initial_states.double()
    same = torch.ones(batch, time, dtype=torch.bool)
    if seq_idx is not None:
        same[:, 1:] = seq_idx[:, 1:] == seq_idx[:, :-1]  # else another text begins, with an empty state
    rows = []
    for t in range(time):
        decay = same[:, t, None, None, None] * (step[:, t] * A.double()).exp()[..., None, None]
        write = step[:, t, :, None, None] * x[:, t, :, :, None].double() * keys[:, t, :, None]
        state = decay * state + write
        rows.append((state * queries[:, t, :, None]).sum(-1))
    y = torch.stack(rows, 1)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).double() * x.double()
    y = y if z is None else y * silu(z.double())
    return (y.to(x.dtype), state.float()) if return_final_states else y.to(x.dtype)


def mamba_split_conv1d_scan_combined(*_: Any, **__: Any) -> Any:
    """All of a mixer in one kernel, in which nothing can be seen."""
    raise NotImplementedError("this needs a GPU")


class Mamba2(nn.Module):
    """The mixer."""

    def __init__(
        self,
        d_model: int,
        layer_idx: int,
        d_state: int = 8,
        d_conv: int = 4,
        headdim: int = 16,
        ngroups: int = 2,
        rmsnorm: bool = True,
        D_has_hdim: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
    ) -> None:
        super().__init__()
        self.layer_idx, self.d_state, self.d_conv, self.headdim = layer_idx, d_state, d_conv, headdim
        self.ngroups, self.rmsnorm, self.D_has_hdim, self.dt_limit = ngroups, rmsnorm, D_has_hdim, dt_limit
        self.d_inner, self.use_mem_eff_path = 2 * d_model, True
        self.nheads, width = self.d_inner // headdim, self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + width + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(torch.linspace(-4, 0, self.nheads))
        self.A_log = nn.Parameter(torch.linspace(0, 2.5, self.nheads))
        self.D = nn.Parameter(torch.linspace(0.5, 1.5, self.d_inner if D_has_hdim else self.nheads))
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> Any:
        """Make room for both states."""
        dtype, width = dtype or self.in_proj.weight.dtype, self.conv1d.weight.shape[0]
        conv_state = torch.zeros(batch_size, self.d_conv, width, dtype=dtype).transpose(1, 2)
        return conv_state, torch.zeros(batch_size, self.nheads, self.headdim, self.d_state, dtype=dtype)

    def forward(self, u: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """Read a text from its start, or one more token."""
        kept = None
        if inference_params is not None:
            memory = inference_params.key_value_memory_dict
            if self.layer_idx not in memory:
                memory[self.layer_idx] = self.allocate_inference_cache(len(u), inference_params.max_seqlen)
            kept = memory[self.layer_idx]
            if inference_params.seqlen_offset > 0:
                return self.step(u, *kept)
        if self.use_mem_eff_path and inference_params is None:
            return mamba_split_conv1d_scan_combined(self.in_proj(u))
        z, xBC, dt = self.split(self.in_proj(u))
        if kept is not None:
            kept[0].copy_(pad(xBC.transpose(1, 2), (self.d_conv - xBC.shape[1], 0)))
        if causal_conv1d_fn is None:
            xBC = silu(self.conv1d(xBC.transpose(1, 2)).transpose(1, 2)[:, : -(self.d_conv - 1)])
        else:
            weight = self.conv1d.weight[:, 0]
            xBC = causal_conv1d_fn(
                xBC.transpose(1, 2), weight, bias=self.conv1d.bias, activation="silu", seq_idx=None
            ).transpose(1, 2)
        y = self.scan(xBC, dt, z, return_final_states=kept is not None)
        if kept is not None:
            y, last_state = y
            kept[1].copy_(last_state)
        return self.finish(y, z)

    def step(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Read one token; the states are updated in place."""
        assert u.shape[1] == 1, "one token at a time"
        z, xBC, dt = self.split(self.in_proj(u))
        conv_state.copy_(torch.roll(conv_state, shifts=-1, dims=-1))
        conv_state[:, :, -1] = xBC[:, 0]
        xBC = silu((conv_state * self.conv1d.weight[:, 0]).sum(-1) + self.conv1d.bias)[:, None]
        y, last_state = self.scan(xBC, dt, z, return_final_states=True, initial_states=ssm_state)
        ssm_state.copy_(last_state)
        return self.finish(y, z)

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Cut the projection into gate, what is convolved, and step size."""
        return projected.split([self.d_inner, self.conv1d.weight.shape[0], self.nheads], -1)

    def scan(self, xBC: Tensor, dt: Tensor, z: Tensor, **kwargs: Any) -> Any:
        """Call the module's scan."""
        x, B, C = xBC.split([self.d_inner, self.ngroups * self.d_state, self.ngroups * self.d_state], -1)
        limit = {} if self.dt_limit == (0.0, float("inf")) else {"dt_limit": self.dt_limit}
        return mamba_chunk_scan_combined(
            x.unflatten(-1, (-1, self.headdim)),
            dt,
            -torch.exp(self.A_log.float()),
            B.unflatten(-1, (self.ngroups, -1)),
            C.unflatten(-1, (self.ngroups, -1)),
            chunk_size=16,
            D=self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D,
            z=None if self.rmsnorm else z.unflatten(-1, (-1, self.headdim)),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            seq_idx=None,
            cu_seqlens=None,
            **limit,
            **kwargs,
        )

    def finish(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate, and leave the mixer."""
        y = y.flatten(2)
        return self.out_proj(self.norm(y * silu(z)) if self.rmsnorm else y)


LAYERS: dict[str, Any] = {"Mamba2": Mamba2}
"""Mixers by the name that a configuration gives them."""


class MHA(nn.Module):
    """Attention that can only read a text from its start."""

    def __init__(self, d_model: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.in_proj, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, u: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """Attend, and keep keys and values if asked to."""
        q, k, v = self.in_proj(u).chunk(3, -1)
        if inference_params is not None:
            room = torch.empty(len(u), inference_params.max_seqlen, 2, u.shape[-1], dtype=u.dtype)
            start = inference_params.seqlen_offset
            room[:, start : start + u.shape[1]] = torch.stack([k, v], 2)
            inference_params.key_value_memory_dict[self.layer_idx] = (room, None)
        return self.out_proj(scaled_dot_product_attention(q, k, v, is_causal=True))


class Block(nn.Module):
    """Norm, mixer, and the residual beside them."""

    def __init__(self, mixer: nn.Module, d_model: int, layer_idx: int) -> None:
        super().__init__()
        self.norm, self.mixer, self.layer_idx = nn.RMSNorm(d_model), mixer, layer_idx

    def forward(self, x: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """Add what the mixer says."""
        return x + self.mixer(self.norm(x), inference_params=inference_params, **mixer_kwargs)


class MixerModel(nn.Module):
    """Embedding and layers."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        attention, size = config.attn_layer_idx, config.d_model
        settings = dict(config.ssm_cfg)
        kind = LAYERS[settings.pop("layer", "Mamba2")]
        mixers = [
            MHA(size, i) if i in attention else kind(size, i, **settings) for i in range(config.n_layer)
        ]
        self.layers = nn.ModuleList(Block(mixer, size, i) for i, mixer in enumerate(mixers))
        self.norm_f = nn.RMSNorm(size)

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """Read."""
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, inference_params=inference_params, **mixer_kwargs)
        return self.norm_f(x)


class MambaLMHeadModel(nn.Module):
    """A language model."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config, self.backbone = config, MixerModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Any = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> Any:
        """Predict every next token."""
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        hidden = hidden[:, -num_last_tokens:] if num_last_tokens else hidden
        return namedtuple("CausalLMOutput", ["logits"])(self.lm_head(hidden))
