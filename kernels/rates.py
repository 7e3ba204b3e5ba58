r"""A log decay per entry that is a step times a rate, and is not written out.

In Mamba-1 :math:`g_{t,n,c} = \Delta_{t,c} A_{n,c}`, ``d_state`` times as many numbers as there are values.
:class:`Rated` stands for them wherever a log decay does. Stretches of it, the same in another dtype and heads
side by side are again two factors, tokens are summed up as steps, and for anything else it is written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from statescope.recurrence import Recurrence

TIME, HEADS = 1, 2

_aten = torch.ops.aten


class Rated(Tensor):
    """A tensor (batch, time, heads, key, value) that is a product. It cannot be written into.

    Parameters
    ----------
    step : Tensor, (batch, time, heads, value)
        How far each column goes with each token (``dt`` in Mamba-1).
    rate : Tensor, (heads, key, value)
        Of every entry (``A``), in nat for one step.
    """

    step: Tensor
    rate: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, step: Tensor, rate: Tensor) -> Rated:  # noqa: D102
        shape = (*step.shape[:3], *rate.shape[1:])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=step.dtype, device=step.device)

    def __init__(self, step: Tensor, rate: Tensor) -> None:
        self.step, self.rate = step, rate

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Rated({self.step!r}, {self.rate!r})"

    def written_out(self) -> Tensor:
        """The product, a plain tensor."""
        return self.step[..., None, :] * self.rate

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if op._schema.is_mutable:
            raise ValueError("log_decay is a product that nothing can be written into; replace it as a whole")
        x, *others = args
        if op in (_aten.alias.default, _aten._to_copy.default):
            return cls(op(x.step, **kwargs), op(x.rate, **kwargs))
        if op is _aten.slice.Tensor and others[:1] == [TIME]:
            return cls(op(x.step, *others, **kwargs), x.rate)
        if op is _aten.select.int and others[0] == TIME:
            return op(x.step, *others)[:, :, None] * x.rate
        if op is _aten.sum.dim_IntList and others == [[TIME]]:
            total = op(x.step, *others, **kwargs)
            return total[:, :, None] * x.rate.to(total.dtype)
        if op is _aten.cat.default and others == [HEADS] and all(isinstance(part, cls) for part in x):
            return cls(torch.cat([part.step for part in x], HEADS), torch.cat([part.rate for part in x]))
        args, kwargs = tree_map_only(cls, cls.written_out, (args, kwargs))
        return op(*args, **kwargs)


def written_out(recurrence: Recurrence) -> Recurrence:
    """A recurrence whose log decay is a plain tensor, which can be written into."""
    g = recurrence.log_decay
    return recurrence.replace(log_decay=g.written_out()) if isinstance(g, Rated) else recurrence
