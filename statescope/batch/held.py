"""What a worker's process holds of the memory: one heap, of what a pass needs and little more.

Texts of all lengths leave the C library's heap in pieces. A worker of our own on a CPU is started such that
they are joined (:data:`TUNABLES`), and its heap stays as it is after the first texts. One that was started
elsewhere without that may hold three times what it uses after some hundred texts, and has to hand back what
lies idle. That comes again page by page: asked for at once, as Dask has its workers do, that takes as long as
the reading; after each piece of work, about a tenth of it where two workers share a memory. So the heap is
asked only once a worker holds :data:`GROWTH` times what it usually does, and keeps what it has in between:
else its end, clear once it was asked, would go and come with every tensor.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = (-3, 32 * 2**20), (-1, 2**30), (-8, 1)
"""glibc's parameters, and their values: the largest it takes for what is mapped by itself, in bytes; what may
lie idle at the end of the heap; and how many heaps there are. A thread's own, such as a worker's that reads,
consists of parts of 64 MiB that come and go whatever may lie idle."""

TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
"""For glibc to join at once whatever lies free side by side, as a program can only be told when it starts.

A tensor begins at a multiple of 64 bytes: glibc takes more than was asked for, and cuts the rest off before
and after it. It keeps pieces so small aside, for whatever small is asked for next. Between tensors they hold
apart what is free on both sides, and a tensor's own place is too short for the next one of its size: reading
that used 250 MiB at most had a heap of 600, and has one of 290 this way, in no more time. What launches work
on a GPU asks for small things only, and has those faster as they are by default."""

FEWER_PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""A convolution on a CPU is prepared anew for every length, and 1024 of these are kept by default: 22 MiB,
though hardly two texts are of one length."""

GROWTH = 1.1
"""Times what a worker held after the first piece of work since it last handed back."""


def resident() -> int:
    """Return the bytes that this process holds."""
    return int(_process().memory_info().rss)


def keep() -> None:
    """Have the C library keep what is freed until :func:`hand_back`, where it can.

    A thread that has a heap of its own by then stays with it: best called first of all.
    """
    _glibc()


@contextmanager
def joining() -> Iterator[None]:
    """Have programs that are started meanwhile join what is free in their heaps; see :data:`TUNABLES`."""
    name = "GLIBC_TUNABLES"
    before = os.environ.get(name)
    os.environ[name] = TUNABLES if before is None else f"{TUNABLES}:{before}"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def hand_back() -> None:
    """Have the C library hand back what lies idle, where it can, if more is held than usually."""
    global _usual
    library, now = _glibc(), resident()
    if _usual is None:
        _usual = now
    elif now > GROWTH * _usual and library is not None:
        library.malloc_trim(0)
        _usual = None  # the next piece of work tells what is needed


_usual: int | None = None


@cache
def _process() -> Any:
    import psutil

    return psutil.Process()


@cache
def _glibc() -> Any:
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        return None
    for parameter, value in (MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX):
        library.mallopt(parameter, value)
    return library
