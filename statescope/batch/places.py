"""Where records go: a folder, or any fsspec URL. A record appears there whole or not at all.

Credentials are found by the file system's own standard chain (environment, configuration files, instance
role); none is taken as an argument, so none can be written anywhere.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statescope.batch.manifest import NAME

TEXTS = "texts"

DRAFTS = ".drafts"

KEPT = "kept"
"""Among the drafts, those of long texts, which outlive a run."""

WHOLE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory")
"""Protocols under which a file is there only once all of it is."""

SECRETS = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCESS_KEY|ACCOUNT_KEY|SAS", re.IGNORECASE)


@dataclass(frozen=True)
class Dumps:
    """The place of a run's records: ``texts/``, and the manifests beside it."""

    url: str

    @classmethod
    def at(cls, place: str | Path) -> Dumps:
        """Check what a user names.

        Raises
        ------
        ValueError
            If it is empty, or a URL with a password in it; names ``dumps``.
        """
        url = str(place)
        if not url:
            raise ValueError("dumps is empty; name a folder or a URL")
        if re.match(r"[a-z0-9+]+://[^/]*@", url):
            raise ValueError(
                "dumps is a URL with a user name or password in it; leave them to the standard chain of"
                " credentials (environment, configuration file, instance role)"
            )
        if url.startswith("file://"):
            url = url.removeprefix("file://")
        return cls(url.rstrip("/") if "://" in url else str(Path(url).resolve()))

    @property
    def remote(self) -> bool:
        """Whether it is a URL."""
        return "://" in self.url

    def address(self, name: str) -> str:
        """Full name of a file."""
        return f"{self.url}/{name}"

    def put(self, file: Path, name: str) -> None:
        """Move a finished file to its place; what was there is replaced at once."""
        if not self.remote:
            path = Path(self.address(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            file.replace(path)
            return
        files, root = self._files()
        target = f"{root}/{name}"
        if self.url.split("://")[0] in WHOLE:
            files.put_file(str(file), target)
        else:
            files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            part = f"{target}.{uuid.uuid4().hex}.part"
            files.put_file(str(file), part)
            files.mv(part, target)
        file.unlink()

    def get(self, name: str, file: Path) -> None:
        """Copy a file from there."""
        if self.remote:
            files, root = self._files()
            files.get_file(f"{root}/{name}", str(file))
        else:
            shutil.copyfile(self.address(name), file)

    def sizes(self, folder: str = TEXTS) -> dict[str, int]:
        """List files below a folder by their names in it, with their bytes."""
        if not self.remote:
            here = Path(self.address(folder))
            return {p.relative_to(here).as_posix(): p.stat().st_size for p in here.rglob("*") if p.is_file()}
        files, root = self._files()
        top = f"{root}/{folder}".rstrip("/")
        files.invalidate_cache()
        try:
            found = files.find(top, detail=True)
        except FileNotFoundError:
            return {}
        plain = files._strip_protocol(top)
        return {name.removeprefix(plain).lstrip("/"): int(info["size"]) for name, info in found.items()}

    def manifests(self) -> list[str]:
        """Names of the manifests that are there."""
        pattern = re.compile(NAME.format(r"(-\d+-of-\d+)?").replace(".sqlite", r"\.sqlite"))
        if not self.remote:
            top = Path(self.url)
            return sorted(p.name for p in top.glob("manifest*.sqlite") if pattern.fullmatch(p.name))
        files, root = self._files()
        files.invalidate_cache()
        try:
            names = [str(name).rsplit("/", 1)[-1] for name in files.ls(root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(name for name in names if pattern.fullmatch(name))

    def _files(self) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs

            files, root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"dumps={self.url!r} is of a kind that cannot be written: {error}") from error
        return files, str(root).rstrip("/")


@contextmanager
def drafts(dumps: Dumps, run: str) -> Iterator[Path]:
    """Yield a folder for one piece of work, on the records' own disk if they have one; gone afterwards."""
    if dumps.remote:
        parent = None
    else:
        parent = Path(dumps.address(DRAFTS)) / run
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="statescope-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def claimed(dumps: Dumps, run: str) -> Iterator[None]:
    """Hold a folder for this process, so that no two write one manifest; clear what a killed one left.

    Raises
    ------
    OSError
        If another process holds it, or it cannot be written; names ``dumps``.
    """
    if dumps.remote:
        yield
        return
    left = Path(dumps.address(DRAFTS)) / run
    try:
        left.mkdir(parents=True, exist_ok=True)
        lock = (left.parent / f"{run}.lock").open("w")
    except OSError as error:
        raise OSError(error.errno, f"dumps={dumps.url!r} cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                error.errno, f"dumps={dumps.url!r} is being written by another statescope batch; wait for it"
            ) from error
        shutil.rmtree(left, ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(left, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)
            for folder in (left.parent / KEPT, left.parent, Path(dumps.url)):
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()


def without_secrets(message: str) -> str:
    """Blot out of a message what the environment calls a secret, and passwords in URLs."""
    for name, value in os.environ.items():
        if SECRETS.search(name) and len(value) >= 6:
            message = message.replace(value, "***")
    return re.sub(r"(?<=://)[^/\s@]+@", "***@", message)
