"""Launching kernels again without asking triton which of them was compiled for such a call."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

from torch import Tensor


def multiplies_bfloat16(x: Tensor) -> bool:
    """Whether kernels multiply bfloat16 there: the interpreter of triton rounds it wrongly, and cannot."""
    return x.is_cuda


class Launcher:
    """Launches kernels, and remembers which one a call like this was compiled to.

    triton finds a compiled kernel by looking at every argument, which for a short text costs more than the
    work. Of two calls whose tensors agree in dtype, shape, strides and alignment all arguments are alike.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, Hashable], tuple[Any, tuple[Any, ...]]] = {}

    @classmethod
    def of(cls, choices: tuple[Hashable, ...], *tensors: Tensor | None) -> Launcher:
        """Return the launcher of all calls like this one."""
        alike = ((x.dtype, x.shape, x.stride(), x.data_ptr() % 16) if x is not None else x for x in tensors)
        assert tensors[0] is not None
        return _launcher((choices, tensors[0].device, *alike))

    def __call__(
        self,
        function: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        variant: Hashable = None,
        keep: bool = True,
        **options: Any,
    ) -> None:
        """Launch a kernel.

        ``constants`` are its compile-time arguments, after the others; ``variant`` tells calls of the same
        function apart whose constants differ. With ``keep=False`` an argument is not like that of other
        calls.
        """
        grid = (*grid, 1, 1)[:3]
        if keep and (function, variant) in self._compiled:
            kernel, values = self._compiled[function, variant]
            kernel[grid](*arguments, *values)
            return
        kernel = function[grid](*arguments, **constants, **options)
        if keep and kernel is not None:  # None is what the interpreter returns
            values = tuple(constants[name] for name in function.arg_names[len(arguments) :])
            self._compiled[function, variant] = kernel, values


@functools.lru_cache(maxsize=1024)
def _launcher(_: tuple[Any, ...]) -> Launcher:
    return Launcher()
