"""What a worker's process holds of the memory, kept flat over thousands of texts.

Texts of all lengths leave the C library's heap in pieces that it keeps: a worker that uses 500 MB may hold
three times that after some hundred texts. To hand every piece back at once, as Dask has its workers do, takes
as long as the reading; to ask for it after each piece of work takes some hundredths of a second. In between
the heap keeps what it has: else its end, clear once it was asked, would go and come with every tensor.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

MMAP_THRESHOLD, TRIM_THRESHOLD = (-3, 32 * 2**20), (-1, 2**30)
"""glibc's parameters, and their values: the largest it takes for what is mapped by itself, in bytes; and what
may lie idle at the end of the heap."""


def resident() -> int:
    """Return the bytes that this process holds."""
    return int(_process().memory_info().rss)


def keep() -> None:
    """Have the C library keep what is freed until :func:`hand_back`, where it can."""
    _glibc()


def hand_back() -> None:
    """Have the C library hand back what lies idle, where it can."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@cache
def _process() -> Any:
    import psutil

    return psutil.Process()


@cache
def _glibc() -> Any:
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        return None
    for parameter, value in (MMAP_THRESHOLD, TRIM_THRESHOLD):
        library.mallopt(parameter, value)
    return library
