r"""Decay per key between the tokens of a chunk, in factors that do not overflow (torch).

With :math:`G_t` the running sum of the log decay, a vector with one entry per key, what a row :math:`c_t`
reads of an earlier write is not one weight times one product,

.. math:: A_{tj} = \sum_k e^{G_{tk} - G_{jk}}\, c_{tk} k_{jk} ,

but for tokens on both sides of a boundary :math:`m` it is the product of :math:`c_t e^{G_t - G_m}` and
:math:`k_j e^{G_m - G_j}`, whose exponents are never positive. So a chunk is halved, its two parts are
related by one product, and each part is halved again, until what the tokens of a part forget fits a
number's range whole: from there one product, about the part's middle, does for all that is left. Weak
decay needs no halving; any decay is served, and nothing overflows.

Source: the secondary chunks of *Gated Linear Attention Transformers* (arXiv 2312.06635), section 4.3, halved
instead of cut evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANGE = 40.0
"""Most nat that a part forgets, which is then one product: squares of its factors stay below e^40."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Parts of all chunks alike in size: two halves of which the late one reads the early one, or whole."""

    size: int
    halves: bool
    late: Tensor  # e^{G_t - G_m}, (... part token key)
    early: Tensor  # e^{G_m - G_j}

    def reading(self, x: Tensor) -> Tensor:
        """The tokens of (... i x) that read."""
        return x.unflatten(-2, (-1, 2, self.size // 2))[..., 1, :, :] if self.halves else self._whole(x)

    def read(self, x: Tensor) -> Tensor:
        """The tokens of (... j x) that are read."""
        return x.unflatten(-2, (-1, 2, self.size // 2))[..., 0, :, :] if self.halves else self._whole(x)

    def _whole(self, x: Tensor) -> Tensor:
        return x.unflatten(-2, (-1, self.size))

    def of_matrix(self, x: Tensor) -> Tensor:
        """The entries of (... i j) that relate these tokens, a view, (... part i j)."""
        size = self.size // 2 if self.halves else self.size
        x = x.unflatten(-1, (-1, self.size)).unflatten(-3, (-1, self.size))
        x = x.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # ... part i j
        return x[..., size:, :size] if self.halves else x


class Decays:
    """What is forgotten between the tokens of each chunk, in factors that do not overflow.

    Parameters
    ----------
    run : Tensor, (... i key), float64
        The running sum of the log decay in each chunk.
    dtype : torch.dtype
        Of the factors.
    before : Tensor, optional
        The running sum up to where a token reads, if that is not where it writes.
    """

    def __init__(self, run: Tensor, dtype: torch.dtype, before: Tensor | None = None) -> None:
        size = run.shape[-2]
        at = run if before is None else before
        self.parts: list[_Part] = []
        while size > 1 and not _range(run, size) <= RANGE:
            early, late = run.unflatten(-2, (-1, 2, size // 2)).unbind(-3)
            middle, late = early[..., -1:, :], at.unflatten(-2, (-1, 2, size // 2))[..., 1, :, :]
            self._add(size, True, late - middle, middle - early, dtype)
            size //= 2
        whole = run.unflatten(-2, (-1, size))
        middle = (whole[..., :1, :] + whole[..., -1:, :]) / 2
        self._add(size, False, at.unflatten(-2, (-1, size)) - middle, middle - whole, dtype)

    def _add(self, size: int, halves: bool, late: Tensor, early: Tensor, dtype: torch.dtype) -> None:
        self.parts.append(_Part(size, halves, late.to(dtype).exp_(), early.to(dtype).exp_()))

    def matrix(self, rows: Tensor, keys: Tensor, own: bool) -> Tensor:
        """What each row reads of each earlier key, (... i j), and of its own token's if asked."""
        found = rows.new_zeros((*rows.shape[:-1], rows.shape[-2]))
        for part in self.parts:
            block = (part.reading(rows) * part.late) @ (part.read(keys) * part.early).transpose(-2, -1)
            if not part.halves:
                block = masked(block, own)
            if part.size == rows.shape[-2] and not part.halves:
                return block.squeeze(-3)
            part.of_matrix(found).copy_(block)
        return found

    def gather(self, weights: Tensor, keys: Tensor) -> Tensor:
        """Sum over earlier tokens of weight times decayed key, (... i key)."""
        found = torch.zeros_like(keys)
        for part in self.parts:
            sums = part.of_matrix(weights) @ (part.read(keys) * part.early)
            part.reading(found).addcmul_(sums, part.late)
        return found

    def total(self, amounts: Tensor, power: int) -> Tensor:
        """Sum over earlier tokens and keys of amounts, (... i), each decayed ``power`` times over."""
        found = amounts.new_zeros((*amounts.shape[:-1], 1))
        for part in self.parts:
            late, early = (x if power == 1 else x.square() for x in (part.late, part.early))
            left = part.read(amounts) * early
            if part.halves:
                sums = late @ left.sum(-2)[..., None]
            else:
                earlier = torch.ones(part.size, part.size, dtype=left.dtype, device=left.device).tril(-1)
                sums = ((earlier @ left) * late).sum(-1, keepdim=True)
            part.reading(found).add_(sums)
        return found[..., 0]


def _range(run: Tensor, size: int) -> float:
    parts = run.unflatten(-2, (-1, size))
    return float((parts[..., 0, :] - parts[..., -1, :]).max())


def masked(block: Tensor, own: bool) -> Tensor:
    """Hide later tokens, and a token from itself unless asked, in place."""
    hidden = torch.ones(block.shape[-2:], dtype=torch.bool, device=block.device).triu(1 if own else 0)
    return block.masked_fill_(hidden, 0)
