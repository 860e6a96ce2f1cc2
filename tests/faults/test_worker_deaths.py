"""Workers are killed for real; what they leave is finished by others, and the result is that of an undisturbed run."""

import os
from pathlib import Path

import pytest

from pipeline.errors import ClusterError
from pipeline.run import attribute, run_stage
from tests.conftest import read_scores, run_without_ray

pytestmark = pytest.mark.ray


def test_a_tuning_worker_killed_mid_query_is_replaced(ray_cluster, make_spec, tmp_path):
    """SIGKILL after the first query's steps, before its commit: the restarted group makes both counterparts."""
    marker = tmp_path / "died"
    run = run_stage(
        make_spec(f"producer={{name: 'tests.faults.mortal:MortalProducer', options: {{marker: {marker}}}}}"),
        "tune",
    )
    assert marker.exists()
    undisturbed = run_without_ray(make_spec(name="other"))
    for query_id in run.query_ids:
        assert undisturbed.counterpart_tensors(query_id) == run.counterpart_tensors(query_id)


def test_a_scoring_actor_killed_mid_shard_is_replaced(ray_cluster, make_spec, tmp_path):
    """SIGKILL in a forward pass: its shards are scored by others, every row once, with the undisturbed run's scores."""
    marker = tmp_path / "died"
    spec = make_spec(
        f"task={{name: 'tests.faults.mortal:MortalTask', options: {{marker: {marker}}}}}", "resources.score.actors=2"
    )
    run = attribute(spec)
    assert marker.exists()
    assert read_scores(run_without_ray(make_spec(name="other"))).equals(read_scores(run))
    assert Path(run.uri("_SUCCESS")).exists()


def test_a_shard_that_kills_every_actor_ends_the_run(ray_cluster, make_spec):
    """Retries are bounded: a poisonous shard is an error with a hint, never a loop."""
    spec = make_spec(
        "task={name: 'tests.faults.mortal:PoisonedTask'}",
        "resources.score={actors: 1, max_failures: 1}",
        "score.shard_rows=1000",
    )
    with pytest.raises(ClusterError, match=r"stage score: (.|\n)*run the same command again"):
        attribute(spec)
    assert os.path.exists(spec.run.uri)
