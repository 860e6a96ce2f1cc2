"""Ray's own processes are killed: the command says so and ends with 8, and goes on with a cluster that works."""

import shutil
import signal
import tempfile
import time
from contextlib import ExitStack, contextmanager

import pytest

from pipeline import embedded
from pipeline.frozen import open_run
from pipeline.run import finish
from tests.conftest import run_without_ray, tuned
from tests.faults.driver import ON_LOOPBACK, Driver
from tests.faults.waiting import begun, let_go, waiting_producer, waiting_task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

ENDS_WITHIN_S = 20.0
SAYS = {"gcs_server": "Ray's control service (GCS) at", "raylet": "the raylet of this node at"}


@contextmanager
def cluster(monkeypatch):
    """A cluster of one node beside the command, which only connects to it."""
    temp = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie below it
    monkeypatch.setenv("RAY_TMPDIR", temp)
    with embedded.closed_environment():
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 3, "object_store_memory": 100 << 20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield made
        finally:
            made.shutdown()
            shutil.rmtree(temp, ignore_errors=True)


def kill(made, driver, name):
    """SIGKILL for a process of the cluster, or of the command's own Ray."""
    if made is None:
        driver.children(name)[0].kill()
    else:
        made.head_node.all_processes[name][0].process.send_signal(signal.SIGKILL)
    return time.time()


@pytest.mark.parametrize(
    ("stage", "name", "whose"),
    [
        ("score", "gcs_server", "embedded"),
        ("score", "raylet", "connected"),
        pytest.param("tune", "raylet", "embedded", marks=pytest.mark.night),
        pytest.param("tune", "gcs_server", "connected", marks=pytest.mark.night),
    ],
)
def test_a_cluster_that_is_lost_ends_the_command(
    stage, name, whose, make_spec, tmp_path, undisturbed, ledger, monkeypatch
):
    """GCS or raylet killed while workers work, an embedded Ray's and a cluster's: one sentence, exit code 8, no process left."""
    spec = make_spec("resources.score.actors=1", (waiting_producer if stage == "tune" else waiting_task)(tmp_path))
    if stage == "score":
        tuned(spec)
    tree = spec.model_dump(mode="json")
    with ExitStack() as open_:
        made = open_.enter_context(cluster(monkeypatch)) if whose == "connected" else None
        address = {"RAY_ADDRESS": made.address, **ON_LOOPBACK} if made else {}
        with Driver(tmp_path, tree, **address) as driver:
            driver.until(lambda: begun(tmp_path, stage))
            killed_s = kill(made, driver, name)
            code, seconds = driver.wait(6 * ENDS_WITHIN_S), time.time() - killed_s
            assert (8, []) == (code, driver.left()), driver.output
    assert f"error: stage {stage}: {SAYS[name]}" in driver.output
    let_go(tmp_path)
    finish(run_without_ray(spec))
    process = "GCS" if name == "gcs_server" else name
    of = "an embedded Ray" if whose == "embedded" else "a cluster"
    ledger.enter(f"SIGKILL of the {process} of {of} in stage {stage}", 2, seconds, open_run(spec.run.uri), undisturbed)
