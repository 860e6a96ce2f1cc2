"""Every producer: a counterpart that moves as it says, a base that stays, the same bits for the same seed."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from pipeline import producers
from pipeline.batches import Arrays
from pipeline.choices import ClassificationTask
from pipeline.engine import LossEngine
from pipeline.errors import ContractError, NumericsError
from pipeline.extensions import load_producer, load_task
from pipeline.producer_choices import PAPER, Finetune, Unlearn
from pipeline.records import Column

FEATURES, CLASSES = 4, 3
TASK = load_task(ClassificationTask(shape=[FEATURES]))

SECTIONS = {
    "unlearn": Unlearn,
    "unlearn, paper": lambda **fields: Unlearn(preset="paper", **fields),
    "finetune": Finetune,
}
"""Producer and preset -> its section, with fields changed."""
every_producer = pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
STRAIGHT = {
    "momentum": 0.0, "steps": 1, "weight_decay": 0.0, "normalize": False, "max_loss_change": 0.0, "mode": "eval",
}  # fmt: skip
"""One plain step, whatever the recipe."""


def mlp(certainty=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()
    model[2].weight.data *= certainty
    return model


def norm_net():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    return layers.eval()


def query(rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn((rows, FEATURES), generator=generator),
        "label": torch.randint(0, CLASSES, (rows,), generator=generator),
    }


def certain_query(model):
    """A query that the model is sure of: its loss is near zero."""
    features = query(1)["features"]
    with torch.no_grad():
        return {"features": features, "label": model(features).argmax(dim=1)}


def produce(section, base, batch=None, seed=7, task=TASK):
    return load_producer(section).produce(base, task, query() if batch is None else batch, seed)


def mean_loss(model, batch):
    with torch.no_grad():
        return TASK.loss_B(model.eval(), batch).mean().item()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(base, other):
    """Names of the tensors in which two models differ."""
    before, after = base.state_dict(), other.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def sign(section):
    return load_producer(section).direction


def gradients(model, batch):
    """Gradient of the query's mean loss, by autograd alone."""
    own = copy.deepcopy(model)
    loss = TASK.loss_B(own, batch).mean()
    return dict(zip(dict(own.named_parameters()), torch.autograd.grad(loss, list(own.parameters())), strict=True))


def test_every_producer_is_under_contract():
    """A new word in the table gets its row here, or a file of its own; test_given_counterparts.py if it takes no steps."""
    elsewhere = {"natural", "retain", "reference", "mask_heads"}
    assert set(producers.BUILTIN) == {*(section().name for section in SECTIONS.values()), *elsewhere}


@every_producer
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_base_comes_back_unchanged(section, mode):
    """Weights and buffers to the bit, its mode, and what requires gradients."""
    base = norm_net()
    base[0].weight.requires_grad_(False)
    before = snapshot(base)
    produce(section(mode=mode), base)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert not any(module.training for module in base.modules())
    assert [False, True] == [base[0].weight.requires_grad, base[3].weight.requires_grad]
    assert {None} == {parameter.grad for parameter in base.parameters()}


@every_producer
def test_the_query_is_not_changed(section):
    """Noise and copies are of the producer's own batch."""
    base = mlp(certainty=100.0)
    batch = certain_query(base)
    before = {name: value.clone() for name, value in batch.items()}
    produce(section(normalize=False), base, batch)
    assert all(torch.equal(before[name], batch[name]) for name in before)


@every_producer
def test_a_counterpart_shares_no_memory_with_its_base(section):
    """Changing the one leaves the other."""
    base = mlp()
    made = produce(section(), base).model
    own = {tensor.data_ptr() for tensor in base.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in made.state_dict().values()}


@every_producer
@pytest.mark.parametrize("make", [mlp, norm_net])
def test_the_same_seed_gives_the_same_bits(section, make):
    """Wherever torch's own generator stands."""
    torch.manual_seed(1)
    first = produce(section(), make())
    torch.manual_seed(2)
    again = produce(section(), make())
    assert set() == changed(first.model, again.model)
    assert (first.steps, first.details) == (again.steps, again.details)


