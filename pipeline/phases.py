"""How far a worker is: told by whoever works, heard by whoever listens, left in the run's folder for other processes to see."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TypeVar

from .errors import PipelineError
from .observe import duration, every
from .storage import names, read_bytes, remove_folder, write_bytes

EVERY_S = 2.0
"""Between two notes in the run's folder."""
OLD_S = 600.0
"""What is older was left by a worker that is gone."""
FOLDER = ".train-phases"
"""In the run's folder: a note of each worker of stage tune."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Phase:
    """Something that a worker does.

    Args:
        name: What it is.
        done: How much of it is done.
        total: Of how much.
        unit: What is counted.
        started_s: When it began, in seconds since 1970.
        at_s: When it was so far.
    """

    name: str
    done: int
    total: int
    unit: str
    started_s: float
    at_s: float

    def line(self) -> str:
        """As a person reads it: what it is, how far, and how long the rest of it takes."""
        left_s = (self.total - self.done) * (self.at_s - self.started_s) / self.done if self.done else None
        left = f", ETA {duration(left_s)}" if left_s is not None and self.done < self.total else ""
        return f"{self.name} {self.done:,}/{self.total:,} {self.unit}".rstrip() + left


_listeners: list[Callable[[str, int, int, str], None]] = []


def at(name: str, done: int, total: int, unit: str) -> None:
    """Say how far this process is."""
    for listener in _listeners:
        listener(name, done, total, unit)


def each(name: str, unit: str, items: Sequence[_Item]) -> Iterator[_Item]:
    """Items, one after the other; before each one is said how many are done."""
    for done, item in enumerate(items):
        at(name, done, len(items), unit)
        yield item


@contextmanager
def heard_by(listener: Callable[[str, int, int, str], None]) -> Iterator[None]:
    """In the block, a listener hears what is said."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Note:
    """What a worker is at, and what of that is in the run's folder.

    Args:
        run_uri: The run's folder.
        rank: The worker's.
    """

    def __init__(self, run_uri: str, rank: int) -> None:
        self._uri = f"{run_uri}/{FOLDER}/{rank:05d}.json"
        self._phase: Phase | None = None
        self._written: Phase | None = None

    def __call__(self, name: str, done: int, total: int, unit: str) -> None:
        """See `heard_by`."""
        now, before = time.time(), self._phase
        started_s = before.started_s if before is not None and before.name == name else now
        self._phase = Phase(name, done, total, unit, started_s, now)

    def _write(self) -> None:
        phase = self._phase
        if phase is not None and phase != self._written:
            write_bytes(self._uri, json.dumps(asdict(phase)).encode())
            self._written = phase

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Listen for the time of the block, and write in a thread of its own: a slow store does not slow the work."""
        with heard_by(self), every(EVERY_S, self._write):
            yield


def of_run(run_uri: str) -> Phase | None:
    """What the worker of stage tune is at that wrote last; null if none does, or nothing can be read."""
    folder_uri, found = f"{run_uri}/{FOLDER}", []
    try:
        for name in names(folder_uri):
            found.append(Phase(**json.loads(read_bytes(f"{folder_uri}/{name}"))))
    except (PipelineError, ValueError, TypeError):
        return None
    last = max(found, key=lambda phase: phase.at_s, default=None)
    return last if last is not None and time.time() - last.at_s < OLD_S else None


def forget(run_uri: str) -> None:
    """Delete what workers left in the run's folder."""
    remove_folder(f"{run_uri}/{FOLDER}")
