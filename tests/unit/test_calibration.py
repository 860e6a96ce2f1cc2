"""How scores are made is measured: what is chosen follows from the figures, and says why."""

import numpy as np
import pytest
import torch

from jobs.digits import cnn
from pipeline import calibration
from pipeline.calibration import calibrate
from pipeline.engine import LossEngine
from tests.unit.test_derivatives import TASK, Attention, images, whole

pytestmark = pytest.mark.slow

BATCH = next(images().batches(32))


def engine(size, queries=6, model=None):
    torch.manual_seed(0)
    model = (model or cnn(8)).eval()
    return LossEngine(model, TASK, [whole(model, size, seed=q) for q in range(queries)])


def test_of_short_steps_the_faster_way_is_chosen():
    """By what was measured; both are said."""
    found = calibrate(engine(1e-4), BATCH, 6)
    assert (calibration.FASTER * found.gradient_s <= found.difference_s) == (found.way == "gradient")
    assert found.distance < calibration.STRAIGHT
    assert (6, 32) == (found.queries, found.rows)
    assert "times as" in found.why


def test_any_batch_of_a_shard_serves():
    """Rows keep the numbers that they have in the shard: the last batch is measured as the first."""
    last = list(images().batches(8))[-1]
    assert last.item_B[0] > 0
    assert len(last.item_B) == calibrate(engine(1e-4), last, 6).rows


def test_long_steps_are_compared_by_their_losses():
    """Where losses bend, differences are what was asked for."""
    found = calibrate(engine(0.3), BATCH, 6)
    assert "difference" == found.way
    assert found.distance > calibration.STRAIGHT
    assert "steps are too long" in found.why


def test_the_query_whose_step_is_longest_decides():
    """One of many is enough."""
    model = cnn(8).eval()
    steps = [whole(model, 0.3 if q == 5 else 1e-4, seed=q) for q in range(6)]
    assert "difference" == calibrate(LossEngine(model, TASK, steps), BATCH, 6).way


def test_a_model_that_does_not_bear_it_is_compared_by_its_losses():
    """The reason is the engine's."""
    found = calibrate(engine(1e-4, model=Attention()), BATCH, 6)
    assert ("difference", None) == (found.way, found.gradient_s)
    assert "Attention does not bear way gradient: derivatives layer by layer are off" in found.why


def test_too_little_memory(monkeypatch):
    """Steps lie in memory once more for the backward pass: bytes of the model for every query."""
    held = engine(1e-4)
    numbers = sum(p.numel() for p in held.model.parameters())
    assert 6 * 4 * numbers == held.steps_bytes
    assert held.free_bytes > held.steps_bytes
    monkeypatch.setattr(calibration, "SHARE_OF_MEMORY", held.steps_bytes / held.free_bytes / 2)
    found = calibrate(held, BATCH, 6)
    assert ("difference", None) == (found.way, found.gradient_s)
    assert "GiB for steps of all queries" in found.why


@pytest.mark.parametrize(("queries", "expected"), [(1, [0]), (3, [0, 1, 2]), (100, [0, 33, 66, 99])])
def test_first_and_last_are_looked_at(queries, expected):
    """And some between them."""
    assert expected == list(calibration._spread(queries))


def test_steps_of_nothing_are_compared_by_their_losses():
    """No derivative to be near to."""
    found = calibrate(engine(0.0), BATCH, 6)
    assert "difference" == found.way
    assert np.isinf(found.distance)