@every_producer
@pytest.mark.parametrize("rows", [1, 5])
def test_the_querys_loss_moves_the_way_the_direction_says(section, rows):
    """+1 rises, -1 falls; the model without noise or batch norm, so that nothing else moves it."""
    base, batch = mlp(), query(rows)
    made = produce(section(), base, batch)
    assert 0 < sign(section()) * (mean_loss(made.model, batch) - mean_loss(base, batch))
    assert made.steps >= 1


@every_producer
def test_the_counterpart_fits_the_engine(section):
    """Its changed tensors give the losses of the counterpart itself."""
    base, batch = norm_net(), query(4)
    made = produce(section(), base, batch).model.eval()
    tensors = {name: made.state_dict()[name] for name in changed(base, made)}
    losses = LossEngine(base, TASK, [tensors]).losses(
        Arrays({name: value.numpy() for name, value in batch.items()}).batches(4)
    )
    with torch.no_grad():
        assert TASK.loss_B(made, batch).tolist() == pytest.approx(losses.counterpart_QN[0].tolist(), abs=1e-6)


@every_producer
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ("^2", {"2.weight", "2.bias"}),
        ("bias", {"0.bias", "2.bias"}),
    ],
)
def test_only_parameters_that_match_are_moved(section, pattern, expected):
    """`parameters` is searched in the names; empty is all of them."""
    base = mlp()
    assert expected == changed(base, produce(section(parameters=pattern), base).model)


@every_producer
def test_a_pattern_that_matches_nothing_is_a_contract_error(section):
    """The message shows the pattern and the first names there are."""
    with pytest.raises(ContractError, match=re.escape("'head' matches none of 4 parameters: 0.weight, 0.bias")):
        produce(section(parameters="head"), mlp())


@every_producer
def test_train_mode_moves_batch_norm_statistics_and_eval_mode_does_not(section):
    """Buffers follow the query only where the recipe says so."""
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    base = norm_net()
    assert buffers == buffers & changed(base, produce(section(mode="train"), base).model)
    assert set() == buffers & changed(base, produce(section(mode="eval"), base).model)


@every_producer
@pytest.mark.parametrize("limit", [0.05, 0.2])
def test_steps_stop_once_the_loss_has_moved_enough(section, limit):
    """At least one step, not all of a thousand; the loss has moved by the limit, and not far beyond."""
    base, batch = mlp(), query()
    recipe = section(steps=1000, lr=0.005, normalize=True, momentum=0.0, max_loss_change=limit, mode="eval")
    made = produce(recipe, base, batch)
    moved = abs(mean_loss(made.model, batch) - mean_loss(base, batch))
    assert 0 < made.steps < 1000
    assert limit <= moved < limit + 0.05


@every_producer
def test_without_a_limit_all_steps_are_taken(section):
    """0 switches the stop off."""
    assert 13 == produce(section(steps=13, max_loss_change=0.0), mlp()).steps


@every_producer
def test_a_diverging_recipe_is_a_numerics_error(section):
    """The message says at which step the loss stopped being a number, the hint what to lower."""
    one = query(1)["features"]
    at_odds = {"features": one.repeat(2, 1), "label": torch.tensor([0, 1])}  # no weights fit both: descent diverges too
    with pytest.raises(NumericsError, match=r"loss is (nan|inf|-inf) before step \d of 5") as caught:
        produce(section(**{**STRAIGHT, "optimizer": "sgd", "lr": 3e38, "steps": 5}), mlp(), at_odds)
    assert "producer.lr" in caught.value.hint


@every_producer
def test_a_query_without_a_loss_is_a_numerics_error(section):
    """A label outside the classes has a loss of NaN: no step is taken."""
    batch = {**query(), "label": torch.tensor([0, CLASSES])}
    with pytest.raises(NumericsError, match="nan"):
        produce(section(), mlp(), batch)


