"""Nodes of a cluster go away while they work: others take over, and the result is that of an undisturbed run."""

import shutil
import tempfile
import time

import pytest

from pipeline import storage
from pipeline.frozen import open_run
from pipeline.specfile import parse_spec
from tests.faults.driver import ON_LOOPBACK, Driver
from tests.faults.mortal import came, mortal_producer, mortal_task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

SHARD_ROWS = 16
STORE_BYTES = 100 << 20
SEEN_DEAD = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
"""A node that is silent for five seconds is dead to the others; by default it takes longer."""


@pytest.fixture
def cluster(monkeypatch):
    """A head without CPUs, and three nodes that work."""
    from pipeline import embedded

    temp = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie below it
    monkeypatch.setenv("RAY_TMPDIR", temp)
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False, "_system_config": SEEN_DEAD}
    with embedded.closed_environment():
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(3):
            made.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        yield made
        made.shutdown()
    shutil.rmtree(temp, ignore_errors=True)


def remove(cluster, node_id):
    """SIGKILL for all processes of a node."""
    node = next(node for node in cluster.worker_nodes if node.node_id == node_id)
    cluster.remove_node(node, allow_graceful=False)


def test_nodes_that_go_away_while_they_tune_and_score_are_replaced(cluster, world, tmp_path, undisturbed, ledger):
    """A node with a tuning worker mid-query, then one with a scoring actor mid-shard: what is left of the cluster does all."""
    queries, shards, row = tmp_path / "queries", tmp_path / "shards", 4 * SHARD_ROWS
    overrides = [
        mortal_producer(queries, "hang"),
        mortal_task(shards, world.pixels[row], "hang"),
        f"score.shard_rows={SHARD_ROWS}",
        f"resources.address={cluster.address}",
        "resources.score.actors=2",
    ]
    tree = parse_spec(world.tree(tmp_path / "run"), overrides).model_dump(mode="json")
    removed_s = []
    with Driver(tmp_path, tree, **ON_LOOPBACK) as driver:
        for log in (queries, shards):
            (_, _, node), *_ = driver.until(lambda log=log: came(log))
            removed_s.append(time.time())
            remove(cluster, node)
        assert 0 == driver.wait(300), driver.output
    run = open_run(tree["run"]["uri"])
    committed = storage.objects(run.uri("counterparts"))
    tuned_s = min(each.modified_s for name, each in committed.items() if name.endswith("meta.json")) - removed_s[0]
    scored_s = run.receipt(0, row // SHARD_ROWS).finished_at_s - removed_s[1]
    ledger.enter("loss of the node of a tuning worker", len(came(queries)), tuned_s, run, undisturbed)
    ledger.enter("loss of the node of a scoring actor", len(came(shards)), scored_s, run, undisturbed)
