"""A mixer called like mamba_ssm's ``Mamba3``; its scan is a loop in float64, with complex numbers.

The loop computes what the documentation of ``mamba3_siso_combined`` says, of inputs rounded as there.
"""

from __future__ import annotations

import math
from typing import Any

import mamba_ssm_like
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu, softplus

States = tuple[Tensor, ...]


def mamba3_siso_combined(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None = None,
    Z: Tensor | None = None,
    Input_States: States | None = None,
    chunk_size: int = 64,
    return_final_states: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Round what a token brings to bfloat16, and step."""
    assert cu_seqlens is None
    rounded = [x.bfloat16() for x in (Q, K, V, Trap, Angles)]
    q, k, v, trap, angles = rounded
    gate = None if Z is None else Z.bfloat16()
    y, _, states = stepped(q, k, v, ADT, DT, trap, Q_bias, K_bias, angles, D, gate, Input_States, rough=True)
    angle, state, key, _ = states
    angle = angle.bfloat16() if V.shape[1] > 1 else angle.float()  # single tokens have another kernel
    last = (angle, state.float(), key.float(), V[:, -1].bfloat16())
    return (y.bfloat16(), *last) if return_final_states else y.bfloat16()


def stepped(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None,
    Z: Tensor | None,
    states: States | None,
    rough: bool = False,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], States]:
    """Outputs, what is left of the state and added to it at every token, and the last states.

    ``rough`` turns by angles in bfloat16, as mamba_ssm's kernels do.
    """
    time, heads = V.shape[1:3]
    q, k = (
        x.double().repeat_interleave(heads // x.shape[2], 2) + bias.double()
        for x, bias in ((Q, Q_bias), (K, K_bias))
    )
    v, decay, step, share = V.double(), ADT.double().exp(), DT.double(), Trap.double().sigmoid()
    if states is None:
        states = (
            v.new_zeros(Angles[:, 0].shape),
            (v[:, 0, ..., None] * k[:, 0, :, None]) * 0,
            k[:, 0] * 0,
            v[:, 0],
        )
    angle, state, last_k, last_v = (x.double() for x in states)
    ys, parts = [], []
    for t in range(time):
        angle = (angle + Angles[:, t].double().tanh() * math.pi * step[:, :, t, None]) % (2 * math.pi)
        turn = angle.float().bfloat16().double() if rough else angle
        key, query = turned(k[:, t], turn), turned(q[:, t], turn)
        kept, new, alpha = (
            decay[:, :, t],
            step[:, :, t] * share[:, :, t],
            (1 - share[:, :, t]) * step[:, :, t],
        )
        decayed = kept[..., None, None] * state
        added = (kept * alpha)[..., None, None] * last_v[..., None] * last_k[:, :, None]
        added = added + new[..., None, None] * v[:, t, :, :, None] * key[:, :, None]
        state, last_k, last_v = decayed + added, key, v[:, t]
        parts.append((decayed.transpose(-2, -1), added.transpose(-2, -1)))
        ys.append((state * query[:, :, None]).sum(-1))
    y = torch.stack(ys, 1)
    y = y if D is None else y + D.double()[:, None] * v
    y = y if Z is None else y * silu(Z.double())
    return y, parts, (angle, state, last_k, last_v)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Turn pairs of neighbours as complex numbers; those without an angle stay."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angle = pad(angle, (0, pairs.shape[-1] - angle.shape[-1]))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


class Mamba3(nn.Module):
    """The mixer."""

    def __init__(
        self,
        d_model: int,
        layer_idx: int,
        d_state: int = 8,
        headdim: int = 16,
        ngroups: int = 2,
        is_outproj_norm: bool = False,
    ) -> None:
        super().__init__()
        self.layer_idx, self.d_state, self.headdim, self.ngroups = layer_idx, d_state, headdim, ngroups
        self.d_inner, self.angles = 2 * d_model, d_state // 4
        self.nheads = self.d_inner // headdim
        self.sizes = [self.d_inner] * 2 + [ngroups * d_state] * 2 + [self.nheads] * 3 + [self.angles]
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.dt_bias = nn.Parameter(torch.linspace(-4, 0, self.nheads))
        self.B_bias = nn.Parameter(torch.ones(self.nheads, 1, d_state))
        self.C_bias = nn.Parameter(torch.ones(self.nheads, 1, d_state))
        self.B_norm, self.C_norm = nn.RMSNorm(d_state), nn.RMSNorm(d_state)
        self.D = nn.Parameter(torch.linspace(0.5, 1.5, self.nheads))
        self.norm = nn.RMSNorm(self.d_inner) if is_outproj_norm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int) -> States:
        """Make room for the states."""
        dtype, heads = self.in_proj.weight.dtype, (batch_size, self.nheads)
        return (
            torch.zeros(*heads, self.angles),
            torch.zeros(*heads, self.headdim, self.d_state),
            torch.zeros(batch_size, 1, self.nheads, self.d_state, dtype=dtype),
            torch.zeros(*heads, self.headdim, dtype=dtype),
        )

    def forward(self, u: Tensor, inference_params: Any = None) -> Tensor:
        """Read a text from its start, or one more token."""
        kept, entering = None, None
        if inference_params is not None:
            memory = inference_params.key_value_memory_dict
            if self.layer_idx not in memory:
                memory[self.layer_idx] = self.allocate_inference_cache(len(u), inference_params.max_seqlen)
            kept = memory[self.layer_idx]
            if inference_params.seqlen_offset > 0:
                assert u.shape[1] == 1, "one token at a time"
                entering = (*kept[:2], kept[2][:, 0], kept[3])
        z, x, B, C, dt, A, trap, angles = self.in_proj(u).split(self.sizes, -1)
        step = softplus(dt + self.dt_bias)
        z, x = z.unflatten(-1, (-1, self.headdim)), x.unflatten(-1, (-1, self.headdim))
        B, C = B.unflatten(-1, (self.ngroups, -1)), C.unflatten(-1, (self.ngroups, -1))
        y = mamba3_siso_combined(
            Q=self.C_norm(C),
            K=self.B_norm(B),
            V=x,
            ADT=(-softplus(A.float()).clamp(min=1e-4) * step).transpose(1, 2),
            DT=step.transpose(1, 2),
            Trap=trap.transpose(1, 2),
            Q_bias=self.C_bias[:, 0],
            K_bias=self.B_bias[:, 0],
            Angles=angles[:, :, None].expand(-1, -1, self.nheads, -1).float(),
            D=self.D,
            Z=z if self.norm is None else None,
            chunk_size=16,
            Input_States=entering,
            return_final_states=kept is not None,
            cu_seqlens=None,
        )
        if kept is not None:
            y, angle, state, key, value = y
            for place, new in zip(kept, (angle, state, key[:, None], value), strict=True):
                place.copy_(new)
        y = y.to(u.dtype).flatten(2)
        return self.out_proj(y if self.norm is None else self.norm(y * silu(z.flatten(2))))


mamba_ssm_like.LAYERS["Mamba3"] = Mamba3
