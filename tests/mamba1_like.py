"""A mixer called like mamba_ssm's ``Mamba``, for the models of :mod:`mamba_ssm_like`; its scan is a loop."""

from __future__ import annotations

from typing import Any

import mamba_ssm_like
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu, softplus

causal_conv1d_fn = None


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """Step through the recurrence in float64, always from an empty state."""
    step = delta.double() if delta_bias is None else delta.double() + delta_bias.double()[:, None]
    step = softplus(step) if delta_softplus else step
    state, rows = torch.zeros(*u.shape[:2], A.shape[1], dtype=torch.float64), []
    for t in range(u.shape[-1]):
        write = (step[..., t] * u[..., t].double())[..., None] * B[:, None, :, t].double()
        state = (step[..., t, None] * A.double()).exp() * state + write
        rows.append((state * C[:, None, :, t].double()).sum(-1))
    y = torch.stack(rows, -1)
    y = y if D is None else y + D.double()[:, None] * u.double()
    y = (y if z is None else y * silu(z.double())).to(u.dtype)
    return (y, state.float()) if return_last_state else y


class Mamba(nn.Module):
    """The mixer."""

    def __init__(self, d_model: int, layer_idx: int, d_state: int = 8, d_conv: int = 4) -> None:
        super().__init__()
        self.layer_idx, self.d_state, self.d_conv, self.d_inner = layer_idx, d_state, d_conv, 4 * d_model
        self.dt_rank, self.act = 4, nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.linspace(0, 2, d_state).expand(self.d_inner, -1).clone())
        self.D = nn.Parameter(torch.linspace(0.5, 1.5, self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> Any:
        """Make room for both states."""
        kind = dtype or self.conv1d.weight.dtype
        return tuple(
            torch.zeros(batch_size, self.d_inner, size, dtype=kind) for size in (self.d_conv, self.d_state)
        )

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Read a text from its start, or one more token."""
        kept = None
        if inference_params is not None:
            memory = inference_params.key_value_memory_dict
            if self.layer_idx not in memory:
                memory[self.layer_idx] = self.allocate_inference_cache(len(hidden_states), 0)
            kept = memory[self.layer_idx]
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *kept)
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, 1)
        if kept is not None:
            kept[0].copy_(pad(x, (self.d_conv - x.shape[-1], 0)))
        if causal_conv1d_fn is None:
            x = self.act(self.conv1d(x)[..., : x.shape[-1]])
        else:
            x = causal_conv1d_fn(
                x=x, weight=self.conv1d.weight[:, 0], bias=self.conv1d.bias, activation="silu"
            )
        dt, B, C = self.parameters_of(x)
        y = selective_scan_fn(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D.float(),
            z=z,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=kept is not None,
        )
        if kept is not None:
            y, last_state = y
            kept[1].copy_(last_state)
        return self.out_proj(y.transpose(1, 2))

    def parameters_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Step size, B and C, each with the time last."""
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], -1)
        return (dt @ self.dt_proj.weight.T).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)

    def step(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Read one token; the states are updated in place."""
        assert u.shape[1] == 1, "one token at a time"
        x, z = self.in_proj(u[:, 0]).chunk(2, -1)
        conv_state.copy_(torch.roll(conv_state, shifts=-1, dims=-1))
        conv_state[:, :, -1] = x
        x = self.act((conv_state * self.conv1d.weight[:, 0]).sum(-1) + self.conv1d.bias)
        dt, B, C = (t[..., 0] for t in self.parameters_of(x[..., None]))
        dt = softplus(dt + self.dt_proj.bias)
        decay = (dt[..., None] * -torch.exp(self.A_log)).exp()
        ssm_state.copy_(ssm_state * decay + (dt * x)[..., None] * B[:, None])
        y = ((ssm_state * C[:, None]).sum(-1) + self.D * x) * self.act(z)
        return self.out_proj(y)[:, None]


mamba_ssm_like.LAYERS["Mamba1"] = Mamba
