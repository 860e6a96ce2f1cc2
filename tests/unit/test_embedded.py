"""The environment of an embedded Ray: always with a token, and gone afterwards."""

import os
import subprocess
import time

import psutil
import pytest

from pipeline import embedded
from pipeline.embedded import closed_environment, token_environment

RAYS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_BACKEND_LOG_LEVEL", "DASHBOARD_METRIC_PORT")


@pytest.mark.parametrize("mode", [None, "disabled", "token"])
def test_there_is_a_token_whatever_the_mode_was(monkeypatch, mode):
    """A random one of 256 bits, another each time; nothing of it is left in the environment."""
    for name in RAYS:
        monkeypatch.delenv(name, raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    tokens = set()
    for _ in range(2):
        with closed_environment():
            assert "token" == os.environ["RAY_AUTH_MODE"]
            tokens.add(os.environ["RAY_AUTH_TOKEN"])
        assert ["RAY_AUTH_MODE"] * bool(mode) == [name for name in RAYS if name in os.environ]
    assert [64, 64] == [len(token) for token in tokens]


def test_a_token_of_ones_own_and_other_settings_stay(monkeypatch):
    """What the user has set for Ray is kept, but for the mode."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "info")
    with closed_environment():
        assert ["mine", "info"] == [os.environ[name] for name in ("RAY_AUTH_TOKEN", "RAY_BACKEND_LOG_LEVEL")]


def test_ray_reads_mode_and_token_anew(monkeypatch):
    """Though it was imported before, in another mode and without a token; afterwards, too. It listens on 127.0.0.1."""
    from ray._private import services
    from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with token_environment():
        pass  # whatever was read before the variables were set
    assert AuthenticationMode.DISABLED == get_authentication_mode()
    for token in ("one", "two"):
        with monkeypatch.context() as patch:
            patch.setenv("RAY_AUTH_TOKEN", token)
            with closed_environment():
                assert AuthenticationMode.TOKEN == get_authentication_mode()
                assert token == AuthenticationTokenLoader.instance().get_raw_token()
                assert "127.0.0.1" == services.get_node_ip_address()
    assert AuthenticationMode.DISABLED == get_authentication_mode()


@pytest.mark.slow
def test_a_start_that_failed_leaves_no_process():
    """What was started since is killed, its children too; what was there before stays."""
    with subprocess.Popen(["sleep", "600"]) as own:
        before = psutil.Process().children(recursive=True)
        with subprocess.Popen(["sh", "-c", "sleep 600 & wait"]) as started:
            while not (children := psutil.Process(started.pid).children()):
                time.sleep(0.01)
            embedded.end_children(but=before)
            assert -9 == started.wait(60)
            psutil.wait_procs(children, 60)
            assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
        assert own.poll() is None
        own.kill()
