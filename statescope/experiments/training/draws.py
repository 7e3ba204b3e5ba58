"""Random numbers that are a function of where they are used: of seed, step, purpose and place.

A run's data are then the same alone and among others, on any device, and after any interruption; and a
step can be recorded once and replayed. The function is the finaliser of splitmix64 (Steele, Lea and Flood
2014), once for each number that is mixed in.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Shift to the right, zeros in."""
    return (x >> by) & (2 ** (64 - by) - 1)


class Draws:
    """The numbers of one step of several runs.

    Parameters
    ----------
    seeds : Tensor of int64, (run,)
        One for each run.
    step : Tensor of int64, ()
        Which step; may live on the device.
    """

    def __init__(self, seeds: Tensor, step: Tensor) -> None:
        self._base = _mix(_mix(seeds * _GOLDEN + 1) + step)[:, None, None]

    def uniform(self, purpose: int, place: Tensor) -> Tensor:
        """Draw from [0, 1), 24 bits each.

        Parameters
        ----------
        purpose : int
            Draws of different purposes are independent.
        place : Tensor of int64, broadcast against (run, row, place)
            Numbers the draws.

        Returns
        -------
        Tensor of float32, (run, row, place)
        """
        mixed = _mix(_mix(self._base + purpose) + place)
        return _shift(mixed, 40).to(torch.float32) * 2.0**-24

    def below(self, limit: int, purpose: int, place: Tensor) -> Tensor:
        """Draw whole numbers from 0 to ``limit - 1``."""
        return (self.uniform(purpose, place).double() * limit).long()