@every_producer
@pytest.mark.parametrize("rows", [1, 3])
def test_one_step_of_sgd_is_the_learning_rate_times_the_gradient(section, rows):
    """theta + direction * lr * grad of the query's mean loss, as autograd computes it."""
    base, batch = mlp(), query(rows)
    recipe = section(**{**STRAIGHT, "optimizer": "sgd", "lr": 0.25})
    after = produce(recipe, base, batch).model.state_dict()
    for name, gradient in gradients(base, batch).items():
        expected = base.state_dict()[name] + sign(recipe) * 0.25 * gradient
        assert expected.flatten().tolist() == pytest.approx(after[name].flatten().tolist(), abs=1e-6)


@every_producer
def test_a_normalised_step_has_the_length_of_the_learning_rate(section):
    """All parameters together move by lr in L2, along the gradient."""
    base, batch = mlp(), query()
    recipe = section(**{**STRAIGHT, "optimizer": "sgd", "lr": 0.25, "normalize": True})
    after = produce(recipe, base, batch).model.state_dict()
    step = torch.cat([(after[name] - tensor).flatten() for name, tensor in base.state_dict().items()])
    gradient = torch.cat([one.flatten() for one in gradients(base, batch).values()])
    assert 0.25 == pytest.approx(step.norm().item(), rel=1e-5)
    assert sign(recipe) == pytest.approx(torch.cosine_similarity(step, gradient, dim=0).item(), abs=1e-5)


@every_producer
def test_adams_first_step_is_the_learning_rate_times_the_sign(section):
    """theta + direction * lr * sign(grad) where the gradient is not tiny."""
    base, batch, lr = mlp(), query(), 0.01
    recipe = section(**{**STRAIGHT, "optimizer": "adam", "lr": lr})
    after = produce(recipe, base, batch).model.state_dict()
    for name, gradient in gradients(base, batch).items():
        step = (after[name] - base.state_dict()[name]) / (sign(recipe) * lr)
        clear = gradient.abs() > 1e-3
        assert clear.any()
        assert gradient.sign()[clear].tolist() == pytest.approx(step[clear].tolist(), abs=1e-4)


@every_producer
def test_weight_decay_pulls_towards_zero_whatever_the_direction(section):
    """With a step too small to matter otherwise, weights shrink by lr * weight_decay."""
    base, batch = mlp(), query()
    recipe = section(**{**STRAIGHT, "optimizer": "sgd", "lr": 1e-5, "weight_decay": 1e4})
    after = produce(recipe, base, batch).model.state_dict()
    for name, tensor in base.state_dict().items():
        assert (0.9 * tensor).flatten().tolist() == pytest.approx(after[name].flatten().tolist(), abs=1e-4)


def test_a_vanished_gradient_cannot_be_normalised():
    """A query that the model is certain of has no direction; the hint names the recipe that has noise."""
    base = mlp(certainty=1e6)
    with pytest.raises(NumericsError, match=r"gradient has length 0\.0") as caught:
        produce(Unlearn(), base, certain_query(base))
    assert "preset: paper" in caught.value.hint


def test_copies_of_a_query_leave_its_mean_loss_where_it_is():
    """`repeat` without batch norm gives the same step."""
    base = mlp()
    once, thrice = (produce(Unlearn(**STRAIGHT, repeat=n), base).model for n in (1, 3))
    for name, tensor in once.state_dict().items():
        assert tensor.flatten().tolist() == pytest.approx(thrice.state_dict()[name].flatten().tolist(), abs=1e-6)


def test_one_row_has_batch_statistics_only_with_the_papers_copy():
    """Batch norm in train mode refuses a batch of one; the paper's two copies are a batch."""
    assert 2 == PAPER["repeat"]
    assert 1 == produce(Unlearn(preset="paper", noise_radius=0.0), norm_net(), query(1)).steps
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        produce(Unlearn(preset="paper", noise_radius=0.0, repeat=1), norm_net(), query(1))


def test_noise_stays_away_from_a_query_that_has_a_loss():
    """The paper's recipe without its noise takes the same step to the bit, and reports no noise."""
    base = mlp()
    made = produce(Unlearn(preset="paper"), base)
    assert {} == made.details
    assert set() == changed(made.model, produce(Unlearn(preset="paper", noise_radius=0.0), base).model)


