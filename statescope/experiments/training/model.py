r"""Many Mamba-2 models as one: every parameter has a leading run dimension, every product is batched.

The same model as transformers' ``Mamba2ForCausalLM`` (one group, tied embeddings), which the tests hold it
against. The scan is the chunked form of :mod:`statescope.kernels.chunked`, written for differentiation, with
the state emptied where a sequence begins:

.. math::

    S_t = e^{g_t} S_{t-1} + \Delta_t B_t x_t^\top, \quad g_t = -e^{A} \Delta_t, \quad
    y_t = S_t^\top C_t + D x_t .

Letters: r run, b row, l token, c chunk, i and j tokens of a chunk, h head, p value, n key, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

EMPTIED = -60.0
"""Log decay at the first token of a sequence: what is left of the last one, e^-60, is nothing beside
anything, and sums of it in a chunk stay small enough for float32."""

TAPS = 4
"""Tokens that the convolution sees."""

EPSILON = 1e-5
"""Of the norms."""

Parameters = dict[str, Tensor]
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    vocabulary: int
    layers: int
    width: int
    state_size: int
    head_size: int

    @property
    def inner(self) -> int:
        """Width inside a layer."""
        return 2 * self.width

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return self.inner // self.head_size

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, as in transformers."""
        convolved = self.inner + 2 * self.state_size
        mixer = {
            "norm.weight": (self.width,),
            "mixer.in_proj.weight": (self.inner + convolved + self.heads, self.width),
            "mixer.conv1d.weight": (convolved, 1, TAPS),
            "mixer.conv1d.bias": (convolved,),
            "mixer.dt_bias": (self.heads,),
            "mixer.A_log": (self.heads,),
            "mixer.D": (self.heads,),
            "mixer.norm.weight": (self.inner,),
            "mixer.out_proj.weight": (self.width, self.inner),
        }
        found: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            found |= {f"backbone.layers.{layer}.{name}": size for name, size in mixer.items()}
        return found | {"backbone.norm_f.weight": (self.width,)}

    def initial(self, seed: int) -> Parameters:
        """Draw the weights of one run as mamba_ssm does, on the CPU: the same on any device."""
        generator = torch.Generator().manual_seed(seed)

        def between(size: tuple[int, ...], bound: float) -> Tensor:
            return torch.empty(size).uniform_(-bound, bound, generator=generator)

        found: Parameters = {}
        for name, size in self.parameters().items():
            if name.endswith("embeddings.weight"):
                found[name] = torch.empty(size).normal_(std=0.02, generator=generator)
            elif name.endswith("in_proj.weight"):
                found[name] = between(size, size[-1] ** -0.5)
            elif name.endswith("out_proj.weight"):
                found[name] = between(size, size[-1] ** -0.5) / math.sqrt(self.layers)
            elif "conv1d" in name:
                found[name] = between(size, TAPS**-0.5)
            elif name.endswith("A_log"):
                found[name] = torch.empty(size).uniform_(1, 16, generator=generator).log()
            elif name.endswith("dt_bias"):
                step = (between(size, 0.5) + 0.5) * math.log(100) + math.log(1e-3)  # 0.001 to 0.1
                found[name] = step.exp() + torch.log(-torch.expm1(-step.exp()))  # the inverse of softplus
            else:
                found[name] = torch.ones(size)
        return found


def read(
    p: Parameters,
    shape: Shape,
    ids: Tensor,
    position: Tensor,
    chunk: int,
    dtype: torch.dtype,
    scan: Scan | None = None,
) -> Tensor:
    """Run the models over rows of tokens.

    Parameters
    ----------
    p : dict of Tensor
        Parameters, each (run, ...).
    shape : Shape
        Their sizes.
    ids : Tensor of int64, (run, row, token)
        What each run reads; a whole number of chunks.
    position : Tensor of int64, (run, row, token)
        Tokens since the beginning of the sequence; at 0 state and convolution are empty.
    chunk : int
        Tokens of one matrix product.
    dtype : torch.dtype
        Of the matrix products; norms, decays and what runs beside the layers are float32.
    scan : callable, optional
        What reads the states. Default: :func:`scan_in_torch`.

    Returns
    -------
    Tensor, (run, row, token, width)
        What the head reads, in ``dtype``.
    """
    table = p["backbone.embeddings.weight"]
    offset = torch.arange(len(ids), device=ids.device)[:, None, None] * shape.vocabulary
    x = torch.nn.functional.embedding(ids + offset, table.flatten(0, 1))
    for layer in range(shape.layers):
        own = {
            name.split(".", 3)[3]: w for name, w in p.items() if name.startswith(f"backbone.layers.{layer}.")
        }
        u = rms_norm(x, own["norm.weight"], dtype)
        x = x + mixer(own, shape, u, position, chunk, dtype, scan or scan_in_torch)
    return rms_norm(x, p["backbone.norm_f.weight"], dtype)


def rms_norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Norm over the last dimension in float32; one weight a run."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)
    return (x * weight[:, None, None]).to(dtype)


