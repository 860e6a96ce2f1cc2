"""Actors of a run under a test's hand: each stops before every request to the store, and goes on, dies or sleeps as it is told.

The pipeline is the real one, on a real store. What is taken in hand is `storage.retried`, which every request goes through.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pipeline import folder, storage

HANGS_S = 120.0
_here = threading.local()


def is_torn() -> bool:
    """Whether the write that this thread is making is to be cut off in the middle."""
    return getattr(_here, "torn", False)


class Crash(BaseException):
    """SIGKILL, as near as a thread comes to it: from here on nothing of it reaches the store."""


class Actor:
    """Pipeline code in a thread, stopped before its first request to the store.

    Args:
        name: For people.
        action: What it does.
        root: URI whose requests are taken in hand; all others (the corpus's) pass.
    """

    def __init__(self, name: str, action: Callable[[], Any], root: str) -> None:
        self.name, self.error, self.done, self.ended = name, None, False, False
        self.at = ""
        self._action, self._root, self._order, self._dead = action, root, "go", False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()
        self._wait()

    def __repr__(self) -> str:
        return f"{self.name} at {self.at.removeprefix(self._root)}"

    def _run(self) -> None:
        _here.actor = self
        try:
            self._action()
            self.ended = True
        except Crash:
            pass
        except BaseException as error:  # noqa: BLE001  the test looks at it
            self.error = error
        self.done = True
        self._stopped.release()

    def _wait(self) -> None:
        if not self._stopped.acquire(timeout=HANGS_S):
            raise AssertionError(f"{self} hangs")

    def step(self, order: str = "go") -> None:
        """Let it make one request.

        Args:
            order: `go`; `crash before` or `crash after` the request; `torn`: a write is cut off in the middle; `lose`: the
                request is done and its answer lost, so that it is made again.
        """
        self._order = order
        self._go.release()
        self._wait()

    def end(self) -> None:
        """Let it run to its end."""
        while not self.done:
            self.step()

    def request(self, uri: str, real: Callable[..., Any], action: Callable[[], Any]) -> Any:
        """One request, on the actor's own thread."""
        if self._dead:
            raise Crash
        if not uri.startswith(self._root) or getattr(_here, "within", False):
            return real(uri, action)
        self.at = uri
        self._stopped.release()
        self._go.acquire()
        order = self._order
        if order == "crash before":
            self._die()
        _here.within, _here.torn = True, order == "torn"
        try:
            result = real(uri, _answer_lost(action) if order == "lose" else action)
        except Crash:
            self._dead = True
            raise
        finally:
            _here.within = _here.torn = False
        if order in ("crash after", "torn"):
            self._die()
        return result

    def _die(self) -> None:
        self._dead = True
        raise Crash


def _answer_lost(action: Callable[[], Any]) -> Callable[[], Any]:
    lost = []

    def once_lost() -> Any:
        result = action()
        if not lost:
            lost.append(True)
            raise ConnectionResetError("the answer was lost")
        return result

    return once_lost


class _OneByOne:
    """A thread pool's shape on the caller's thread, so that an actor's requests have an order."""

    def __init__(self, _: int) -> None:
        pass

    def __enter__(self) -> _OneByOne:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, action: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        return map(action, items)


@contextmanager
def in_hand() -> Iterator[pytest.MonkeyPatch]:
    """Requests of actors are theirs to make; those of other threads pass."""
    real_retried, real_write = storage.retried, storage.write_local

    def retried(uri: str, action: Callable[[], Any]) -> Any:
        actor = getattr(_here, "actor", None)
        return real_retried(uri, action) if actor is None else actor.request(uri, real_retried, action)

    def write_local(fs: Any, path: str, data: bytes, only_new: bool) -> None:
        if not is_torn():
            return real_write(fs, path, data, only_new)
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp"), "wb") as file:
            file.write(data[: len(data) // 2])
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "retried", retried)
        patch.setattr(storage, "write_local", write_local)
        patch.setattr(storage, "FIRST_PAUSE_S", 0.0001)
        patch.setattr(folder, "ThreadPoolExecutor", _OneByOne)
        yield patch
