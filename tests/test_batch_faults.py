"""Whatever is killed, full or out of reach: run again, and every text is there exactly once."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import xarray as xr
from batches import MODEL, SETTINGS, texts, write
from conftest import needs, skip

import statescope
from statescope.batch import engine, held
from statescope.batch.cluster import gpus, workers
from statescope.batch.command import Summary, batch
from statescope.batch.manifest import Manifest, place_of
from statescope.batch.places import Dumps

needs("distributed")

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(50, 400, 14)]

SMALL = replace(SETTINGS, segment=256)
"""Short segments make many pieces of work of few texts."""

KILLS = int(os.environ.get("STATESCOPE_BATCH_KILLS", "2"))
"""Workers killed during one run."""


class Poison:
    """Makes a worker die of some texts, and rest a while over every piece of work, so that it can be hit."""

    def __init__(self, word: str, rest: float) -> None:
        self.word, self.rest = word, rest

    def setup(self, worker: Any) -> None:
        """Patch this worker's process, and any that comes in its place."""
        from statescope.batch import work

        own, word, rest = work._ids, self.word, self.rest

        def poisoned(text: Any, *rest_of: Any) -> Any:
            time.sleep(rest)
            if word in str(text.content):
                os.kill(os.getpid(), signal.SIGKILL)
            return own(text, *rest_of)

        work._ids = poisoned  # type: ignore[assignment]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start two worker processes for all tests; they know what to die of."""
    from distributed import WorkerPlugin

    class Plugin(Poison, WorkerPlugin):
        pass

    with workers(None, 2) as (client, own):
        assert own
        client.register_plugin(Plugin("poison!", 0.1))
        yield client


def pids(client: Any) -> list[int]:
    """Process numbers of the workers."""
    found = client.run(os.getpid, on_error="ignore")
    return [pid for pid in found.values() if isinstance(pid, int)]


class Heap(ctypes.Structure):
    """What glibc says of its heap: ``mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("size", *"bcdefg", "used", "free", "end")]

    @classmethod
    def now(cls) -> Heap:
        """Ask."""
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = cls
        found: Heap = library.mallinfo2()
        return found


def grown() -> int:
    """Bytes by which this process's heap grows for one tensor in the place of several that are gone."""
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    small = [library.malloc(n) for n in (24, 40, 56, 72) for _ in range(2000)]  # what lay aside is taken
    tensors = [torch.empty(2**20 + 16 * i, dtype=torch.uint8) for i in range(24)]
    end = torch.empty(2**20, dtype=torch.uint8)  # or the heap's end would be joined to them
    before = Heap.now().size
    tensors.clear()
    large = torch.empty(10 * 2**20, dtype=torch.uint8)
    after = Heap.now().size
    for place in small:
        library.free(ctypes.c_void_p(place))
    assert large.numel() > end.numel()
    return int(after - before)


def kept() -> int:
    """Bytes that this process uses more after convolutions over texts of 400 lengths."""
    convolution = torch.nn.Conv1d(64, 64, 4, groups=64, padding=3)
    before = Heap.now().used
    with torch.no_grad():
        for length in range(20, 420):
            convolution(torch.ones(1, 64, length))
    return int(Heap.now().used - before)


def agrees(dumps: Path, rows: list[dict[str, Any]], failed: tuple[str, ...] = ()) -> None:
    """Demand every text once, whole and its own; nothing else; and a manifest that says the same."""
    with Manifest(dumps / "manifest.sqlite") as manifest:
        known = {t["id"]: t for t in manifest.texts()}
    done = {i: t for i, t in known.items() if t["status"] == "done"}
    assert set(known) == {r["id"] for r in rows} and set(known) - set(done) == set(failed)
    sizes = Dumps.at(dumps).sizes()
    assert sizes == {t["place"]: t["bytes"] for t in done.values()}
    for row in rows:
        if row["id"] in failed:
            continue
        path = dumps / "texts" / place_of(row["id"])
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        record = statescope.open(path)
        assert record.attrs["complete"] and record.attrs["text_id"] == row["id"]
        assert bytes(record["tokens"]["token_id"].values[0].tolist()).decode() == row["text"]
        assert np.isfinite(record["steps"]["state_norm"].values).all()
    assert not (dumps / ".drafts").exists() or not list((dumps / ".drafts").rglob("*.zip"))


