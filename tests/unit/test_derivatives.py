"""Derivatives along steps: backwards for all counterparts, forwards for each, and loss differences of small steps agree."""

import numpy as np
import pytest
import torch
from torch import nn

from jobs.digits import cnn
from pipeline.batches import Arrays
from pipeline.changes import LowRank
from pipeline.engine import LossEngine
from tests.contract.test_adapters import gpt2
from tests.language import gpt
from tests.unit.test_trunk import CAUSAL, TASK, images, texts

ROUNDING = 2e-5


def digits_cnn():
    """The same weights always."""
    torch.manual_seed(0)
    return cnn(8).eval()


def normed():
    """Layers of all sorts, one after the other; some have no rule of their own."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Flatten(),
        nn.PReLU(),
        nn.LayerNorm(32),
        nn.Linear(32, 10),
    ).eval()


def whole(model, size=0.01, seed=0, prefix=""):
    """A step of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    named = [(name, p.detach()) for name, p in model.named_parameters() if name.startswith(prefix)]
    return {name: p + size * torch.randn(p.shape, generator=generator).to(p) for name, p in named}


def low_rank(model, rank=2, seed=0):
    """Steps of matrices in the blocks that are products."""
    generator = torch.Generator().manual_seed(seed)
    named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and ("layers" in name or ".h." in name)]
    shapes = {name: p.shape for name, p in named}
    return {
        name: LowRank(0.1 * torch.randn(o, rank, generator=generator), 0.1 * torch.randn(rank, i, generator=generator))
        for name, (o, i) in shapes.items()
    }


def some_of_each(model):
    """One whole, one of rank 2, one of rank 3, one of one block alone."""
    return [whole(model), low_rank(model), low_rank(model, 3, 1), whole(model, prefix="model.layers.1")]


