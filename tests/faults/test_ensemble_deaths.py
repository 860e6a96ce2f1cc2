"""An actor is killed for real while it averages the members of an ensemble: others go on, and no row is lost, twice or other."""

import os
import shutil
import signal
import threading
import time

import pytest
import safetensors.torch
import torch

from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.mean import MeanScorer
from pipeline.members import gathered
from pipeline.run import attribute, finish
from tests.conftest import run_without_ray

pytestmark = pytest.mark.ray

SHARD_ROWS = 2
MEMBERS = 3
LOOK_S = 0.002


def actors_that_average():
    """Processes of the cluster that this one is connected to, in which Ray Data's actors are alive."""
    from ray._private import state

    return [
        int(actor["Pid"])
        for actor in state.actors().values()
        if actor["State"] == "ALIVE" and "MapWorker" in actor["ActorClassName"] and actor["Pid"]
    ]


def kill_one(run, killed, stop):
    """SIGKILL for an actor as soon as a few shards are committed: it is amid others then."""
    while not stop.is_set():
        if len(run.committed()) >= 5 and (pids := actors_that_average()):
            os.kill(pids[0], signal.SIGKILL)
            killed.append((time.time(), pids[0]))
            return
        time.sleep(LOOK_S)


def test_an_actor_killed_while_it_averages_is_replaced(ray_cluster, make_spec, world, tmp_path, ledger):
    """SIGKILL between its shards' reads and commits: each of 75 shards is there once, with the undisturbed mean's bytes."""
    generator = torch.Generator().manual_seed(0)
    members = []
    for place in range(1, MEMBERS):
        state = world.model.state_dict()
        other = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
        safetensors.torch.save_file(other, tmp_path / f"{place}.safetensors")
        members.append({"weights_uri": str(tmp_path / f"{place}.safetensors")})
    overrides = (f"ensemble={members}", f"score.shard_rows={SHARD_ROWS}", "resources.score.actors=1")
    run = gathered(freeze(make_spec(*overrides)))
    for member in run.members:
        run_without_ray(member.spec)
    undisturbed = open_run(str(shutil.copytree(run.uri(), tmp_path / "undisturbed")))
    scorer = MeanScorer(undisturbed)
    for work in undisturbed.works():
        scorer.score(work)
    finish(undisturbed)

    killed, stop = [], threading.Event()
    thread = threading.Thread(target=kill_one, args=(run, killed, stop))
    thread.start()
    run = attribute(run.spec)
    stop.set()
    thread.join()
    ((died_s, pid),) = killed
    later = [receipt for receipt in run.receipts() if receipt.finished_at_s > died_s]
    assert len(later) > 5, "it was killed when nothing was left"
    recovered_s = min(receipt.finished_at_s for receipt in later) - died_s
    ledger.enter("SIGKILL of an actor that averages an ensemble", 2, recovered_s, run, undisturbed)
    assert pid not in actors_that_average()