def test_noise_lifts_a_query_of_near_zero_loss_and_is_reported():
    """The radius reported is the first one, grown once per retry."""
    base = mlp(certainty=30.0)
    batch = certain_query(base)
    assert mean_loss(base, batch) / 2 < PAPER["noise_below"]
    made = produce(Unlearn(preset="paper", noise_radius=0.1), base, batch)
    assert {"noise_radius", "noise_tries"} == set(made.details)
    assert 1 < made.details["noise_tries"] <= PAPER["noise_tries"]
    expected = 0.1 * PAPER["noise_growth"] ** (made.details["noise_tries"] - 1)
    assert expected == pytest.approx(made.details["noise_radius"])
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} == changed(base, made.model)


def test_noise_follows_the_seed():
    """Another seed draws another point; the same seed the same one."""
    base = mlp(certainty=30.0)
    first, again, other = (
        produce(Unlearn(preset="paper"), base, certain_query(base), seed=seed).model for seed in (1, 1, 2)
    )
    assert set() == changed(first, again)
    assert set() != changed(first, other)


class Recording(nn.Module):
    """Certain of class 0 near the origin, of nothing away from it; keeps every input that it was asked about."""

    seen: list = []

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))

    def forward(self, x):
        self.seen.append(x.detach().clone())
        near = self.scale * (x.norm(dim=1) < 2.5)
        return torch.stack([near, torch.zeros_like(near)], dim=1)


def test_noise_lies_on_the_sphere_once_per_row_and_the_same_in_every_copy():
    """Each row is moved by exactly the radius reported, each by its own point, its copies with it."""
    Recording.seen.clear()
    batch = {"features": torch.zeros((3, FEATURES)), "label": torch.zeros(3, dtype=torch.int64)}
    made = produce(Unlearn(preset="paper", noise_radius=2.0), Recording().eval(), batch)
    rows = Recording.seen[-1]
    assert [made.details["noise_radius"]] * 6 == pytest.approx(rows.norm(dim=1).tolist(), rel=1e-6)
    assert torch.equal(rows[:3], rows[3:])
    assert not torch.equal(rows[0], rows[1])
    assert 1 + math.ceil(math.log(2.5 / 2.0, PAPER["noise_growth"])) == made.details["noise_tries"]


def test_noise_that_cannot_lift_the_loss_ends_in_an_error():
    """A model that is certain of everything: after `noise_tries` the message says how far it went."""
    base = mlp(certainty=0.0)
    base[2].bias.data = torch.tensor([100.0, 0.0, 0.0])
    batch = {**query(1), "label": torch.tensor([0])}
    with pytest.raises(NumericsError, match=r"under 0\.02 nats after 3 tries of noise up to radius") as caught:
        produce(Unlearn(preset="paper", noise_tries=3), base, batch)
    assert "noise_tries" in caught.value.hint


class Words:
    """A task whose examples are integers only."""

    def columns(self):
        return [Column("word", ("word",), "int64"), Column("label", ("label",), "int64")]

    def loss_B(self, model, batch):
        return nn.functional.cross_entropy(model(batch["word"]), batch["label"], reduction="none")


def test_a_query_without_a_floating_point_column_takes_no_noise():
    """Near zero loss there is nothing to add noise to: the hint says which field switches it off."""
    base = nn.Embedding(5, CLASSES).eval()
    base.weight.data = torch.eye(5)[:, :CLASSES] * 100
    batch = {"word": torch.tensor([1]), "label": torch.tensor([1])}
    with pytest.raises(ContractError, match="no floating-point column to add noise to") as caught:
        produce(Unlearn(preset="paper"), base, batch, task=Words())
    assert "noise_radius" in caught.value.hint


@every_producer
def test_a_query_of_integers_with_a_loss_needs_no_noise(section):
    """Any task is served as long as its query has a gradient."""
    torch.manual_seed(0)
    base = nn.Embedding(5, CLASSES).eval()
    made = produce(section(), base, {"word": torch.tensor([1]), "label": torch.tensor([2])}, task=Words())
    assert {"weight"} == changed(base, made.model)
