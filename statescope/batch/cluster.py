"""Dask's workers: processes here, one for each GPU, or those of a cluster that runs already."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

from statescope.batch import held

QUIET = {
    "distributed.scheduler.allowed-failures": 0,  # a death is counted here, text by text
    "distributed.scheduler.worker-saturation": 1.0,  # what waits for a worker does not die with it
    "distributed.worker.daemon": True,  # no worker outlives its parent
    "distributed.worker.multiprocessing-method": "forkserver",  # imports are done once, also for a successor
    "distributed.worker.profile.enabled": False,  # it looks at the worker a hundred times a second
    # By default every process watches itself fifty times a second: with two workers, 7 percent of a core.
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.system-monitor.disk": False,
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.admin.log-format": "%(name)s - %(levelname)s - %(message)s",
    # Dask's own has the allocator return memory at once, and a scan on a CPU then takes twice as long.
    "distributed.nanny.pre-spawn-environ": {},
    "distributed.worker.memory.target": False,  # what a worker holds is its model, which cannot be spilled
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}
"""Dask's settings for a cluster of our own."""

IMPORTED = ["distributed", "statescope.batch.work", "transformers.models.mamba2.modeling_mamba2"]
"""What workers share from the start: with one family's module comes what those of all others import."""

PRELOAD = (
    "import signal, sys, torch; signal.signal(signal.SIGINT, signal.SIG_IGN); torch.set_num_threads({});"
    " sys.setswitchinterval(5e-4); from statescope.batch import held; held.keep()"
)
"""A worker leaves Ctrl-C to its parent, which stops it; its threads are its share of the cores. Whenever it
launches work on a GPU another thread of Python's may go on, and the one that writes shall give way soon. What
it holds of the memory is looked after before any of its threads has a heap of its own."""


@contextmanager
def workers(scheduler: Any = None, number: int | None = None) -> Iterator[tuple[Any, bool]]:
    """Yield a client of some workers, and whether they are our own.

    Parameters
    ----------
    scheduler : optional
        Address of a running scheduler, or a Dask cluster or client, such as dask-jobqueue's. Default: a
        cluster of processes here that ends with this block. On CPUs, start workers elsewhere with the
        setting ``distributed.nanny.pre-spawn-environ: {}`` too (see :data:`QUIET`), and the environment
        variable ``GLIBC_TUNABLES`` of :data:`statescope.batch.held.TUNABLES`.
    number : int, optional
        Processes here. Default: one for each GPU; without one, one for each two cores.

    Raises
    ------
    ValueError, OSError
        If Dask is not installed, or no scheduler answers; names ``scheduler``.
    """
    if find_spec("distributed") is None:
        raise ValueError("batch needs Dask: pip install 'statescope-ssm[batch]'")
    import dask
    from distributed import Client

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if isinstance(scheduler, Client):
        yield scheduler, False
        return
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout="10s", set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise OSError(f"scheduler={str(scheduler)!r} does not answer: {error}") from error
        with client:
            yield client, False
        return
    with dask.config.set(QUIET), _here(number) as cluster, Client(cluster, set_as_default=False) as client:
        yield client, True


def gpus() -> list[str]:
    """Names of the GPUs this process may use, as CUDA_VISIBLE_DEVICES knows them."""
    import torch

    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [n.strip() for n in allowed.split(",") if n.strip()] if allowed is not None else None
    found = torch.cuda.device_count()
    return [str(i) for i in range(found)] if names is None else names[:found]


def _here(number: int | None) -> Any:
    from multiprocessing.forkserver import ensure_running

    from distributed import Nanny, Scheduler, SpecCluster
    from distributed.utils import get_mp_context

    if number is not None and number < 1:
        raise ValueError(f"workers={number}; expected 1 or more")
    devices = gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = number or len(devices) or max(1, cores // 2)
    options = {"nthreads": 1, "host": "127.0.0.1", "memory_limit": 0, "dashboard_address": None}
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // count))
    get_mp_context().set_forkserver_preload(IMPORTED)
    with nullcontext() if devices else held.joining():  # of what all workers are forked from
        ensure_running()
    specification = {}
    for i in range(count):
        variables = {"TRANSFORMERS_VERBOSITY": "error", **held.FEWER_PRIMITIVES}
        if devices:
            variables["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
        given = {
            **options,
            "env": variables,
            "preload": PRELOAD.format(threads),
            "silence_logs": logging.CRITICAL,
        }
        specification[i] = {"cls": Nanny, "options": given}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": ":0"}}
    return SpecCluster(workers=specification, scheduler=scheduler, silence_logs=logging.CRITICAL)