of_glibc = pytest.mark.skipif(
    bool(gpus()) or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="only the heap of workers on a CPU, and glibc's, is set up so",
)


@of_glibc
def test_a_workers_heap_joins_what_is_free(cluster: Any) -> None:
    """The places of tensors that are gone make room for a larger one, or the heap would grow and grow."""
    assert set(cluster.run(grown).values()) == {0}
    assert set(cluster.run(os.getenv, "GLIBC_TUNABLES").values()) == {held.TUNABLES}
    assert "GLIBC_TUNABLES" not in os.environ  # of the process that started them


@of_glibc
def test_what_is_prepared_for_a_length_does_not_pile_up(cluster: Any) -> None:
    """Hardly two texts are of one length; by default these hold 22 MiB."""
    assert max(cluster.run(kept).values()) < 15 * 2**20


def during(dumps: Path, records: int, act: Callable[[], None]) -> threading.Thread:
    """Do something as soon as so many records are there."""

    def wait() -> None:
        while len(list(dumps.glob("texts/*/*.zarr.zip"))) < records:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_killed_workers_lose_no_text(cluster: Any, tmp_path: Path) -> None:
    """Workers are killed for no fault of any text, one after the other: all texts are read in one run."""
    rows = texts(LENGTHS)
    source, dumps = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps"
    killed: list[int] = []

    def kill() -> None:
        for _ in range(KILLS):
            alive = [p for p in pids(cluster) if p not in killed]
            if alive:
                os.kill(alive[0], signal.SIGKILL)
                killed.append(alive[0])
            time.sleep(0.5)

    killer = during(dumps, 3, kill)
    found = batch(source, dumps, SMALL, scheduler=cluster)
    killer.join()
    assert (found.done, found.failed, found.stopped) == (len(rows), 0, None) and killed
    agrees(dumps, rows)


