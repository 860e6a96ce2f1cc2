"""The environment of an embedded Ray: always with a token, and gone afterwards."""

import os
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import pytest

from pipeline import embedded
from pipeline.embedded import closed_environment, token_environment

RAYS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_BACKEND_LOG_LEVEL", "DASHBOARD_METRIC_PORT")


pytestmark = pytest.mark.slow


def apart(look, *given):
    """Do something in a process of its own: the environment of this one may be that of a Ray which it is connected to."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(look, *given).result()


def tokens(mode):
    """Those of two Rays one after the other; what is left of each in the environment."""
    for name in RAYS:
        os.environ.pop(name, None)
    if mode:
        os.environ["RAY_AUTH_MODE"] = mode
    found = []
    for _ in range(2):
        with closed_environment():
            assert "token" == os.environ["RAY_AUTH_MODE"]
            token = os.environ["RAY_AUTH_TOKEN"]
        found.append((token, [name for name in RAYS if name in os.environ]))
    return found


@pytest.mark.parametrize("mode", [None, "disabled", "token"])
def test_there_is_a_token_whatever_the_mode_was(mode):
    """A random one of 256 bits, another each time; nothing of it is left in the environment."""
    (one, left), (other, _) = apart(tokens, mode)
    assert ["RAY_AUTH_MODE"] * bool(mode) == left
    assert (64, 64, True) == (len(one), len(other), one != other)


def kept():
    os.environ |= {"RAY_AUTH_TOKEN": "mine", "RAY_BACKEND_LOG_LEVEL": "info"}
    with closed_environment():
        return [os.environ[name] for name in ("RAY_AUTH_TOKEN", "RAY_BACKEND_LOG_LEVEL")]


def test_a_token_of_ones_own_and_other_settings_stay():
    """What the user has set for Ray is kept, but for the mode."""
    assert ["mine", "info"] == apart(kept)


def as_ray_reads_it():
    """Mode, token and address that Ray takes before, in and after two environments."""
    from ray._private import services
    from ray._raylet import AuthenticationTokenLoader, get_authentication_mode

    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_AUTH_TOKEN", None)
    with token_environment():
        pass  # whatever was read before the variables were set
    found = [int(get_authentication_mode())]
    for token in ("one", "two"):
        os.environ["RAY_AUTH_TOKEN"] = token
        with closed_environment():
            read = AuthenticationTokenLoader.instance().get_raw_token()
            found.append((int(get_authentication_mode()), read, services.get_node_ip_address()))
        del os.environ["RAY_AUTH_TOKEN"]
    return [*found, int(get_authentication_mode())]


def test_ray_reads_mode_and_token_anew():
    """Though it was imported before, in another mode and without a token; afterwards, too. It listens on 127.0.0.1."""
    from ray._raylet import AuthenticationMode

    inside = [(AuthenticationMode.TOKEN, token, "127.0.0.1") for token in ("one", "two")]
    assert [AuthenticationMode.DISABLED, *inside, AuthenticationMode.DISABLED] == apart(as_ray_reads_it)


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
