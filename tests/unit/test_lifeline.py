"""Calls in a thread of their own, and whether the processes behind them still answer; on real sockets."""

import socket
import threading
import time

import pytest

from pipeline import lifeline
from pipeline.errors import ClusterLostError, ContractError
from pipeline.lifeline import Lifeline, call, in_thread

FOREVER_S = 3600.0


@pytest.fixture
def listening():
    """A process that answers, as long as the socket is open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def watching(server, patience_s):
    return Lifeline([("the service", *server.getsockname(), patience_s)])


def test_what_answers_is_there_and_what_refuses_is_lost(listening):
    """The sentence names process, host and port."""
    line = watching(listening, 0.0)
    assert "" == line.lost()
    host, port = listening.getsockname()
    listening.close()
    assert f"the service at {host}:{port} does not answer any more" == line.lost()


def test_a_silence_is_borne_for_a_while_unless_something_failed_already(listening):
    """A service that may be started again has time; an error beside it needs no second proof."""
    line = watching(listening, FOREVER_S)
    listening.close()
    assert "" == line.lost()
    assert "does not answer" in line.lost(patient=False)


@pytest.fixture
def lines(monkeypatch, listening):
    """Calls watch the socket instead of Ray's."""
    monkeypatch.setattr(Lifeline, "of_driver", lambda: watching(listening, 0.0))
    monkeypatch.setattr(lifeline, "POLL_S", 0.01)


def test_a_call_returns_and_raises_what_its_action_does(lines):
    """From another thread; an error of ours comes as it is."""
    assert threading.get_ident() != call("score", threading.get_ident)

    def fail():
        raise ContractError("no loss today")

    with pytest.raises(ContractError, match="no loss today"):
        call("score", fail)


def test_a_call_ends_when_the_cluster_is_lost(lines, listening):
    """While the action still waits for an answer that never comes."""
    go = threading.Event()
    done = in_thread(lambda: call("tune", go.wait), "caller")
    time.sleep(0.05)
    assert not done.done()
    listening.close()
    error = done.exception(timeout=60)
    go.set()
    assert isinstance(error, ClusterLostError)
    assert error.message.startswith("stage tune: the service at 127.0.0.1:")
    assert (8, True) == (error.exit_code, "the same command goes on from there" in error.hint)


def test_an_exit_within_ray_is_no_good_end(lines):
    """Ray raises SystemExit(0) where its connection is closed: the work is not done."""

    def leave():
        raise SystemExit(0)

    with pytest.raises(ClusterLostError, match="stage score: Ray ended before the work did"):
        call("score", leave)


def test_an_error_beside_a_lost_cluster_is_its_loss(lines, listening):
    """What Ray raises then is all kinds of errors: the loss is the news, they are its detail."""

    def fail():
        listening.close()
        raise RuntimeError("connection reset")

    with pytest.raises(ClusterLostError, match=r"does not answer any more \(RuntimeError: connection reset\)"):
        call("score", fail)
