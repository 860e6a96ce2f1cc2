"""The real thing: Ray Train and Ray Data workers, the command as a process, your own code from outside the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import yaml

from pipeline import score
from pipeline.errors import ClusterError, ContractError, InputError
from pipeline.run import attribute, run_stage
from tests.conftest import CORPUS_ROWS, read_scores, run_without_ray, tuned

pytestmark = pytest.mark.ray


def command(*words, cwd, **environment):
    """Run a Python module as a user does, from a folder of their own."""
    ours = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=ours, capture_output=True, text=True, timeout=240)


def test_workers_write_the_bytes_that_one_process_writes(make_spec, ray_cluster, capsys):
    """2 tuning workers and 3 scoring actors give the score files of a run without Ray, to the byte; progress is shown.

    Stages run one after the other here, as an orchestrator calls them.
    """
    spec = make_spec("resources.tune.workers=2", "resources.score.actors=3", "score.shard_rows=32")
    for stage in ("tune", "score", "rank"):
        run = run_stage(spec, stage)
    other = run_without_ray(make_spec("score.shard_rows=32", name="other"))
    for ours in sorted(Path(run.uri("scores")).rglob("*.parquet")):
        assert ours.read_bytes() == Path(other.uri("scores"), ours.relative_to(run.uri("scores"))).read_bytes()
    assert 2 * CORPUS_ROWS == len(read_scores(run))
    assert Path(run.uri("_SUCCESS")).exists()
    assert not Path(run.uri(".train")).exists()
    shown = capsys.readouterr().err
    assert "tune  2/2 queries  100%" in shown
    assert "score 5/5 shards  100%" in shown


def test_other_workers_and_waves_give_the_same_scores(make_spec, ray_cluster, monkeypatch, capsys):
    """Three actors, and shards in waves of 2 of 5: to the bit what one process scores as a whole; one count goes through."""
    monkeypatch.setattr(score, "SHARDS_PER_WAVE", 2)
    whole = run_without_ray(make_spec("score.shard_rows=1000", name="whole"))
    run = attribute(tuned(make_spec("score.shard_rows=32", "resources.score.actors=3")))
    assert read_scores(whole).equals(read_scores(run))
    assert 1 == capsys.readouterr().err.count("score 5/5 shards  100%")


def test_natural_steps_do_not_depend_on_the_workers(make_spec, ray_cluster):
    """Two workers, each with half of the sample, fit and solve together what one process does alone."""
    natural = ("producer={name: natural, damping: 0.01}", "score.batch_rows=16")
    alone = run_without_ray(make_spec(*natural, name="alone"))
    together = run_stage(make_spec(*natural, "resources.tune.workers=2"), "tune")
    assert Path(together.uri("fitted", "meta.json")).exists()
    for query_id in alone.query_ids:
        one, two = (safetensors.torch.load(run.counterpart_tensors(query_id)) for run in (alone, together))
        moved = alone.counterpart_meta(query_id)["change_norm"]
        apart = sum(float((tensor - two[name]).double().pow(2).sum()) for name, tensor in one.items()) ** 0.5
        assert apart <= 1e-4 * moved


def test_retaining_workers_write_the_bytes_that_one_process_writes(make_spec, ray_cluster):
    """Two workers share out the queries; each holds the whole sample."""
    retain = "producer={name: retain, steps: 10}"
    alone = run_without_ray(make_spec(retain, name="alone"))
    shared = run_stage(make_spec(retain, "resources.tune.workers=2"), "tune")
    for query_id in alone.query_ids:
        assert alone.counterpart_tensors(query_id) == shared.counterpart_tensors(query_id)


def test_no_gpu_where_one_is_asked_for_is_an_error(make_spec, ray_cluster):
    """No silent fallback to the CPU: tuning and scoring both say what is missing."""
    with pytest.raises(ClusterError, match=r"resources\.tune: asked for 1 x 1 GPU, the cluster has 0"):
        attribute(make_spec("resources.tune.gpus=1"))
    tuned(make_spec())
    with pytest.raises(ClusterError, match=r"resources\.score: asked for 2 x 1 GPU, the cluster has 0"):
        run_stage(make_spec("resources.score.gpus=1"), "score")
    with pytest.raises(ClusterError, match=r"asked for 2 x 99 CPU"):
        run_stage(make_spec("resources.score.cpus=99", "resources.score.actors=2"), "score")


def test_errors_of_workers_come_home_as_they_were(make_spec, ray_cluster, world, tmp_path):
    """Weights that do not fit and too many rejects are our own errors, not Ray's, with their messages."""
    with pytest.raises(ContractError, match=r"0\.weight is \[8, 1, 3, 3\] in the file"):
        attribute(make_spec("model.arguments.width=4", name="narrow"))
    table = world.table().to_pylist()
    table[3]["pixels"] = table[3]["pixels"][:2]
    path = tmp_path / "bad.parquet"
    pq.write_table(type(world.table()).from_pylist(table, schema=world.table().schema), path)
    with pytest.raises(InputError, match=r"1 of 150 rows could not be scored(.|\n)*row 3: pixels: got 2 values"):
        attribute(tuned(make_spec(f"corpus.uri={path}", name="rejects")))
    run = attribute(make_spec(f"corpus.uri={path}", "score.max_reject_fraction=0.01", name="rejects"))
    assert {"rows": 149, "rejects": 1} == {
        k: v for k, v in json.loads(Path(run.uri("_SUCCESS")).read_text()).items() if k[0] == "r"
    }


