"""A task and a producer that wait until they are let go, so that a stage is in progress for as long as a test wants."""

import time
from pathlib import Path

from pipeline.producer_choices import Unlearn as Section
from pipeline.producers.unlearn import Unlearn
from pipeline.spec import TEMPERATURE
from pipeline.tasks.classification import Classification
from tests.faults.mortal import BATCH_ROWS

GO = "go"
"""File in the folder of a test: as soon as it is there, what waits goes on."""
POLL_S = 0.05


def begun(folder, stage):
    """Whether a stage is in progress: waits in a worker, or in the command itself."""
    return (folder / f"{stage} begun").exists()


def let_go(folder):
    """End all waiting."""
    (folder / GO).touch()


def waiting_task(folder):
    """Override of a spec: stage score waits in the forward pass of each shard."""
    return f"task={{name: 'tests.faults.waiting:WaitingTask', options: {{folder: {folder}}}}}"


def waiting_producer(folder):
    """Override of a spec: stage tune waits in each query."""
    return f"producer={{name: 'tests.faults.waiting:WaitingProducer', options: {{folder: {folder}}}}}"


def wait(folder, stage):
    Path(folder, f"{stage} begun").touch()
    while not Path(folder, GO).exists():
        time.sleep(POLL_S)


class WaitingProducer(Unlearn):
    def __init__(self, folder):
        super().__init__(**Section(steps=3).keywords)
        object.__setattr__(self, "folder", folder)

    def produce(self, base, task, query, seed):
        wait(self.folder, "tune")
        return super().produce(base, task, query, seed)


class WaitingTask(Classification):
    def __init__(self, folder):
        super().__init__("pixels", "label", [1, 8, 8], temperature=TEMPERATURE)  # as the task it stands for
        self.folder = folder

    def loss_B(self, model, batch):
        if len(batch["label"]) == BATCH_ROWS:  # of a shard; a query has fewer rows
            wait(self.folder, "score")
        return super().loss_B(model, batch)
