"""Blocks compiled: losses are those of the model as it is, to rounding; where it cannot be done nothing is lost."""

import os
import re
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
from pipeline.changes import LowRank
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


def engine(model, task, counterparts, **keywords):
    """One that compiles, in a process that has compiled nothing yet."""
    torch.compiler.reset()
    counters.clear()
    return LossEngine(model, task, counterparts, compiled=compiled(model, task), **keywords)


def assert_close(got, expected):
    """To rounding."""
    np.testing.assert_allclose(got.base_N, expected.base_N, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(got.counterpart_QN, expected.counterpart_QN, rtol=ROUNDING, atol=ROUNDING)


def assert_equal(got, expected):
    """To the bit."""
    assert np.array_equal(got.base_N, expected.base_N)
    assert np.array_equal(got.counterpart_QN, expected.counterpart_QN)


@compiles
def test_blocks_run_compiled_once_for_all_that_are_alike(capsys):
    """All parameters of a model of three blocks are changed: one graph, and losses of the model as it is."""
    model, batches = blocks(), list(images().batches(BATCH_ROWS))
    counterparts = [moved(model, ""), moved(model, "", seed=2)]
    fast = engine(model, TASK, counterparts)
    for _ in range(2):
        assert_close(fast.losses(batches), LossEngine(model, TASK, counterparts).losses(batches))
    assert 1 == counters["stats"]["unique_graphs"]
    assert fast.is_compiled
    assert "compiled 3 Block\n" == capsys.readouterr().err


runs = {}


@torch.library.custom_op("tests::counted", mutates_args=())
def counted(x: torch.Tensor, block: int) -> torch.Tensor:
    """The same; it is known how often it ran, compiled or not."""
    runs[block] = runs.get(block, 0) + 1
    return x.clone()


counted.register_fake(lambda x, block: torch.empty_like(x))


class Counted(Block):
    """A block that knows how often it ran."""

    def __init__(self):
        super().__init__()
        self.number = len(runs)
        runs[self.number] = 0

    def forward(self, x):
        """See Block."""
        return super().forward(counted(x, self.number))


@compiles
def test_what_counterparts_share_is_still_computed_once():
    """Of base and two counterparts with another last block."""
    runs.clear()
    model, batches = blocks(Counted), list(images().batches(BATCH_ROWS))
    counterparts = [moved(model, "4"), moved(model, "4", seed=2)]
    fast = engine(model, TASK, counterparts)
    assert_close(fast.losses(batches), LossEngine(model, TASK, counterparts).losses(batches))
    assert fast.is_compiled
    runs.update(dict.fromkeys(runs, 0))
    fast.losses(batches)
    assert {0: BATCHES, 1: BATCHES, 2: 3 * BATCHES} == runs


@compiles
def test_groups_products_and_known_base_losses_run_compiled():
    """Counterparts in turns and as products, and no pass of the base: to the bit what they are all at once."""
    model, batches = blocks(), list(images().batches(BATCH_ROWS))
    draw = torch.Generator().manual_seed(3)
    product = LowRank(0.1 * torch.randn(16, 2, generator=draw), 0.1 * torch.randn(2, 16, generator=draw))
    counterparts = [moved(model, ""), {"3.into.weight": product}, moved(model, "", seed=2)]
    whole = engine(model, TASK, counterparts).losses(batches)
    assert_close(whole, LossEngine(model, TASK, counterparts).losses(batches))
    grouped = engine(model, TASK, counterparts, room_bytes=1)
    assert 3 == len(grouped.groups)
    assert_equal(grouped.losses(batches), whole)
    assert grouped.is_compiled
    assert_equal(engine(model, TASK, counterparts).losses(batches, base_S=whole.base_N), whole)


@compiles
def test_texts_of_all_lengths_run_compiled_whatever_came_before():
    """One graph for all shapes: losses are the same to the bit when the batches come in another order."""
    model, batches = gpt(), list(texts().batches(BATCH_ROWS, 64))
    model.config.use_cache = False  # as the loader has it
    assert 1 < len({next(iter(batch.arrays.values())).shape for batch in batches})
    counterparts = [moved(model, "model.layers.1"), moved(model, "model.layers.1", seed=2)]
    found = []
    for order in (batches, batches[::-1]):
        fast = engine(model, CAUSAL, counterparts)
        found.append(fast.losses(order))
        assert 1 == counters["stats"]["unique_graphs"]
        assert fast.is_compiled
    assert_close(found[0], LossEngine(model, CAUSAL, counterparts).losses(batches))
    assert_equal(*found)


class Shy(Block):
    """Another function when it is compiled."""

    def forward(self, x):
        """See Block."""
        return super().forward(x) + (1 if torch.compiler.is_compiling() else 0)


class Apart(Block):
    """Has a part that is not to be compiled, so that the block cannot be compiled whole."""

    @torch.compiler.disable
    def forward(self, x):
        """See Block."""
        return super().forward(x)


@compiles
@pytest.mark.parametrize(
    ("model", "why"),
    [
        (blocks(Shy), "its losses would be others"),
        (blocks(Apart), "compiler.disable"),
        (cnn(16).eval(), "it has no blocks"),
    ],
    ids=["another function", "not to be compiled", "no blocks"],
)
def test_a_model_that_does_not_bear_it_is_scored_as_it_is(model, why, capsys):
    """To the bit, also afterwards; it is said once."""
    batches = list(images().batches(BATCH_ROWS))
    fast = engine(model, TASK, [moved(model, "")])
    expected = LossEngine(model, TASK, [moved(model, "")]).losses(batches)
    for _ in range(2):
        assert_equal(fast.losses(batches), expected)
    assert not fast.is_compiled
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "score.compile" in line]
    assert said.startswith("warning: score.compile: Sequential is scored as it is, not compiled: ")
    assert re.search(why, said)


