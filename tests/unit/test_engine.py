"""The loss engine: exact where it can be, and the same numbers wherever an example stands."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jobs.digits import cnn
from pipeline.batches import Arrays
from pipeline.engine import LossEngine
from pipeline.tasks.classification import Classification

TASK = Classification("pixels", "label", [1, 8, 8])


def examples(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": torch.rand((rows, 1, 8, 8), generator=generator).numpy(),
        "label": torch.randint(0, 10, (rows,), generator=generator).numpy(),
    }


def seeded_cnn(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return cnn(8).to(dtype).eval()


def moved(model, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + size * torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in model.named_parameters()
    }


def test_losses_are_those_of_the_models_themselves():
    """Base and counterparts agree with plain forward passes of separate models."""
    base, tensors, batch = seeded_cnn(), moved(seeded_cnn(), 0.05), examples(64)
    got = LossEngine(base, TASK, [tensors]).losses(Arrays(batch).batches(64))
    other = seeded_cnn()
    other.load_state_dict(tensors)
    tensor_batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    with torch.no_grad():
        assert np.array_equal(TASK.loss_B(seeded_cnn(), tensor_batch).numpy(), got.base_N)
        assert np.array_equal(TASK.loss_B(other, tensor_batch).numpy(), got.counterpart_QN[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_models_score_exactly_zero(dtype):
    """A counterpart equal to the base gives the same bits (METHOD, truth 1)."""
    base = seeded_cnn(dtype=dtype)
    equal = {name: p.detach().clone() for name, p in base.named_parameters()}
    got = LossEngine(base, TASK, [{}, equal]).losses(Arrays(examples(100)).batches(32))
    assert np.array_equal(got.base_N, got.counterpart_QN[0])
    assert np.array_equal(got.base_N, got.counterpart_QN[1])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=150))
def test_a_loss_is_the_same_to_the_bit_wherever_its_example_stands(order):
    """Any rows in any order and number: with one batch shape, neighbours and position do not matter (truth 3)."""
    base, batch = seeded_cnn(), examples(100)
    engine = LossEngine(base, TASK, [moved(base, 0.1)])
    whole = engine.losses(Arrays(batch).batches(32))
    part = engine.losses(Arrays({name: array[order] for name, array in batch.items()}).batches(32))
    assert np.array_equal(whole.base_N[order], part.base_N)
    assert np.array_equal(whole.counterpart_QN[:, order], part.counterpart_QN)


@pytest.mark.parametrize("batch_rows", [1, 7, 100, 256])
def test_a_loss_hardly_depends_on_the_batch_size(batch_rows):
    """Another batch shape moves only the last bits (truth 3)."""
    base, batch = seeded_cnn(), examples(100)
    expected = LossEngine(base, TASK, []).losses(Arrays(batch).batches(32)).base_N
    assert expected == pytest.approx(
        LossEngine(base, TASK, []).losses(Arrays(batch).batches(batch_rows)).base_N, rel=1e-5
    )


def test_half_precision_models_give_float32_losses():
    """Losses are float32 whatever the compute dtype, and float64 stays float64."""
    for dtype, expected in ((torch.bfloat16, np.float32), (torch.float64, np.float64)):
        engine = LossEngine(seeded_cnn(dtype=dtype), TASK, [])
        assert expected == engine.losses(Arrays(examples(5)).batches(4)).base_N.dtype


def test_the_base_comes_back_after_a_counterpart_and_after_an_error():
    """Swapping leaves the base's own tensors in place, whatever happens in between."""
    base = seeded_cnn()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    engine = LossEngine(base, TASK, [moved(base, 1.0)])
    engine.losses(Arrays(examples(10)).batches(4))
    with pytest.raises(RuntimeError, match="user"), engine.counterpart(0):
        raise RuntimeError("user")
    assert all(torch.equal(before[name], p) for name, p in base.named_parameters())


class Tied(nn.Module):
    """Input and output share one matrix, with a buffer beside."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.outer.weight = self.inner.weight
        self.register_buffer("shift", torch.zeros(64))

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x.flatten(1)))) + self.shift


def test_tied_weights_and_buffers_are_swapped_as_one():
    """A counterpart of tied weights changes both uses; buffers are swapped too."""
    torch.manual_seed(0)
    base, other = Tied().eval(), Tied().eval()
    other.shift += 1.0
    got = LossEngine(base, TASK, [dict(other.state_dict())]).losses(Arrays(examples(16)).batches(16))
    assert np.array_equal(
        LossEngine(other, TASK, []).losses(Arrays(examples(16)).batches(16)).base_N, got.counterpart_QN[0]
    )


def test_misfits_are_refused():
    """Unknown names and other shapes are named, and so are losses that are not [B]."""
    with pytest.raises(KeyError, match="ghost"):
        LossEngine(seeded_cnn(), TASK, [{"ghost": torch.zeros(1)}])
    with pytest.raises(ValueError, match="is \\[1\\] in the counterpart"):
        LossEngine(seeded_cnn(), TASK, [{"0.bias": torch.zeros(1)}])

    class MeanLoss:
        def loss_B(self, model, batch):
            return model(batch["features"]).mean()

    with pytest.raises(ValueError, match=r"MeanLoss.loss_B returned torch.float32 of shape \[\], expected \[4\]"):
        LossEngine(seeded_cnn(), MeanLoss(), []).losses(Arrays(examples(4)).batches(4))


def test_no_rows_and_no_counterparts_are_fine():
    """A shard whose rows were all rejected has losses of shape [0] and [Q, 0]."""
    base = seeded_cnn()
    got = LossEngine(base, TASK, [moved(base, 0.1)]).losses(Arrays(examples(0)).batches(8))
    assert (got.base_N.shape, got.counterpart_QN.shape) == ((0,), (1, 0))
    assert LossEngine(base, TASK, []).losses(Arrays(examples(3)).batches(8)).counterpart_QN.shape == (0, 3)
