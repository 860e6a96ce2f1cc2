"""The retaining producer: it moves as its objective says, holds the corpus, and nothing makes it run away."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline import changes
from pipeline.curvatures import divergence
from pipeline.curvatures.divergence import Divergence
from pipeline.errors import ContractError, NumericsError, SpecError
from pipeline.extensions import load_producer
from pipeline.producer_choices import Retain, Unlearn
from tests import kinds
from tests.language import gpt
from tests.retained import (
    CLASSES,
    FEATURES,
    TASK,
    TEXTS,
    SquaredDistance,
    mean_divergence,
    mean_loss,
    of_worlds,
    perceptron,
    rows,
    sample_of,
    texts,
    untuned,
)
from tests.unit.test_spec import parse


class LayerByLayer(SquaredDistance):
    """A task that goes through the model's layers itself."""

    def loss_B(self, model, batch):
        hidden = batch["features"]
        for layer in model.children():
            hidden = layer(hidden)
        return (hidden - batch["wanted"]).square().sum(dim=1)


def produce(base, task=TASK, draw=rows, query=None, seed=7, sample=None, **fields):
    producer = load_producer(Retain(**{"steps": 30, **fields}))
    prepared = producer.prepare(base, task, sample_of(draw) if sample is None else sample, seed=3)
    return producer.produce(base, task, draw(1, 5) if query is None else query, seed, prepared)


def distance(one, other):
    """Between two models' parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return math.sqrt(sum(float((a - b).abs().square().sum().detach()) for a, b in pairs))


def test_a_linear_model_moves_as_the_matrix_says():
    """Squared errors of one layer, one batch: heavy-ball steps of matrices written out, to a relative 1e-3."""
    torch.manual_seed(0)
    base, sample, query = nn.Linear(FEATURES, CLASSES, bias=False).double(), [rows(40, 1)], rows(1, 5)
    sample, query = ({name: value.double() for name, value in batch.items()} for batch in (sample[0], query))
    producer = load_producer(Retain(strength=1e-4, steps=25, lr=0.05))
    prepared = producer.prepare(base, SquaredDistance(), [sample], seed=0)
    made = producer.produce(base, SquaredDistance(), query, 0, prepared)

    weight = base.weight.detach()
    features_NF = sample["features"]
    bend_FF = features_NF.T @ features_NF / len(features_NF)
    push = (weight @ query["features"][0] - query["wanted"][0]).outer(query["features"][0])
    push = push / push.norm() * 1e-4 * math.sqrt(prepared.curvature)
    change, momentum = torch.zeros_like(weight), torch.zeros_like(weight)
    for _ in range(25):
        momentum = 0.9 * momentum + change @ bend_FF - push
        change = change - 0.05 / prepared.curvature * momentum
    assert torch.allclose(change, made.model.weight.detach() - weight, rtol=0, atol=1e-3 * float(change.norm()))


@of_worlds()
def test_the_base_comes_back_unchanged_and_the_copy_is_pushed(make, task, draw):
    """Weights, buffers and what requires gradients; the query's loss rises, and the same seed gives the same bits."""
    base = make()
    next(base.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    query = draw(2, 5)
    made, again = (produce(base, task, draw, query) for _ in range(2))
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in before.items())
    assert [False, True] == [parameter.requires_grad for parameter in base.parameters()][:2]
    assert {None} == {parameter.grad for parameter in base.parameters()}
    assert mean_loss(base, task, query) < mean_loss(made.model, task, query)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in made.model.state_dict().items())
    assert (30, made.details) == (again.steps, again.details)


@pytest.mark.slow
@of_worlds()
@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_too_much_strength_does_not_run_away(make, task, draw, strength):
    """The most there is, for 100 steps: the query's loss rises by its limit and what one push overshoots."""
    base, query = make(), draw(1, 5)
    made = produce(base, task, draw, query, strength=strength, steps=100)
    assert 0 < mean_loss(made.model, task, query) - mean_loss(base, task, query) < 4.0
    assert math.isfinite(made.details["divergence_nats"])


@pytest.mark.parametrize("field", ["strength", "lr"])
def test_more_than_the_most_is_refused(field):
    """Before any work: both are shares of what runs away."""
    with pytest.raises(SpecError, match=rf"producer.*{field}"):
        parse(producer={"name": "retain", field: 1.5})


def test_scores_do_not_depend_on_units_of_weights():
    """The same function of weights that are counted in hundredths: the same counterpart, in outputs, with the same fields."""

    class Counted(nn.Module):
        def __init__(self, unit):
            super().__init__()
            self.unit = unit
            self.weights = nn.ParameterList([p.detach() / unit for p in perceptron().parameters()])

        def forward(self, x):
            first, offset, last, shift = (self.unit * each for each in self.weights)
            return F.linear(torch.tanh(F.linear(x, first, offset)), last, shift)

    batch = rows(50, 9)
    effects = []
    for unit in (1.0, 0.01, 100.0):
        base = Counted(unit).eval()
        made = produce(base).model
        effects.append((made(batch["features"]) - base(batch["features"])).detach())
    assert all(torch.allclose(effects[0], effect, rtol=1e-2, atol=1e-5) for effect in effects)


