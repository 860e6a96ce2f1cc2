"""The loss engine: exact where it can be, and the same numbers wherever an example stands."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jobs.digits import cnn
from pipeline.batches import Arrays, Batch
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
    """Base and counterparts agree, to the bit, with plain forward passes of separate models whose kernels lie as theirs."""
    base, tensors, batch = seeded_cnn(), moved(seeded_cnn(), 0.05), examples(64)
    got = LossEngine(base, TASK, [tensors]).losses(Arrays(batch).batches(64))
    other = seeded_cnn()
    other.load_state_dict(tensors)
    separate, other = (model.to(memory_format=torch.channels_last) for model in (seeded_cnn(), other))
    tensor_batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    with torch.no_grad():
        assert np.array_equal(TASK.loss_B(separate, tensor_batch).numpy(), got.base_N)
        assert np.array_equal(TASK.loss_B(other, tensor_batch).numpy(), got.counterpart_QN[0])


PARTS = {
    "the first batch": lambda batches: batches[:1],
    "the last batch": lambda batches: batches[-1:],
    "batches in another order": lambda batches: [batches[3], batches[0], batches[2]],
    "rows of a batch": lambda batches: [Batch(batches[1].item_B[5:9], rows_of(batches[1], slice(5, 9)))],
    "rows in another order": lambda batches: [
        Batch(batches[1].item_B[::-1], rows_of(batches[1], slice(None, None, -1)))
    ],
    "no batch": lambda batches: [],
}


def rows_of(batch, which):
    return {name: np.ascontiguousarray(array[which]) for name, array in batch.arrays.items()}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("way", ["difference", "gradient", "jvp"])
@pytest.mark.parametrize(("room_bytes", "is_base_known"), [(None, False), (1, False), (1, True)])
def test_any_part_of_a_shard_has_the_losses_that_it_has_in_the_whole(part, way, room_bytes, is_base_known):
    """Each under its item's number, whichever way, in groups of counterparts and with base losses that are known."""
    model = seeded_cnn()
    engine = LossEngine(model, TASK, [moved(model, 1e-3, seed) for seed in (1, 2)], room_bytes)
    batches = list(Arrays(examples(50)).batches(16))

    def losses(some, base_S=None):
        return engine.losses(some, None, base_S) if way == "difference" else engine.derivatives(some, None, way)

    whole, some = losses(batches), PARTS[part](batches)
    assert np.array_equal(np.arange(50), whole.item_N)
    got = losses(some, whole.base_N if is_base_known else None)
    assert sorted(item for batch in some for item in batch.item_B.tolist()) == got.item_N.tolist()
    np.testing.assert_allclose(whole.base_N[got.item_N], got.base_N, atol=1e-6)
    np.testing.assert_allclose(whole.counterpart_QN[:, got.item_N], got.counterpart_QN, atol=1e-6)
    np.testing.assert_allclose(whole.difference_QN[:, got.item_N], got.difference_QN, atol=1e-6)


def is_channels_last(model):
    return model[3].weight.is_contiguous(memory_format=torch.channels_last)


class Viewed(nn.Module):
    """Takes what a convolution returns by its order in memory: fails, or says else, where channels stand last."""

    def __init__(self, take):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.take, self.linear = take, nn.Linear(256, 10)

    def forward(self, features):
        return self.linear(self.take(self.second(self.first(features))))


def test_images_go_through_with_channels_last():
    """Kernels are laid out anew, under counterparts too; losses are the same to rounding."""
    base, tensors, batch = cnn(16).eval(), moved(cnn(16), 0.05), examples(300)
    whole = {name: torch.from_numpy(array) for name, array in batch.items()}
    with torch.no_grad():
        plain_N = TASK.loss_B(base, whole).numpy()
    engine = LossEngine(base, TASK, [tensors])
    got = engine.losses(Arrays(batch).batches(128))
    assert is_channels_last(base)
    with engine.counterpart(0) as model:
        assert is_channels_last(model)
        assert torch.equal(tensors["3.weight"], model[3].weight)
    assert plain_N.tolist() == pytest.approx(got.base_N.tolist(), abs=1e-6)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, False), (torch.float32, True), (torch.float64, True)])
def test_what_the_first_batch_is_leaves_no_trace(dtype, expected):
    """Losses are the same to the bit whatever came first: dtypes whose rounding comes near the bound are not laid out."""
    base, batches = cnn(16).eval().to(dtype), [Arrays(examples(32, seed)) for seed in range(4)]
    engines = [LossEngine(copy.deepcopy(base), TASK, [moved(base, 0.05)]) for _ in batches]
    for engine, first in zip(engines, batches, strict=True):
        engine.losses(first.batches(32))
    assert {expected} == {is_channels_last(engine._model) for engine in engines}
    found = [engine.losses(batches[0].batches(32)) for engine in engines]
    assert 1 == len({(each.base_N.tobytes(), each.counterpart_QN.tobytes()) for each in found})


class FailsOnce(type(TASK)):
    """A task whose loss fails the first time it is asked."""

    def __init__(self):
        super().__init__("features", "label", [1, 8, 8])
        self.failed = False

    def loss_B(self, model, batch):
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError("once")
        return super().loss_B(model, batch)


