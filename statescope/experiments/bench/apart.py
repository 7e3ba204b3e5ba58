"""Jobs in a process of their own: one that dies costs its own result only.

On a GPU an illegal access to memory ends all work of a process, and a peak of memory is a process's for life.
A job is a function by its full name, with arguments and a result that JSON can carry.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Self

MARK = "statescope job: "
"""Begins the line that carries a result; whatever else a job prints is passed over."""

STAGE = "statescope stage: "
"""Begins the line that says what a job does now."""


class Lost(RuntimeError):
    """A job ended without a result; the message says how."""


def stage(said: str) -> None:
    """Say what a job does now: on the standard error, so that a run that is stopped tells where it was."""
    print(f"{STAGE}{said}", flush=True)


class Here:
    """Runs jobs in this process, and hands on what another would."""

    def call(self, function: str, **arguments: Any) -> Any:
        """Run a function by its full name; see :meth:`Apart.call`."""
        try:
            return json.loads(json.dumps(_find(function)(**arguments)))
        except Exception as error:
            raise Lost(reason(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Apart:
    """Runs jobs one after another in one other process; a new one takes over where one has died.

    Parameters
    ----------
    environment : mapping, optional
        Variables to set there.
    without : sequence of str
        Packages that cannot be imported there.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, without: Sequence[str] = ()) -> None:
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._environment |= environment or {}
        self._without = list(without)
        self._began = time.monotonic()
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def call(self, function: str, **arguments: Any) -> Any:
        """Run a function by its full name and return its result.

        Raises
        ------
        Lost
            If it raised, or its process ended.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([function, arguments]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:  # it has died at once; what it said is read below
            pass
        for line in process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
            if line.startswith(STAGE):
                seconds = time.monotonic() - self._began
                print(f"{seconds:6.1f} s: {line[len(STAGE) :].rstrip()}", file=sys.stderr, flush=True)
        raise Lost(self._epitaph(process))

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        command = [sys.executable, "-m", __name__, *self._without]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=self._environment,
        )  # fmt: skip
        return self._process

    def _epitaph(self, process: subprocess.Popen[str]) -> str:
        """Say how a process ended: by the last line it wrote about an error, and its code."""
        code = process.wait()
        assert self._errors is not None
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        last = next((line[len(MARK) :] for line in reversed(lines) if line.startswith(MARK)), None)
        self._close()
        if last is not None:
            return last
        return f"its process ended with code {code}" + (f": {lines[-1][:300]}" if lines else "")

    def _close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
        if self._errors is not None:
            self._errors.close()
        self._process = self._errors = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None
    ) -> None:
        if kind is not None and self._process is not None:
            self._process.kill()
        self._close()


def workplace(apart: bool) -> Here | Apart:
    """Return a place where jobs are run: in a process of their own where one could end all others."""
    return Apart() if apart else Here()


def reason(error: BaseException) -> str:
    """Say in one line why something was not done."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; its own words are many
        return "out of memory"
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}".removesuffix(": ")


def _find(function: str) -> Any:
    module, name = function.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def main() -> None:
    """Take jobs from standard input, one a line, until there are none or one fails."""
    for name in sys.argv[1:]:
        sys.modules[name] = None  # type: ignore[assignment]
    for line in sys.stdin:
        function, arguments = json.loads(line)
        try:
            result = _find(function)(**arguments)
        except Exception as error:
            print(f"{MARK}{reason(error)}", file=sys.stderr, flush=True)
            raise
        print(f"{MARK}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
