"""SIGTERM and Ctrl-C: a command ends soon, with a code that says so, and leaves no process behind."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

ENDS_WITHIN_S = 6.0
"""So long a stopped command may clean up; then it is ended as it is, which costs what is not committed and no more."""
KILLS_WITHIN_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """SIGTERM, as a node's end or `ray job stop` send it, or Ctrl-C. Typer answers a KeyboardInterrupt itself, without a word."""


class Stopping:
    """Answers both signals for the time of the block: raises Stopped in the main thread, once; further ones change nothing.

    Native code can keep the main thread from raising it, and foreign code can swallow it. So a thread is told at once, and
    ends the process if it is still there ENDS_WITHIN_S later.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal that came."""
        self._over = threading.Event()

    def __enter__(self) -> Stopping:
        self._heard, written = socket.socketpair()
        written.setblocking(False)
        self._written = written
        self._before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        self._descriptor = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stopping", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._over.set()
        self._written.close()  # the thread reads its end

    def _stop(self, number: int, _: object) -> None:
        if self.number is None:
            self.number = number
            raise Stopped(128 + number)

    def _watch(self) -> None:
        with self._heard:
            while heard := self._heard.recv(1):
                if heard[0] in SIGNALS and not self._over.wait(ENDS_WITHIN_S):
                    sys.stderr.write(stopped_text())
                    end_process(128 + heard[0])


def stopped_text() -> str:
    """What a stopped command says."""
    from pipeline.observe import for_terminal, without_credentials

    bar = "\n" if sys.stderr.isatty() else ""  # where a progress bar is, its line is not ended
    words = shlex.join(map(without_credentials, sys.orig_argv))
    said = f"stopped; what is committed stays, and the same command goes on from there:\n  {words}"
    return f"{bar}{for_terminal(said)}\n"


def end_process(code: int) -> NoReturn:
    """End this process and all that it started at once. Nothing is waited for: threads in Ray's calls may never return."""
    import psutil

    for number in SIGNALS:
        with suppress(ValueError):  # not the main thread, whose handler then stays and does nothing
            signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
            stream.flush()
    with suppress(psutil.Error):
        while children := psutil.Process().children(recursive=True):
            for child in children:
                with suppress(psutil.Error):
                    child.kill()
            if psutil.wait_procs(children, KILLS_WITHIN_S)[1]:
                break  # in the kernel's hands
    os._exit(code)