def test_text_that_kills_workers_fails_alone(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried on several workers, then marked; those handed out beside it are read."""
    monkeypatch.setattr(engine, "ATTEMPTS", 2)
    rows = [*texts([60] * 3), {"id": "deadly", "text": "poison! " * 8}]
    source, dumps = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps"
    found = batch(source, dumps, SMALL, scheduler=cluster)
    assert (found.done, found.failed) == (3, 1)
    assert found.reasons == (("2 workers died while they read it (out of memory?)", 1),)
    agrees(dumps, rows, ("deadly",))


def serve(port: int) -> None:
    """Be a scheduler, in a process of its own."""
    import asyncio

    from distributed import Scheduler

    async def run() -> None:
        async with Scheduler(host="127.0.0.1", port=port, dashboard_address=":0") as scheduler:
            await scheduler.finished()

    asyncio.run(run())


def labour(port: int) -> None:
    """Be a worker of that scheduler."""
    import asyncio

    from distributed import Worker

    async def run() -> None:
        async with Worker(
            f"tcp://127.0.0.1:{port}", nthreads=1, death_timeout=5, dashboard_address=None
        ) as w:
            Poison("poison!", 0.2).setup(w)
            await w.finished()

    asyncio.run(run())


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_killed_scheduler_stops_the_run(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's scheduler is killed: the run says so and stops; run again, elsewhere, it goes on."""
    from distributed.utils import get_mp_context

    monkeypatch.setattr(engine, "DESERTED", 6.0)
    rows, port = texts(LENGTHS[:6]), free_port()
    source, dumps = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps"
    processes = [get_mp_context().Process(target=f, args=(port,), daemon=True) for f in (serve, labour)]
    for process in processes:
        process.start()
        time.sleep(0.5)
    killer = during(dumps, 2, lambda: os.kill(processes[0].pid, signal.SIGKILL))
    found = batch(source, dumps, SMALL, scheduler=f"tcp://127.0.0.1:{port}")
    killer.join()
    assert found.stopped is not None and "scheduler" in found.stopped
    assert found.pending and not found.failed
    for process in processes:
        process.kill()
        process.join()
    assert batch(source, dumps, SMALL, scheduler=cluster).done == 6
    agrees(dumps, rows)


@pytest.mark.parametrize("kind", ["closed", "cancelled"])
def test_scheduler_that_dies_while_it_hands_over_a_result(kind: str) -> None:
    """That is no fault of the text's, and ends the run as at any other time."""
    from distributed import CancelledError
    from distributed.comm.core import CommClosedError

    class Lost:
        status = "finished"

        def result(self) -> Any:
            raise CommClosedError("reset by peer") if kind == "closed" else CancelledError("lost")

    with pytest.raises(engine.Stopped, match="the scheduler is gone"):
        engine._fetched(Lost())


def test_worker_that_dies_with_a_result_in_its_hands(tmp_path: Path) -> None:
    """Its texts are handed out again, as those of any other that dies."""
    from distributed.scheduler import KilledWorker

    class Lost:
        status = "finished"

        def result(self) -> Any:
            raise KilledWorker("work", None, 0)  # type: ignore[arg-type]

    with Manifest(tmp_path / "manifest.sqlite") as manifest:
        given: Any = (None, True, SMALL, None, manifest, None, "all", print)
        hands_out = engine.Engine(*given)
        piece = [engine.Waiting(name, "", "", 1) for name in "ab"]
        assert hands_out._take_back(Lost(), piece) == []
        assert sorted(w.id for piece in hands_out._queue for w in piece) == ["a", "b"]


def parent(source: Path, dumps: Path, address: str) -> None:
    """Be a run on workers that are there."""
    batch(source, dumps, SMALL, scheduler=address)


def test_killed_parent(cluster: Any, tmp_path: Path) -> None:
    """What its workers finished, it could not write down: run again, that is found, and the rest is read."""
    from distributed.utils import get_mp_context

    rows = texts(LENGTHS)
    source, dumps = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps"
    arguments = (source, dumps, cluster.scheduler.address)
    process = get_mp_context().Process(target=parent, args=arguments, daemon=True)
    process.start()
    during(dumps, 3, process.kill).join(60)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert 3 <= len(list(dumps.rglob("*.zarr.zip"))) < len(rows)
    found = batch(source, dumps, SMALL, scheduler=cluster)
    assert found.done == len(rows) and found.read <= len(rows) - 3
    agrees(dumps, rows)


def ended(process: psutil.Process) -> bool:
    """Whether a process is over, even if nobody has asked yet how it ended."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_interrupted_command(cluster: Any, tmp_path: Path) -> None:
    """Ctrl-C, which all processes of a terminal get, leaves none of them, and says how to go on."""
    rows = texts([*LENGTHS, *LENGTHS[:8]])
    source, dumps = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps"
    command = [sys.executable, "-m", "statescope.cli", "batch", str(source), "-m", MODEL, "-o", str(dumps)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--workers", "1", "--backend", "chunked", "--device", "cpu", "--segment", "256"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not as a background job has it
    ) as process:
        during(dumps, 3, lambda: None).join(120)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert len(family) >= 2
    deadline = time.monotonic() + 20
    while not all(map(ended, family)):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.1)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("stopped; everything finished is kept: run the same command")
    left = len(list(dumps.rglob("*.zarr.zip")))
    assert 3 <= left < len(rows)
    found = batch(source, dumps, SMALL, scheduler=cluster)
    assert found.done == len(rows) and found.read == len(rows) - left
    agrees(dumps, rows)


def test_two_runs_do_not_share_a_manifest(cluster: Any, tmp_path: Path) -> None:
    """The second is told to wait; shards may run at once."""
    rows = texts(LENGTHS[:8])
    source, dumps = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps"
    refused: list[str] = []

    def second() -> None:
        try:
            batch(source, dumps, SMALL, scheduler=cluster)
        except OSError as error:
            refused.append(str(error))

    other = during(dumps, 1, second)
    assert batch(source, dumps, SMALL, scheduler=cluster).done == 8
    other.join()
    assert refused and "being written by another statescope batch" in refused[0]


def test_full_disk(cluster: Any, tmp_path: Path) -> None:
    """The run stops and blames no text; with room, it goes on. What is there stays whole."""
    rows, dumps = texts([400] * 8), tmp_path / "disk" / "dumps"
    source, disk = write(tmp_path / "in.jsonl", rows), tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        skip("mounting a file system of its own is not allowed here")
    try:
        found = batch(source, dumps, SMALL, scheduler=cluster)
        assert found.stopped is not None and ("No space left" in found.stopped or "full" in found.stopped)
        assert 0 < found.done + found.pending == 8 and found.pending and not found.failed
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert batch(source, dumps, SMALL, scheduler=cluster).done == 8
        agrees(dumps, rows)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


class S3:
    """A server of the S3 protocol on this machine: rclone's, over a folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Serve."""
        (self.folder / "bucket").mkdir(parents=True, exist_ok=True)
        key = f"{os.environ['AWS_ACCESS_KEY_ID']},{os.environ['AWS_SECRET_ACCESS_KEY']}"
        given = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", key, str(self.folder)]
        self._process = subprocess.Popen(
            [_rclone(), "serve", "s3", *given],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
        )
        for _ in range(200):
            import socket

            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError("rclone does not serve")

    def stop(self) -> None:
        """Be out of reach."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _rclone() -> str:
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.is_file() else shutil.which("rclone")
    if found is None:
        skip("rclone, whose S3 server stands for an object store, is not installed")
    return str(found)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    needs("s3fs")
    import s3fs

    port = free_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "an-access-key",
        "AWS_SECRET_ACCESS_KEY": "a-secret-that-must-not-be-seen",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",  # rclone sends that of the whole
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    server = S3(tmp_path / "served", port)
    server.start()
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_object_store(s3: S3, tmp_path: Path) -> None:
    """A store that speaks S3 goes out of reach in the middle; run again, all is there, and no secret."""
    from distributed import Client, LocalCluster

    rows = texts([200] * 7)
    source, said = write(tmp_path / "in.jsonl", rows), []
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}

    def run() -> Summary:
        return batch(source, "s3://bucket/run", SMALL, scheduler=client, say=said.append)

    with LocalCluster(**options) as local, Client(local, set_as_default=False) as client:
        stopper = during(s3.folder / "bucket" / "run", 1, s3.stop)
        Poison("poison!", 0.2).setup(None)
        found = run()
        stopper.join()
        assert found.stopped is not None and "cannot be written" in found.stopped
        assert not found.failed and found.pending
        with pytest.raises(OSError, match="dumps='s3://bucket/run' cannot be reached"):
            run()
        s3.start()
        assert run().done == 7 and run().read == 0
    served = s3.folder / "bucket" / "run"
    agrees(served, rows)
    collection = statescope.open_collection("s3://bucket/run")
    local_one = statescope.open_collection(served)
    for name in ("tokens", "steps"):
        there, here = (tree[name].to_dataset().load() for tree in (collection, local_one))
        xr.testing.assert_identical(there, here)
    record = statescope.open(f"s3://bucket/run/texts/{place_of('t3')}")
    assert record.attrs["text_id"] == "t3"
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert secret not in "\n".join([*said, str(found)])
    for path in served.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_job_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster that starts workers as jobs, as Slurm's does: dask-jobqueue's form without a queue."""
    needs("dask_jobqueue")
    from dask_jobqueue.local import LocalCluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = texts([100, 80, 60])
    source, dumps = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps"
    local = {"scheduler_options": {"host": "127.0.0.1", "dashboard_address": ":0"}, "nanny": False}
    with LocalCluster(cores=1, processes=1, memory="2GB", **local) as queue:
        queue.scale(jobs=1)
        found = batch(source, dumps, SMALL, scheduler=queue)
    assert (found.done, found.stopped) == (3, None)
    agrees(dumps, rows)
