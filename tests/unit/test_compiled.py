"""Blocks compiled: losses are those of the model as it is, to rounding; where it cannot be done nothing is lost."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from jobs.digits import cnn
from pipeline.batches import Batch
from pipeline.blocks import compiled
from pipeline.engine import LossEngine
from tests.conftest import compiles
from tests.language import gpt
from tests.unit.test_trunk import BATCH_ROWS, BATCHES, CAUSAL, TASK, images, moved, texts

pytestmark = pytest.mark.slow
ROUNDING = 1e-5
"""Nats, and relative."""


class Block(nn.Module):
    """Two layers in a row: what a compiler can put together."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        """[B, 16] to the same."""
        return x + self.out(torch.tanh(self.into(x)))


def blocks(kind=Block):
    """A model of three blocks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *(kind() for _ in range(3)), nn.Linear(16, 10)).eval()


def assert_same(model, task, counterparts, inputs):
    """Losses with compiled parts are those without, and something was compiled; the engine, and the losses."""
    batches = list(inputs.batches(BATCH_ROWS, 64))
    expected = LossEngine(model, task, counterparts).losses(batches)
    torch.compiler.reset()
    counters.clear()
    engine = LossEngine(model, task, counterparts, compiled=compiled(model, task))
    for _ in range(2):
        got = engine.losses(batches)
        np.testing.assert_allclose(got.base_N, expected.base_N, rtol=ROUNDING, atol=ROUNDING)
        np.testing.assert_allclose(got.counterpart_QN, expected.counterpart_QN, rtol=ROUNDING, atol=ROUNDING)
    assert counters["stats"]["unique_graphs"]
    return engine, got


@compiles
def test_blocks_run_compiled(capsys):
    """All parameters of a model of three blocks are changed."""
    model = blocks()
    assert_same(model, TASK, [moved(model, ""), moved(model, "", seed=2)], images())
    assert "compiled 3 Block in " in capsys.readouterr().err


class Counted(Block):
    """A block that knows how often it ran."""

    runs = 0

    def forward(self, x):
        """See Block."""
        self.count()
        return super().forward(x)

    @torch.compiler.disable
    def count(self):
        """Once more."""
        self.runs += 1


@compiles
def test_what_counterparts_share_is_still_computed_once():
    """Of base and two counterparts with another last block."""
    model = blocks(Counted)
    engine, _ = assert_same(model, TASK, [moved(model, "4"), moved(model, "4", seed=2)], images())
    before = [block.runs for block in model[2:5]]
    engine.losses(images().batches(BATCH_ROWS))
    assert [BATCHES, BATCHES, 3 * BATCHES] == [
        block.runs - runs for block, runs in zip(model[2:5], before, strict=True)
    ]


@compiles
def test_a_model_without_blocks_is_compiled_whole(capsys):
    """The digits CNN; where counterparts share layers that stays as it is, which is said."""
    model = cnn(16).eval()
    assert_same(model, TASK, [moved(model, "")], images())
    assert "compiled 1 Sequential in " in capsys.readouterr().err
    last = [name for name, _ in model.named_parameters()][-1]
    engine = LossEngine(model, TASK, [moved(model, last)], compiled=compiled(model, TASK))
    engine.losses(images().batches(BATCH_ROWS))
    said = capsys.readouterr().err
    assert "Sequential has no blocks to compile, and what counterparts share with it is worth more" in said


@compiles
def test_texts_of_all_lengths_run_compiled_whatever_came_before():
    """One kernel for all shapes: losses are the same to the bit when the batches come in another order."""
    model = gpt()
    counterparts = [moved(model, "model.layers.1"), moved(model, "model.layers.1", seed=2)]
    _, first = assert_same(model, CAUSAL, counterparts, texts())
    batches = list(texts().batches(BATCH_ROWS, 64))
    assert 1 < len({next(iter(batch.arrays.values())).shape for batch in batches})
    torch.compiler.reset()
    again = LossEngine(model, CAUSAL, counterparts, compiled=compiled(model, CAUSAL)).losses(batches[::-1])
    assert np.array_equal(first.base_N, again.base_N)
    assert np.array_equal(first.counterpart_QN, again.counterpart_QN)


class Shy(Block):
    """Another function when it is compiled."""

    def forward(self, x):
        """See Block."""
        return super().forward(x) + (1 if torch.compiler.is_compiling() else 0)


@compiles
def test_a_model_that_would_have_other_losses_is_scored_as_it_is(capsys):
    """To the bit, also afterwards."""
    model, batches = blocks(Shy), list(images().batches(BATCH_ROWS))
    expected = LossEngine(model, TASK, [moved(model, "")]).losses(batches)
    engine = LossEngine(model, TASK, [moved(model, "")], compiled=compiled(model, TASK))
    for _ in range(2):
        assert np.array_equal(expected.counterpart_QN, engine.losses(batches).counterpart_QN)
    assert 1 == capsys.readouterr().err.count("is scored as it is, not compiled: its losses would be others")


def test_a_batch_that_fails_leaves_the_model_as_it_was():
    """Also while parts run compiled."""
    model = blocks()
    engine = LossEngine(model, TASK, [moved(model, "")], compiled=compiled(model, TASK))
    engine.losses(images().batches(BATCH_ROWS))
    with pytest.raises(KeyError):
        engine.losses([Batch(np.arange(1), {"features": np.zeros((1, 1, 8, 8))})])
    assert all("forward" not in module.__dict__ for module in model.modules())


WITHOUT_A_COMPILER = """
import numpy as np
from tests.unit.test_compiled import *
model, batches = blocks(), list(images().batches(BATCH_ROWS))
plain = LossEngine(model, TASK, [moved(model, "")]).losses(batches)
asked = LossEngine(model, TASK, [moved(model, "")], compiled=compiled(model, TASK)).losses(batches)
assert np.array_equal(plain.counterpart_QN, asked.counterpart_QN)
"""


def test_a_machine_without_a_compiler_scores_the_model_as_it_is(tmp_path):
    """It says what is missing."""
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_COMPILER], env=environment, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    assert "warning: score.compile: Sequential is scored as it is, not compiled: " in done.stderr
    assert "no-such-compiler" in done.stderr


WITHOUT_A_DISK = """
import os, shutil
from pathlib import Path
from tests.unit.test_compiled import *
model = blocks()
plain, fast = (LossEngine(model, TASK, [moved(model, "")], compiled=each) for each in (None, compiled(model, TASK)))
fast.losses(images().batches(BATCH_ROWS))
assert fast.is_compiled
shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"])
Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).write_text("no folder")
for _ in range(2):
    np.testing.assert_allclose(
        fast.losses(images().batches(7)).counterpart_QN, plain.losses(images().batches(7)).counterpart_QN, rtol=ROUNDING
    )
"""


@compiles
def test_what_cannot_be_compiled_later_runs_as_it_is(tmp_path):
    """Another shape, when the disk is gone to which compilers write: no shard is lost for it, and it is logged."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_DISK], env=environment, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    assert "compiled 3 Block in " in done.stderr
    assert "FileExistsError" in done.stderr