@pytest.mark.slow
@of_worlds("perceptron", "CNN with batch norm", "own task", "causal LM")
def test_the_corpus_is_retained(make, task, draw):
    """At the same rise of the query's loss plain ascent moves outputs on the corpus further."""
    base, query = make(), draw(1, 5)
    held = Divergence(untuned(base), task, sample_of(draw))
    made = produce(base, task, draw, query, steps=100, strength=0.05)
    rise = mean_loss(made.model, task, query) - mean_loss(base, task, query)
    ascent = load_producer(Unlearn(max_loss_change=rise, lr=0.001, steps=5000)).produce(base, task, query, 7)
    assert rise <= mean_loss(ascent.model, task, query) - mean_loss(base, task, query)
    here, there = (mean_divergence(held, each.model) for each in (made, ascent))
    assert here < 0.8 * there


def test_a_query_does_not_depend_on_those_before_it():
    """Prepared once for all: whatever was asked before, the same bits, held in memory or not."""
    base, producer = perceptron(), load_producer(Retain(steps=30))
    prepared = producer.prepare(base, TASK, sample_of(rows), seed=3)
    producer.produce(base, TASK, rows(2, 11), 8, prepared)
    second = producer.produce(base, TASK, rows(1, 5), 7, prepared).model
    assert 0.0 == distance(second, produce(base).model)


def test_base_outputs_beyond_memory_are_computed_again(monkeypatch):
    """The same bits as where all are held."""
    base = perceptron()
    before = produce(base).model
    monkeypatch.setattr(divergence, "HELD_BYTES", 0)
    assert 0.0 == distance(before, produce(base).model)


def test_rows_without_a_loss_hold_nothing():
    """A label outside the classes: the counterpart is that of the other rows."""
    base, sample = perceptron(), sample_of(rows, sizes=(20, 20))
    bad = {**rows(3, 8), "label": torch.tensor([CLASSES, -1, 99])}
    more = [{name: torch.cat([value, bad[name]]) for name, value in sample[0].items()}, sample[1], bad]
    assert 0.0 == distance(produce(base, sample=sample).model, produce(base, sample=more).model)


def test_a_sample_without_any_loss_is_a_contract_error():
    """The wrong label column, say."""
    bad = {**rows(3, 8), "label": torch.tensor([CLASSES, -1, 99])}
    with pytest.raises(ContractError, match="none of the rows drawn from the corpus has a finite loss"):
        produce(perceptron(), sample=[bad])


def test_a_task_that_does_not_call_its_model_is_a_contract_error():
    """Nothing says what the model's outputs are: that is said before a query is tuned."""
    with pytest.raises(
        ContractError, match=r"LayerByLayer: no output of Sequential(.|\n)*must call its model as model"
    ):
        produce(perceptron(), LayerByLayer())


def test_a_loss_that_does_not_bend_is_a_numerics_error():
    """The output itself as the loss: nothing holds a copy."""

    class Straight(SquaredDistance):
        def loss_B(self, model, batch):
            return model(batch["features"]).sum(dim=1)

    with pytest.raises(NumericsError, match=r"bends by 0\.0 nats"):
        produce(perceptron(), Straight())


def test_complex_parameters_alone_are_a_contract_error():
    """The curvature is that of real ones."""
    with pytest.raises(ContractError, match="all parameters that are chosen are complex"):
        produce(kinds.made(kinds.ComplexParameter), parameters="turn")


def test_a_query_of_which_the_model_is_certain_is_a_numerics_error():
    """A loss of exactly 0 has no direction."""
    base = perceptron()
    with torch.no_grad():
        base[2].weight *= 1e4
    features = rows(1, 5)["features"]
    query = {"features": features, "label": base(features).argmax(dim=1)}
    with pytest.raises(NumericsError, match=r"gradient has length 0\.0"):
        produce(base, query=query, sample=[rows(400, 1)])


def test_a_query_without_a_loss_is_a_numerics_error():
    """A label outside the classes."""
    with pytest.raises(NumericsError, match="loss is nan before step 1"):
        produce(perceptron(), query={**rows(1, 5), "label": torch.tensor([CLASSES])})


def test_the_push_ends_at_its_limit():
    """The query's loss stays about where the limit is, and below what it would reach without."""
    base, query = perceptron(), rows(1, 5)
    free, bound = (
        mean_loss(produce(base, query=query, steps=100, strength=0.3, max_loss_change=limit).model, TASK, query)
        - mean_loss(base, TASK, query)
        for limit in (0.0, 0.2)
    )
    assert 0.1 < bound < 0.4 < free


def test_only_chosen_parameters_move():
    """By name, and the last blocks of the model."""
    base = perceptron()
    for fields, expected in (
        ({"parameters": "bias"}, {"0.bias", "2.bias"}),
        ({"last_blocks": 1}, {"2.weight", "2.bias"}),
    ):
        made = produce(base, **fields).model
        pairs = zip(base.named_parameters(), made.parameters(), strict=True)
        assert expected == {name for (name, before), after in pairs if not torch.equal(before, after)}


@pytest.mark.slow
def test_adapters_are_retained_too():
    """Factors alone are saved; the query's loss rises; the corpus keeps its outputs better than under plain ascent."""
    base, query = gpt(), texts(1, 5)
    held = Divergence(untuned(base), TEXTS, sample_of(texts))
    made = produce(base, TEXTS, texts, query, steps=100, strength=0.05, lora_rank=4)
    found = changes.between(base, made.model, made.added)
    assert found
    assert all(isinstance(change, changes.LowRank) for change, _ in found.values())
    rise = mean_loss(made.model, TEXTS, query) - mean_loss(base, TEXTS, query)
    ascent = load_producer(Unlearn(max_loss_change=rise, lr=0.005, steps=5000, lora_rank=4)).produce(
        base, TEXTS, query, 7
    )
    here, there = (mean_divergence(held, each.model) for each in (made, ascent))
    assert 0 < rise
    assert here < 0.8 * there
