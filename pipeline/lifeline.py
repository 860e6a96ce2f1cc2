"""Calls of Ray that may wait for long, in a thread of their own: signals and the cluster's end still reach the caller."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import TypeVar

from .errors import ClusterLostError, PipelineError, first_line

POLL_S = 1.0
CONNECT_S = 2.0
SILENT_S = 3.0
"""For so long a local process may refuse connections; nothing starts it again."""
GIVES_UP, RAY_GIVES_UP_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
"""Ray's setting for a GCS that is away, and its default: it then ends this process, without a word."""
_Value = TypeVar("_Value")


class Lifeline:
    """Sees whether the two processes of Ray are there without which a driver cannot go on: the GCS and its node's raylet.

    Asks their ports, not Ray, whose calls wait for them.
    """

    def __init__(self) -> None:
        import ray

        context = ray.get_runtime_context()
        node = next(each for each in ray.nodes() if each["NodeID"] == context.get_node_id())
        control = _place(context.gcs_address)
        # of a cluster it may be started again, elsewhere too; that of an embedded Ray is not
        gives_up_s = float(os.environ.get(GIVES_UP, RAY_GIVES_UP_S))
        patience_s = SILENT_S if control[0].startswith("127.") else gives_up_s * 2 / 3
        self._watched = [
            ("Ray's control service (GCS)", control, patience_s),
            ("the raylet of this node", (node["NodeManagerAddress"], node["NodeManagerPort"]), SILENT_S),
        ]
        self._heard_s = [time.monotonic()] * len(self._watched)

    def lost(self, patient: bool = True) -> str:
        """Which of them is gone, or nothing.

        Args:
            patient: False if something failed already, so that one refusal is enough.
        """
        for i, (name, place, patience_s) in enumerate(self._watched):
            if _answers(place):
                self._heard_s[i] = time.monotonic()
            elif not patient or time.monotonic() - self._heard_s[i] >= patience_s:
                return f"{name} at {place[0]}:{place[1]} does not answer any more"
        return ""


def _place(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def _answers(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=CONNECT_S).close()
    except OSError:
        return False
    return True


def call(stage: str, action: Callable[[], _Value]) -> _Value:
    """Do something with Ray in a thread, and wait for it; what it returns.

    The waiting thread is never inside of Ray's native code, which answers signals late or with errors of its own, nor is it
    the one in which Ray puts signal handlers of its own in place.

    Raises:
        ClusterLostError: The cluster is gone, or Ray ended under the action, which is then left to itself.
        Exception: Of the action.
    """
    lifeline: list[Lifeline] = []

    def work() -> _Value:
        lifeline.append(Lifeline())
        return action()

    done = in_thread(work, f"stage {stage}")
    while not futures.wait([done], POLL_S).done:
        if lifeline and (lost := lifeline[0].lost()):
            raise _error(stage, lost)
    error = done.exception()
    if error is None:
        return done.result()
    if isinstance(error, SystemExit):  # so Ray ends a call when its connection is closed
        raise _error(stage, "Ray ended before the work did") from error
    lost = "" if isinstance(error, PipelineError) or not lifeline else lifeline[0].lost(patient=False)
    if lost:
        raise _error(stage, f"{lost} ({type(error).__name__}: {first_line(error)})") from error
    raise error


def in_thread(action: Callable[[], _Value], name: str, over: threading.Event | None = None) -> futures.Future[_Value]:
    """Start an action in a thread that keeps no process from ending; its value or error to come.

    Args:
        action: What is done.
        name: Of the thread.
        over: When the thread may end; null for at once.
    """
    done: futures.Future[_Value] = futures.Future()

    def work() -> None:
        try:
            done.set_result(action())
        except BaseException as error:  # noqa: BLE001  it goes to whoever waits
            done.set_exception(error)
        if over is not None:
            over.wait()

    threading.Thread(target=work, name=name, daemon=True).start()
    return done


def _error(stage: str, what: str) -> ClusterLostError:
    return ClusterLostError(
        f"stage {stage}: {what}",
        "was its process killed, for want of memory perhaps? What is committed stays: with a cluster that works, the same "
        "command goes on from there",
    )