def mixer(
    p: Parameters, shape: Shape, u: Tensor, position: Tensor, chunk: int, dtype: torch.dtype, scan: Scan
) -> Tensor:
    """One layer, (run, row, token, width) to the same."""
    inner, keys, heads = shape.inner, shape.state_size, shape.heads
    projected = _project(u, p["mixer.in_proj.weight"], dtype)
    z, xBC, dt = projected.split([inner, inner + 2 * keys, heads], -1)
    xBC = convolve(xBC, p["mixer.conv1d.weight"][:, :, 0], p["mixer.conv1d.bias"], position)
    x, B, C = xBC.split([inner, keys, keys], -1)
    dt = softplus(dt.float() + p["mixer.dt_bias"][:, None, None])
    x = x.unflatten(-1, (heads, -1))
    y = scan(x, dt, p["mixer.A_log"].exp(), B, C, position, chunk)
    y = y.float() + p["mixer.D"][:, None, None, :, None] * x
    gated = y.flatten(-2) * silu(z.float())
    return _project(rms_norm(gated, p["mixer.norm.weight"], dtype), p["mixer.out_proj.weight"], dtype)


def _project(u: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.bmm(u.flatten(1, 2), weight.to(dtype).mT).unflatten(1, u.shape[1:3])


def convolve(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """Causal convolution along tokens, channel by channel, from the beginning of each sequence; then SiLU.

    ``weight`` is (run, channel, tap), the last tap the token itself.
    """
    total = bias[:, None, None] + weight[:, None, None, :, -1] * x
    for back in range(1, TAPS):
        earlier = pad(x, (0, 0, back, 0))[:, :, : x.shape[2]]
        seen = (position >= back)[..., None]
        total = total + torch.where(seen, weight[:, None, None, :, -1 - back] * earlier, 0.0)
    return silu(total).to(x.dtype)


def scan_in_torch(
    x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, position: Tensor, chunk: int
) -> Tensor:
    """Read ``y_t = S_t^T C_t`` of states that decay by ``rate * dt``, emptied where ``position`` is 0.

    ``rate`` is (run, head); all else as :func:`scan` takes it, and :func:`read`.
    """
    decay = torch.where(position[..., None] == 0, EMPTIED, -rate[:, None, None] * dt)
    return scan(x, dt, decay, B, C, chunk)


def scan(x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """Read ``y_t = S_t^T C_t`` in chunks.

    Parameters
    ----------
    x : Tensor, (run, row, token, head, value)
        What is written.
    dt, log_decay : Tensor of float32, (run, row, token, head)
        Scale of the write, and decay before it.
    B, C : Tensor, (run, row, token, key)
        Where it is written, and what is read.
    chunk : int
        Tokens of one matrix product.

    Returns
    -------
    Tensor, as x
    """
    rows, dtype = x.shape[:2], x.dtype
    chunks = x.shape[2] // chunk

    def cut(a: Tensor) -> Tensor:
        return a.reshape(-1, chunk, *a.shape[3:])  # (r b c) i ...

    run = cut(log_decay).cumsum(1)
    B, C, values = cut(B), cut(C), cut(x) * cut(dt)[..., None]
    by_head = run.transpose(1, 2)
    difference = by_head[..., :, None] - by_head[..., None, :]  # (r b c) h i j
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decays = difference.masked_fill(future, -torch.inf).exp()
    weights = (torch.bmm(C, B.mT)[:, None] * decays).to(dtype)
    y = (weights @ values.to(dtype).transpose(1, 2)).transpose(1, 2)
    if chunks > 1:
        remaining = (run[:, -1:] - run).exp()[..., None]
        local = torch.bmm(B.mT, (values * remaining).to(dtype).flatten(2))  # (r b c) n (h p)
        entering = _pass_states(local, run[:, -1].unflatten(0, (-1, chunks)))
        y = y + torch.bmm(C, entering).unflatten(-1, values.shape[2:]) * run.exp()[..., None]
    return y.reshape(*rows, -1, *y.shape[2:])


def _pass_states(local: Tensor, total: Tensor) -> Tensor:
    """State entering every chunk, from what each wrote and its whole log decay, (row, chunk, head)."""
    chunks, heads = total.shape[1:]
    run = total.cumsum(1).transpose(1, 2)  # row h c
    before = pad(run, (1, -1))
    past = torch.ones(chunks, chunks, dtype=torch.bool, device=total.device).tril(-1)
    difference = before[..., :, None] - run[..., None, :]
    decays = difference.masked_fill(~past, -torch.inf).exp().to(local.dtype)  # row h c z
    wrote = local.unflatten(0, (-1, chunks)).unflatten(-1, (heads, -1))  # row z n h p
    wrote = wrote.permute(0, 3, 1, 2, 4).flatten(3)  # row h z (n p)
    states = (decays @ wrote).unflatten(-1, (local.shape[1], -1))  # row h c n p
    return states.permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 1)
