"""The command as a process of its own, `python -m jobs.attribute spec.yaml`, that can be killed; what it started goes with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).parents[2]
MARK = "MIRRORSCOPE_TEST"
"""Variable that all processes of a driver inherit, wherever they are in the process tree when it is dead."""
POLL_S = 0.02
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment of a driver that connects to a cluster on 127.0.0.1, which Ray else looks for at the machine's outer address."""


class Driver:
    """One start of the command.

    Args:
        folder: Where spec.yaml and the output go.
        tree: The spec.
        before: Words in front of the command.
        command: What Python is told to run on the spec.
        environment: On top of this process's.
    """

    def __init__(
        self,
        folder: Path,
        tree: dict[str, Any],
        before: tuple[str, ...] = (),
        command: tuple[str, ...] = ("-m", "jobs.attribute"),
        **environment: str,
    ) -> None:
        self._mark = uuid.uuid4().hex
        spec, self._log = folder / "spec.yaml", folder / f"output-{self._mark}.txt"
        spec.write_text(yaml.safe_dump(tree))
        self.words = [sys.executable, *command, str(spec)]
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*before, *self.words],
                cwd=REPOSITORY,
                env={**inherited, **environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        """SIGKILL for everything that is left of it."""
        self._process.kill()
        for pid in self._left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _left(self) -> list[int]:
        mark, found = f"{MARK}={self._mark}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:  # gone, or somebody else's
                continue
        return found

    @property
    def output(self) -> str:
        """What it said so far."""
        return self._log.read_text(errors="replace")

    def signal(self, number: signal.Signals, group: bool = False) -> float:
        """Send it, to the driver alone or, as a terminal's Ctrl-C, to its whole group; unix time."""
        assert self._process.poll() is None, f"it ended before:\n{self.output}"
        (os.killpg if group else os.kill)(self._process.pid, number)
        return time.time()

    @property
    def pid(self) -> int:
        """Of the command's own process."""
        return self._process.pid

    def children(self, name: str = "") -> list[psutil.Process]:
        """Processes that it started, and these, of an executable of this name."""
        found = psutil.Process(self._process.pid).children(recursive=True)
        return [child for child in found if not name or child.name() == name]

    def left(self, within_s: float = 10) -> list[str]:
        """What of it lives on when it has ended for so long: command lines."""
        deadline = time.monotonic() + within_s
        while (pids := self._left()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids if Path(f"/proc/{pid}").exists()]

    def wait(self, timeout_s: float = 560) -> int:
        """Exit code, when it has ended."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {timeout_s:g} s:\n{self.output}") from None

    def until(self, condition: Callable[[], Any], timeout_s: float = 560) -> Any:
        """What the condition returns, as soon as that is true. The driver must not end before."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            ended = self._process.poll()
            if ended is not None and not (found := condition()):
                raise AssertionError(f"it ended with {ended} before:\n{self.output}")
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s:\n{self.output}"
            time.sleep(POLL_S)
        return found
