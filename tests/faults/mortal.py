"""Workers that break off: a task and a producer that die or hang on one shard or query, the first few times."""

import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

from pipeline.producer_choices import Unlearn as Section
from pipeline.producers.unlearn import Unlearn
from pipeline.spec import TEMPERATURE
from pipeline.tasks.classification import Classification

BATCH_ROWS = 32
"""Of the world's specs: a scoring batch has so many rows, a query's fewer."""


class Blows:
    """What befalls a process that comes by, the first `times` times; a log of all who came.

    Args:
        log: File, a line per time: unix time, pid, Ray node.
        how: "die" by SIGKILL, "hang", or "fail" with an exception.
        times: How often.
        swap: A file that is copied over another before, and that other.
    """

    def __init__(self, log, how, times, swap=None):
        self._log, self._how, self._times, self._swap = Path(log), how, times, swap

    def fall(self):
        import ray

        node = ray.get_runtime_context().get_node_id()
        with self._log.open("a") as log:
            log.write(f"{time.time()} {os.getpid()} {node}\n")
        if len(self._log.read_text().splitlines()) > self._times:
            return
        if self._swap:
            shutil.copy(*self._swap)
        if self._how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._how == "fail":
            raise RuntimeError("no loss today")
        time.sleep(3600)


def came(log):
    """Who came by, one for each process: unix time of its first time, pid, Ray node."""
    if not Path(log).exists():
        return []
    lines = [line.split() for line in Path(log).read_text().splitlines()]
    first = {pid: (float(at_s), int(pid), node) for at_s, pid, node in reversed(lines)}
    return sorted(first.values())


def mark(pixels):
    """What a training example is known by: a task sees no ids."""
    return hashlib.sha256(pixels.astype("float32").tobytes()).hexdigest()


def mortal_task(log, pixels, how="die", times=1, swap=None):
    """Override of a spec: the shard whose first example has these pixels is where it happens."""
    options = f"log: {log}, at: {mark(pixels)}, how: {how}, times: {times}, swap: {[str(path) for path in swap or ()]}"
    return f"task={{name: 'tests.faults.mortal:MortalTask', options: {{{options}}}}}"


def mortal_producer(log, how="die", times=1):
    """Override of a spec: it happens after the steps of a query, before its commit."""
    return (
        f"producer={{name: 'tests.faults.mortal:MortalProducer', options: {{log: {log}, how: {how}, times: {times}}}}}"
    )


class MortalProducer(Unlearn):
    def __init__(self, log, how, times):
        super().__init__(**Section(steps=3).keywords)
        object.__setattr__(self, "blows", Blows(log, how, times))

    def produce(self, base, task, query, seed):
        produced = super().produce(base, task, query, seed)
        self.blows.fall()
        return produced


class MortalTask(Classification):
    def __init__(self, log, at, how, times, swap):
        super().__init__("pixels", "label", [1, 8, 8], temperature=TEMPERATURE)  # as the task it stands for
        self.blows, self.at = Blows(log, how, times, swap), at

    def loss_B(self, model, batch):
        if len(batch["label"]) == BATCH_ROWS and mark(batch["features"][0].numpy()) == self.at:
            self.blows.fall()
        return super().loss_B(model, batch)
