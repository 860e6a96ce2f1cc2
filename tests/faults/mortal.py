"""A producer and tasks whose process is killed while they work."""

import os
import signal
from pathlib import Path

from pipeline.choices import Unlearn as Section
from pipeline.producers.unlearn import Unlearn
from pipeline.tasks.classification import Classification


def die_once(marker):
    """SIGKILL this process the first time it comes here."""
    marker = Path(marker)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class MortalProducer(Unlearn):
    def __init__(self, marker):
        super().__init__(**Section(steps=3).keywords)
        object.__setattr__(self, "marker", marker)

    def produce(self, base, task, query, seed):
        produced = super().produce(base, task, query, seed)
        die_once(self.marker)
        return produced


class MortalTask(Classification):
    def __init__(self, marker):
        super().__init__("pixels", "label", [1, 8, 8])
        self.marker = marker

    def loss_B(self, model, batch):
        if len(batch["label"]) == 32:  # a scoring batch, not a query
            die_once(self.marker)
        return super().loss_B(model, batch)


class PoisonedTask(Classification):
    def __init__(self):
        super().__init__("pixels", "label", [1, 8, 8])

    def loss_B(self, model, batch):
        if len(batch["label"]) == 32:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss_B(model, batch)
