"""The Ray that a run starts for itself: on this machine alone, closed to everybody without its token, and quiet."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .observe import say

if TYPE_CHECKING:
    import psutil

STORE_BYTES = 256 << 20
"""Its object store: only receipts pass through it."""
STARTS, LATE = 3, "timed out during startup"
"""How often a start is tried, and what Ray says of one that took longer than the 30 seconds that it allows itself."""
TOKEN_BYTES = 32
NO_PORT = "65536"
DEFAULT_ENVIRONMENT = {
    "AUTOSCALER_METRIC_PORT": NO_PORT,  # with the next two: servers of metrics ask for no token, so that none is started
    "DASHBOARD_METRIC_PORT": NO_PORT,
    "RAY_enable_metrics_collection": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else its C++ core talks between the progress lines
    "RAY_prestart_worker_first_driver": "0",  # workers without the run's runtime environment, which none of ours is
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that asks whether this machine is about to be taken away
}
"""Set where nothing else is set. The two last save two and a half CPU seconds of a run."""


@contextmanager
def closed_environment() -> Iterator[None]:
    """The environment in which Ray starts on 127.0.0.1 and serves nobody without the token; as it was before, afterwards."""
    with token_environment(DEFAULT_ENVIRONMENT):
        from ray._private import ray_constants

        clusters = ray_constants.ENABLE_RAY_CLUSTER
        ray_constants.ENABLE_RAY_CLUSTER = (
            False  # Ray's own switch, for macOS, to listen on the loopback interface alone
        )
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = clusters


@contextmanager
def token_environment(defaults: Mapping[str, str] | None = None) -> Iterator[None]:
    """The environment in which Ray asks for a token and has one; as it was before, afterwards.

    The token is RAY_AUTH_TOKEN where that is set, else a random one that only this process and its children have: it is in
    their environment, which other users cannot read, and in no file. RAY_AUTH_MODE=disabled is overruled: everybody who
    reaches an open Ray runs code as its user.

    Args:
        defaults: Further variables, each set where it is not.
    """
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(TOKEN_BYTES)
    wanted = {**(defaults or {}), **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    before = {name: os.environ.get(name) for name, value in wanted.items() if os.environ.get(name) != value}
    os.environ.update(wanted)
    _read_environment()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _read_environment()


def _read_environment() -> None:
    """Ray keeps mode and token as they were at its import or last use."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # of its native part

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def start(**arguments: Any) -> None:
    """Start it, within `closed_environment`, and connect to it; once more if it is not there in time.

    Args:
        arguments: Of `ray.init`, on top of ours.

    Raises:
        Exception: Of `ray.init`.
    """
    import psutil

    for left in reversed(range(STARTS)):
        before = psutil.Process().children(recursive=True)
        try:
            _start(arguments)
        except Exception as error:  # Ray raises a bare one when its time is over
            end_children(but=before)
            if not left or LATE not in str(error):
                raise
            say("warning: Ray did not start in time, as happens on a busy machine; it is started again")
        else:
            return


def end_children(but: Sequence[psutil.Process]) -> None:
    """Kill what this process started, and what that started: a start that failed leaves its processes behind."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        if child not in but:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _start(arguments: Mapping[str, Any]) -> None:
    import ray

    defaults = {
        "num_cpus": (os.cpu_count() or 1) + 1,  # one more than there are, for Ray's own tasks beside the workers
        "object_store_memory": STORE_BYTES,
    }
    with _silent_stderr():  # it says that it was asked to be quiet
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **{**defaults, **arguments},
        )


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what native code writes to standard error in the block; exceptions still tell what went wrong.

    What Python writes, as when a signal stops the command in the meantime, is shown.
    """
    nowhere, before = os.open(os.devnull, os.O_WRONLY), sys.stderr
    with open(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as shown:
        os.dup2(nowhere, 2)
        sys.stderr = shown
        try:
            yield
        finally:
            sys.stderr = before
            os.dup2(shown.fileno(), 2)
            os.close(nowhere)
