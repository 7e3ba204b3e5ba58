"""The one equation every supported architecture is a case of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Recurrence:
    r"""A linear recurrence over a matrix state, one per head.

    .. math::

        S_t &= \operatorname{diag}(e^{g_t})\, S_{t-1} + a_t (b_t^\top S_{t-1}) + w_t\, k_t v_t^\top \\
        y_t &= S_t^\top q_t + d\, v_t

    with a state :math:`S` of shape ``(key, value)``; where every entry of it decays at its own rate,
    :math:`e^{g_t} \circ S_{t-1}` stands for the first product. Heads that share a query and key (a *group*)
    are contiguous: head ``h`` of ``heads`` reads group ``h // (heads // groups)``.

    Parameters
    ----------
    q, k : Tensor, (batch, time, groups, key)
        Query (``C`` in Mamba-2) and key (``B``).
    v : Tensor, (batch, time, heads, value)
        Value (``x`` in Mamba-2).
    log_decay : Tensor, (batch, time, heads), (..., heads, key) or (..., heads, key, value)
        :math:`g_t` in nat, one number per head (``dt * A`` in Mamba-2), one per key or one per entry of
        the state (``dt * A`` in Mamba-1, which :class:`~statescope.kernels.rates.Rated` does not write out).
    write_scale : Tensor, (batch, time, heads), optional
        :math:`w_t`, the strength of each write (``dt`` in Mamba-2); 1 where it is absent.
    a, b : Tensor, (batch, time, heads, key), optional
        The erase term. ``a`` of shape (batch, time, heads), without ``b``, is the delta rule's, which
        reads the decayed state with the key: :math:`a_t k_t` in the place of :math:`a_t`, and
        :math:`e^{g_t} \circ k_t` in that of :math:`b_t`.
    initial_state : Tensor, (batch, heads, key, value), optional
        :math:`S_{-1}`; zero where it is absent.
    skip : Tensor, (heads,), optional
        :math:`d`, what bypasses the state on its way to the output (``D`` in Mamba-2).

    Raises
    ------
    ValueError
        If a tensor's shape, device or kind does not fit; the message names the field.

    Notes
    -----
    Source: *Stuffed Mamba* (arXiv 2410.07145), section 2, for Mamba-2; *Parallelizing Linear
    Transformers with the Delta Rule* (arXiv 2406.06484), eq. 1, for the erase term.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    write_scale: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    initial_state: Tensor | None = None
    skip: Tensor | None = None

    def __post_init__(self) -> None:
        if self.v.ndim != 4:
            raise ValueError(f"v has shape {tuple(self.v.shape)}; expected (batch, time, heads, value)")
        if self.k.ndim != 4:
            raise ValueError(f"k has shape {tuple(self.k.shape)}; expected (batch, time, groups, key)")
        if self.groups == 0 or self.heads % self.groups:
            raise ValueError(f"k has {self.groups} groups; {self.heads} heads are not a multiple of that")
        if self.a is not None and self.a.ndim == 3 and self.b is not None:
            raise ValueError(
                "a has one number per head, which is the delta rule's erase term; b must be None"
            )
        if (self.a is None or self.a.ndim == 4) and (self.a is None) != (self.b is None):
            raise ValueError("the erase term needs both a and b; one of them is missing")
        expected, device = self._expected(), self.v.device
        if (
            self.log_decay.ndim not in (3, 4, 5)
            or self.log_decay.shape != expected["log_decay"][: self.log_decay.ndim]
        ):
            raise ValueError(
                f"log_decay has shape {tuple(self.log_decay.shape)}; expected (batch, time, heads),"
                " (batch, time, heads, key) or (batch, time, heads, key, value), here"
                f" {expected['log_decay']}"
            )
        for name, tensor in self.tensors().items():
            if name != "log_decay" and tensor.shape != expected[name]:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; expected {expected[name]} to fit k and v"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, v is on {device}; move them together")

    def _expected(self) -> dict[str, tuple[int, ...]]:
        batch, time, heads, value = self.v.shape
        groups, key = self.k.shape[2:]
        shared, per_head = (batch, time, groups, key), (batch, time, heads)
        return {
            "q": shared,
            "k": shared,
            "v": (*per_head, value),
            "log_decay": (*per_head, key, value),
            "write_scale": per_head,
            "a": per_head if self.delta_rule else (*per_head, key),
            "b": (*per_head, key),
            "initial_state": (batch, heads, key, value),
            "skip": (heads,),
        }

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.v.shape[0]

    @property
    def time(self) -> int:
        """Number of tokens."""
        return self.v.shape[1]

    @property
    def heads(self) -> int:
        """Number of heads, each with a state of its own."""
        return self.v.shape[2]

    @property
    def groups(self) -> int:
        """Number of distinct queries and keys; heads share them evenly."""
        return self.k.shape[2]

    @property
    def key(self) -> int:
        """Rows of a head's state (``d_state`` in Mamba-2)."""
        return self.k.shape[3]

    @property
    def value(self) -> int:
        """Columns of a head's state (``head_dim`` in Mamba-2)."""
        return self.v.shape[3]

    @property
    def scalar_decay(self) -> bool:
        """Whether the whole state of a head decays at one rate."""
        return self.log_decay.ndim == 3

    @property
    def erases(self) -> bool:
        """Whether the erase term is present."""
        return self.a is not None

    @property
    def delta_rule(self) -> bool:
        """Whether the erase term is the delta rule's, along the key: ``a`` alone, one number per head."""
        return self.a is not None and self.a.ndim == 3

    @property
    def structure(self) -> str:
        """Which case of the equation this is, in words: how the state decays and whether it is erased."""
        decay = {3: "head", 4: "key", 5: "entry"}[self.log_decay.ndim]
        erase = ", delta rule" if self.delta_rule else ", erase term" if self.erases else ""
        return f"decay per {decay}{erase}"

    def erase_vectors(self) -> tuple[Tensor, Tensor] | None:
        """:math:`a_t` and :math:`b_t`, each (batch, time, heads, key); None where nothing is erased."""
        if self.a is None:
            return None
        if self.b is not None:
            return self.a, self.b
        if self.log_decay.ndim == 5:
            raise ValueError(
                "log_decay has a number for every entry; the delta rule's erase term has no b then"
            )
        k = self.k.repeat_interleave(self.heads // self.groups, 2)
        decay = self.log_decay.exp()
        return self.a[..., None] * k, (decay[..., None] if self.scalar_decay else decay) * k

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is present, by field name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Recurrence:
        """Convert every tensor to one floating dtype."""
        return Recurrence(**{name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    def replace(self, **fields: Any) -> Recurrence:
        """Return a validated copy with some fields replaced, as an ``edit`` does."""
        return dataclasses.replace(self, **fields)

    def between(self, start: int, stop: int, initial_state: Tensor | None) -> Recurrence:
        """Return the stretch of tokens ``start`` to ``stop - 1``, entered with ``initial_state``."""
        whole = ("initial_state", "skip")
        cut = {name: x[:, start:stop] for name, x in self.tensors().items() if name not in whole}
        return self.replace(**cut, initial_state=initial_state)

    def start_state(self, dtype: torch.dtype) -> Tensor:
        """The state before the first token, (batch, heads, key, value), never an alias of the input."""
        if self.initial_state is not None:
            return self.initial_state.to(dtype, copy=True)
        shape = (self.batch, self.heads, self.key, self.value)
        return torch.zeros(shape, dtype=dtype, device=self.v.device)
