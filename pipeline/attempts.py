"""Who works on which shard since when, and how often it was begun: a poison shard is quarantined, a stalled one is seen."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """A shard that an actor works on.

    Args:
        name: Of the work.
        worker: Where, for people.
        begun_at_s: Unix time when it was begun, for people.
        lasting_s: For how many seconds it has lasted, by the counter's clock, which no setting of the time moves.
        number: How often it has been begun, this time included.
        actor: Handle of the Ray actor.
    """

    name: str
    worker: str
    begun_at_s: float
    lasting_s: float
    number: int
    actor: Any


class Attempts:
    """Counts attempts; one for all actors of a stage, itself a Ray actor. An attempt that neither ends nor fails was a death."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}
        self._running: dict[str, dict[str, tuple[float, Attempt]]] = {}
        """Of each actor the shards that it works on, with the monotonic time when they were begun."""

    def hello(self, actor_id: str) -> None:
        """An actor has started, perhaps again: whatever it worked on before died with it."""
        self._running[actor_id] = {}

    def begin(self, actor_id: str, actor: Any, worker: str, name: str, alone: bool) -> int:
        """Which attempt this is, from 1; or 0 for a shard that was begun before and should be tried with no other beside it."""
        before = self._begun.get(name, 0)
        if before and not alone:
            return 0
        self._begun[name] = before + 1
        attempt = Attempt(name, worker, time.time(), 0.0, before + 1, actor)
        self._running.setdefault(actor_id, {})[name] = (time.monotonic(), attempt)
        return before + 1

    def end(self, actor_id: str, worker: str, name: str) -> None:
        """A shard is done, or failed with an error that will come home. Of an actor that has started again since, no news."""
        _, attempt = self._running.get(actor_id, {}).get(name, (0.0, None))
        if attempt is not None and attempt.worker == worker:
            del self._running[actor_id][name]
            self._begun.pop(name, None)

    def running(self) -> list[Attempt]:
        """What is worked on, longest first."""
        now_s = time.monotonic()
        begun = sorted(
            (pair for shards in self._running.values() for pair in shards.values()), key=lambda pair: pair[0]
        )
        return [replace(attempt, lasting_s=now_s - begun_s) for begun_s, attempt in begun]


def start_attempts() -> Any:
    """The counter as a Ray actor beside the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(Attempts).options(**options).remote()


class Gate:
    """Lets shards through together, or one alone: whose last attempt died is tried with nobody beside it to suspect."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together, self._alone, self._waiting = 0, False, 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """When all others are through."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._alone and not self._together)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


class Worker:
    """One actor's side of the counter.

    Args:
        attempts: The counter.
    """

    def __init__(self, attempts: Any) -> None:
        import ray

        context = ray.get_runtime_context()
        self._attempts, self._actor_id, self._actor = attempts, context.get_actor_id(), context.current_actor
        self._where = f"{socket.gethostname()} pid {os.getpid()}"
        self._gate = Gate()
        ray.get(attempts.hello.remote(self._actor_id))

    @contextmanager
    def attempt(self, name: str) -> Iterator[int]:
        """Around the work on a shard: which attempt it is. A shard that was begun before is worked on alone."""
        with self._gate.together():
            number = self._begin(name, alone=False)
            if number:
                yield from self._until_end(name, number)
                return
        with self._gate.alone():
            yield from self._until_end(name, self._begin(name, alone=True))

    def _begin(self, name: str, alone: bool) -> int:
        import ray

        return int(ray.get(self._attempts.begin.remote(self._actor_id, self._actor, self._where, name, alone)))

    def _until_end(self, name: str, number: int) -> Iterator[int]:
        try:
            yield number
        finally:  # not reached by a death, which is what is counted
            self._attempts.end.remote(self._actor_id, self._where, name)