@compiles
def test_a_batch_that_fails_leaves_the_model_as_it_was(capsys):
    """Also while blocks run compiled, as they do afterwards: it is not the compiler's fault."""
    model = blocks()
    fast = engine(model, TASK, [moved(model, "")])
    fast.losses(images().batches(BATCH_ROWS))
    with pytest.raises(KeyError):
        fast.losses([Batch(np.arange(1), {"features": np.zeros((1, 1, 8, 8))})])
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert fast.is_compiled
    assert "not compiled" not in capsys.readouterr().err


def ran(code, **environment):
    """What a process of its own says."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert 0 == done.returncode, done.stderr
    return done.stderr


WITHOUT_A_COMPILER = """
from tests.unit.test_compiled import *
model, batches = blocks(), list(images().batches(BATCH_ROWS))
fast = engine(model, TASK, [moved(model, "")])
assert_equal(fast.losses(batches), LossEngine(model, TASK, [moved(model, "")]).losses(batches))
"""


def test_a_machine_without_a_compiler_scores_the_model_as_it_is(tmp_path):
    """It says what is missing."""
    said = ran(WITHOUT_A_COMPILER, CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert "warning: score.compile: Sequential is scored as it is, not compiled: " in said
    assert "no-such-compiler" in said


WITHOUT_A_DISK = """
import shutil
from pathlib import Path
from tests.unit.test_compiled import *
model = blocks()
plain, fast = LossEngine(model, TASK, [moved(model, "")]), engine(model, TASK, [moved(model, "")])
before = fast.losses(images().batches(BATCH_ROWS))
assert fast.is_compiled
shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"])
Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).write_text("no folder")
batches = [*images().batches(BATCH_ROWS)]
batches[-1:] = [Batch(batches[-1].item_B[i::2], {n: a[i::2] for n, a in batches[-1].arrays.items()}) for i in range(2)]
assert_equal(fast.losses(iter(batches), base_S=before.base_N), plain.losses(batches))
assert not fast.is_compiled
"""


@compiles
def test_what_cannot_be_compiled_later_ends_it_and_all_losses_are_made_anew(tmp_path):
    """A shape comes that is new when the disk is gone to which compilers write: nothing is half of one code, half of another."""
    said = ran(WITHOUT_A_DISK, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert "compiled 3 Block\n" in said
    assert "warning: score.compile: Sequential is scored as it is, not compiled: " in said