def test_a_first_batch_that_fails_leaves_no_trace():
    """What comes after it has the losses, to the bit, that it has where nothing failed."""
    base, batch = cnn(16).eval(), Arrays(examples(32))
    found = []
    for task in (TASK, FailsOnce()):
        engine = LossEngine(copy.deepcopy(base), task, [moved(base, 0.05)])
        if task is not TASK:
            with pytest.raises(ZeroDivisionError):
                engine.losses(batch.batches(32))
        found.append(engine.losses(batch.batches(32)))
        assert is_channels_last(engine.model)
    assert np.array_equal(found[0].base_N, found[1].base_N)
    assert np.array_equal(found[0].counterpart_QN, found[1].counterpart_QN)


@pytest.mark.parametrize(
    "take",
    [lambda out: out.view(len(out), -1), lambda out: out.as_strided((len(out), 256), (256, 1))],
    ids=["fails", "says else"],
)
def test_a_model_that_asks_for_the_order_in_memory_is_left_as_it_is(take):
    """Its kernels are put back, and its losses are its own to the bit."""
    torch.manual_seed(0)
    base, batch = Viewed(take).eval(), examples(64)
    with torch.no_grad():
        plain_N = TASK.loss_B(base, {name: torch.from_numpy(array) for name, array in batch.items()}).numpy()
    tried = []
    base.second.register_forward_pre_hook(lambda module, _: tried.append(module.weight.is_contiguous()))
    got = LossEngine(base, TASK, [moved(base, 0.05)]).losses(Arrays(batch).batches(64))
    assert [True, False] == tried[:2]
    assert all(tried[2:])
    assert base.second.weight.is_contiguous()
    assert np.array_equal(plain_N, got.base_N)
    assert np.isfinite(got.counterpart_QN).all()


def test_the_model_can_still_learn():
    """What the engine did to its memory leaves gradients possible."""
    base = seeded_cnn()
    LossEngine(base, TASK, []).losses(Arrays(examples(8)).batches(8))
    TASK.loss_B(base, {name: torch.from_numpy(array) for name, array in examples(8).items()}).mean().backward()
    assert all(parameter.grad is not None for parameter in base.parameters())


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


class Watched:
    """A task that notes at each pass where the first of the model's parameters lies."""

    def __init__(self, engine_of):
        self.passes = []
        self.engine = engine_of(self)

    def loss_B(self, model, batch):
        self.passes.append(next(iter(model.parameters())).data_ptr())
        return TASK.loss_B(model, batch)


@pytest.mark.parametrize(("room", "sizes"), [(3.5, [3, 2]), (1, [1] * 5), (0, [1] * 5), (5, [5]), (None, [5])])
def test_counterparts_beyond_their_room_have_passes_of_their_own(room, sizes):
    """Group by group over the same batches, with the base's pass in the first alone; every loss is the same to the bit."""
    base, batch = seeded_cnn(), examples(40)
    tensors = [moved(base, 0.05, seed=q) for q in range(5)]
    each = sum(p.numel() * p.element_size() for p in base.parameters())
    watched = Watched(lambda task: LossEngine(base, task, tensors, room and int(room * each)))
    watched.engine.losses(Arrays(batch).batches(16), [0])  # layouts are tried on the first batch
    assert sizes == [len(group) for group in watched.engine.groups]
    watched.passes.clear()
    got = watched.engine.losses(Arrays(batch).batches(16))
    here = next(iter(base.parameters())).data_ptr()
    assert 3 == watched.passes.count(here)
    assert 3 * (1 + 5) == len(watched.passes)
    plain = LossEngine(seeded_cnn(), TASK, tensors).losses(Arrays(batch).batches(16))
    assert np.array_equal(plain.base_N, got.base_N)
    assert np.array_equal(plain.counterpart_QN, got.counterpart_QN)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gradient", "jvp"])
def test_derivatives_are_the_same_group_by_group(way):
    """Up to the order in which products are added up."""
    base, batch = seeded_cnn(), examples(40)
    tensors = [moved(base, 0.05, seed=q) for q in range(5)]
    each = sum(p.numel() * p.element_size() for p in base.parameters())
    plain, got = (
        LossEngine(seeded_cnn(), TASK, tensors, room).derivatives(Arrays(batch).batches(16), [4, 0, 2], way)
        for room in (None, 2 * each)
    )
    assert np.array_equal(plain.base_N, got.base_N)
    np.testing.assert_allclose(got.difference_QN, plain.difference_QN, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("room", [None, 0])
def test_known_base_losses_leave_out_the_bases_pass(room):
    """In every group."""
    base, batch = seeded_cnn(), examples(16)
    watched = Watched(lambda task: LossEngine(base, task, [moved(base, 0.05, seed=q) for q in range(2)], room))
    known = watched.engine.losses(Arrays(batch).batches(16))  # the first batch's has passes more
    watched.passes.clear()
    got = watched.engine.losses(Arrays(batch).batches(16), base_S=known.base_N)
    assert next(iter(base.parameters())).data_ptr() not in watched.passes
    assert 2 == len(watched.passes)
    assert np.array_equal(known.base_N, got.base_N)