CASES = {
    "cnn": (digits_cnn(), TASK, images, lambda model: [whole(model, seed=q) for q in range(3)]),
    "cnn, one": (digits_cnn(), TASK, images, lambda model: [whole(model)]),
    "cnn, last layers": (
        digits_cnn(),
        TASK,
        images,
        lambda model: [whole(model, prefix="9"), whole(model, prefix="7")],
    ),
    "norms and others": (normed(), TASK, images, lambda model: [whole(model, seed=q) for q in range(2)]),
    "llama": (gpt(), CAUSAL, texts, lambda model: [whole(model, seed=q) for q in range(3)]),
    "llama, tied": (gpt(tied=True), CAUSAL, texts, some_of_each),
    "llama, adapters": (gpt(), CAUSAL, texts, lambda model: [low_rank(model), low_rank(model, 3)]),
    "gpt2, adapters": (gpt2(), CAUSAL, texts, lambda model: [low_rank(model), low_rank(model, seed=1)]),
    "gpt2": (gpt2(), CAUSAL, texts, lambda model: [whole(model, seed=q) for q in range(2)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_backwards_for_all_and_forwards_for_each_agree(case):
    """To rounding; whatever the layers and the steps are; base losses are those of plain passes."""
    model, task, inputs, steps_of = CASES[case]
    model.eval()
    batches = list(inputs().batches(16, 64))
    engine = LossEngine(model, task, steps_of(model))
    backward, forward = (engine.derivatives(batches, None, way) for way in ("gradient", "jvp"))
    plain_N = engine.losses(batches, []).base_N
    for found in (backward, forward):
        np.testing.assert_allclose(found.base_N, plain_N, atol=1e-6)
    for backward_N, forward_N in zip(backward.derivative_QN, forward.derivative_QN, strict=True):
        assert np.linalg.norm(forward_N) > 0
        assert np.linalg.norm(backward_N - forward_N) < ROUNDING * np.linalg.norm(forward_N)


def smooth(*norm):
    """A model without corners."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), *norm, nn.Tanh(), nn.Flatten(), nn.Linear(288, 10)).double().eval()


def grouped():
    """Whose norm has no forward derivative where channels stand last."""
    return smooth(nn.GroupNorm(2, 8))


@pytest.mark.parametrize(("make", "ways"), [(smooth, ("gradient", "jvp")), (grouped, ("gradient",))])
def test_of_small_steps_all_ways_agree(make, ways):
    """In float64, where differences have digits enough, to the length of the step."""
    model = make()
    steps = [whole(model, 1e-6, seed=q) for q in range(3)]
    engine, batches = LossEngine(model, TASK, steps), list(images().batches(16))
    difference = engine.losses(batches).difference_QN
    for way in ways:
        found = engine.derivatives(batches, None, way).difference_QN
        assert np.linalg.norm(found - difference) < 1e-4 * np.linalg.norm(difference)


def test_how_far_losses_bend_is_known_to_second_order():
    """What exact differences are off by, in float64; in bfloat16, whose differences say little, the same."""
    model = smooth()
    steps = [whole(model, 0.01), whole(model, 0.03)]
    engine, batch = LossEngine(model, TASK, steps), next(images().batches(48))
    bends = [engine.bend(batch, position) for position in (0, 1)]
    differences, derivatives = engine.losses([batch]).difference_QN, engine.derivatives([batch], None, "gradient")
    for bend, found_N, expected_N in zip(bends, differences, derivatives.difference_QN, strict=True):
        assert bend == pytest.approx(np.linalg.norm(found_N - expected_N) / np.linalg.norm(expected_N), rel=0.2)
    coarse = LossEngine(smooth().bfloat16(), TASK, steps)
    assert coarse.bend(batch, 1) == pytest.approx(bends[1], rel=0.2)


def test_some_counterparts_in_another_order():
    """Positions choose them."""
    model = digits_cnn()
    engine, batches = LossEngine(model, TASK, [whole(model, seed=q) for q in range(3)]), list(images().batches(16))
    every = engine.derivatives(batches, None, "gradient")
    some = engine.derivatives(batches, [2, 0], "gradient")
    np.testing.assert_allclose(some.derivative_QN, every.derivative_QN[[2, 0]], rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(some.counterpart_QN, (some.base_N + some.derivative_QN).astype(np.float32))


def test_derivatives_of_half_precision_are_near(capsys):
    """bfloat16 has 8 bits: a few percent of the length."""
    model = gpt()
    steps = [low_rank(model, seed=q) for q in range(2)]
    exact = LossEngine(model, CAUSAL, steps).derivatives(texts().batches(16, 64), None, "gradient").derivative_QN
    coarse = LossEngine(gpt().bfloat16(), CAUSAL, steps).derivatives(texts().batches(16, 64), None, "gradient")
    assert np.linalg.norm(coarse.derivative_QN - exact) < 0.05 * np.linalg.norm(exact)


def test_the_model_comes_back_as_it_was():
    """No gradients, no hooks, and what required gradients does."""
    model = digits_cnn()
    next(model.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    engine = LossEngine(model, TASK, [whole(model)])
    for way in ("gradient", "jvp"):
        engine.derivatives(images().batches(16), None, way)
    assert before == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None and isinstance(p, nn.Parameter) for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


class Mixing(nn.Module):
    """A layer that is called with all rows in one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, features):
        rows = features.flatten(1)
        return self.last(self.first(rows[None])[0])


class Attention(nn.Module):
    """torch's own attention uses its output layer's weight without calling it."""

    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(64, 10)

    def forward(self, features):
        x = features.view(-1, 8, 8)
        return self.last(self.attention(x, x, x, need_weights=False)[0].flatten(1))


def moving_statistics():
    """Counterparts of batch norm in train mode have other statistics, too."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    return model, [{**whole(model), "0.running_mean": torch.ones(1)}]


@pytest.mark.parametrize(
    ("model", "steps", "match"),
    [
        (Mixing(), None, "off by .*% from autograd's"),
        (Attention(), None, "off by .*% from autograd's"),
        (*moving_statistics(), "not differentiable wrt running_mean"),
    ],
    ids=["rows in one", "weights that are not called", "statistics"],
)
def test_a_model_that_does_not_bear_it_is_refused(model, steps, match):
    """With what was found, before a score is made."""
    model.eval()
    engine = LossEngine(model, TASK, steps or [whole(model, 0.1)])
    with pytest.raises(ValueError, match=match):
        engine.derivatives(images().batches(16), None, "gradient")
    assert np.isfinite(engine.losses(images().batches(16)).counterpart_QN).all()


def test_images_are_laid_out_for_derivatives_too():
    """Channels last, as for losses: base losses are the same to the bit in whatever order the two are asked for."""
    batches = list(Arrays(images().columns).batches(16))
    first, second = (LossEngine(cnn(16).eval(), TASK, []) for _ in range(2))
    second._model.load_state_dict(first._model.state_dict())
    first.derivatives(batches, [], "gradient")
    assert np.array_equal(first.losses(batches).base_N, second.losses(batches).base_N)