INTERRUPTED = """
import ray.data
from ray.data._internal.execution.streaming_executor import _ClosingIterator

from pipeline.cluster import connected
from pipeline.spec import ResourcesSection


class Stop(BaseException):
    pass


class Nothing:
    def __call__(self, batch):
        return batch


def stop(*_):
    raise Stop


_ClosingIterator.get_next = stop  # a signal that comes where Ray Data does not catch it
try:
    with connected(ResourcesSection()):
        items = ray.data.from_items(list(range(9)), override_num_blocks=9)
        list(items.map_batches(Nothing, compute=ray.data.ActorPoolStrategy(size=1)).iter_rows())
except Stop:
    print("stopped")
"""


def test_an_interrupt_within_ray_data_ends_without_a_word(tmp_path):
    """Its executor ends before Ray does; left to the garbage collector it would start another Ray and print what went wrong."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    done = command("interrupted.py", cwd=tmp_path)
    assert ("stopped\n", "", 0) == (done.stdout, done.stderr, done.returncode)


OUTSIDE = '''
"""A task and a producer of somebody's own: one file, outside the repository."""

import copy

import torch

from pipeline.producers.base import Produced
from pipeline.records import Column


class MarginTask:
    """Squared error of the label's logit against a target."""

    def __init__(self, target):
        self.target = target

    def columns(self):
        return [Column("pixels", ("pixels",), "float32", (1, 8, 8)), Column("label", ("label",), "int64")]

    def loss_B(self, model, batch):
        logits_BC = model(batch["pixels"])
        return (logits_BC.gather(1, batch["label"][:, None])[:, 0] - self.target) ** 2


class Nothing:
    """Changes nothing: every score must be exactly zero."""

    direction = 1

    def produce(self, base, task, query, seed):
        return Produced(copy.deepcopy(base), steps=0)
'''


def test_your_own_task_and_producer_live_in_one_file_outside(world, tmp_path):
    """`mirrorscope run` from a folder with mine.py: found by workers too; equal models score exactly zero (truth 1)."""
    (tmp_path / "mine.py").write_text(OUTSIDE)
    tree = world.tree(tmp_path / "run")
    tree["task"] = {"name": "mine:MarginTask", "options": {"target": 5.0}}
    tree["producer"] = {"name": "mine:Nothing"}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tree))
    done = command("-m", "jobs.cli", "run", "spec.yaml", "--set", "rank.k=2", cwd=tmp_path)
    assert 0 == done.returncode, done.stderr
    assert "copy-of-3" in done.stdout
    assert "proponent" in done.stdout
    scores = pq.read_table(tmp_path / "run" / "scores")
    assert [0.0] == scores["score"].unique().to_pylist()
    assert 2 * CORPUS_ROWS == len(scores)
    again = command("-m", "jobs.attribute", "spec.yaml", "--set", "rank.k=3", cwd=tmp_path)
    assert 0 == again.returncode, again.stderr
    assert "tune" not in again.stderr
    assert 12 == len(pq.read_table(tmp_path / "run" / "topk" / "ranked.parquet"))
