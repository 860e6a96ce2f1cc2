"""Per-example gradients of all that a model may be made of, and producer natural with the curvatures made of them."""

import math

import pytest
import torch
from torch import nn

from pipeline.choices import CausalLMTask
from pipeline.curvatures.base import Parameters, Sample
from pipeline.curvatures.per_example import PerExample
from pipeline.errors import ContractError
from pipeline.extensions import load_producer, load_task
from pipeline.producer_choices import Natural
from pipeline.producers.base import Setting
from pipeline.tasks.classification import Classification
from tests.contract.test_curvatures import (
    CLASSES,
    DAMPING,
    DOUBLE,
    SAMPLE,
    SEED,
    TASK,
    batches,
    every_curvature,
    fitted,
    network,
    per_example,
    sample,
    task,
)
from tests.language import VOCABULARY, gpt

pytestmark = pytest.mark.slow


class Turned(nn.Module):
    """Hands on its input with rows as the second axis, as nn.Transformer likes it, to what is inside."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x.transpose(0, 1)).transpose(0, 1)


def test_common_layers_go_the_fast_way():
    """All but a grouped convolution of one network; all of a text model, its tied vocabulary too, which is no layer's own."""
    model = network()
    assert ["5.weight", "5.bias"] == PerExample(model, TASK, Parameters(model), SAMPLE).others
    model, of = gpt(layers=1, tied=True), Sample([texts(3)], 3)
    found = PerExample(model, load_task(CausalLMTask(tokens="ids")), Parameters(model), of)
    assert [] == found.others
    assert "model.embed_tokens.weight" not in found.layers
    assert 7 == len(found.layers)


def test_a_bias_that_a_norm_takes_away_does_not_slow_its_layer():
    """Its gradient is nothing but rounding; the weight's is not."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(2, 3, 3, stride=2, padding=1, padding_mode="circular"), nn.GroupNorm(3, 3), nn.PReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, CLASSES)).to(DOUBLE)
    of, rows = sample(5, 4, shape=(2, 8)), per_example(model, sample(5, 4, shape=(2, 8)), task(2, 8))
    assert [] == PerExample(model, task(2, 8), Parameters(model), of).others
    for name, found in fitted("diagonal", model, of, task(2, 8)).items():
        torch.testing.assert_close(found, (rows[name] ** 2).mean(dim=0))


def test_a_layer_whose_rows_lie_along_another_axis_is_found_out():
    """As many positions as rows: the shape looks right, its gradients are not; it goes the slow way and is right."""
    torch.manual_seed(0)
    layers = nn.Sequential(Turned(nn.Linear(2, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES))
    model, of = layers.to(DOUBLE).eval(), sample(4, 4, shape=(4, 2))
    found = PerExample(model, task(4, 2), Parameters(model), of)
    assert ["3.weight"] == list(found.layers)
    assert ["0.inside.weight", "0.inside.bias"] == found.others
    squares = (per_example(model, of, task(4, 2))["0.inside.weight"] ** 2).mean(dim=0)
    torch.testing.assert_close(fitted("diagonal", model, of, task(4, 2))["0.inside.weight"], squares)


def test_a_layer_that_later_gets_other_rows_is_an_error():
    """A batch of one row looks right along either axis; the next one says which layer it is."""
    model = nn.Sequential(Turned(nn.Linear(2, 2)), nn.Flatten(), nn.Linear(2, CLASSES)).to(DOUBLE)
    of = sample(1, 4, shape=(1, 2))
    with pytest.raises(ContractError, match=r"0\.inside\.weight: its layer was called with \[\[1, 4, 2\]\] for 4 rows"):
        fitted("diagonal", model, of, task(1, 2))


def gpt2():
    """Linear layers with their weights turned over, and a tied vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def encoder():
    """torch's own attention, which uses a weight of its own and a layer that it never calls."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(20, 8), layer, nn.Flatten(), nn.Linear(8 * 5, CLASSES)).eval()


def texts(rows):
    ids = torch.randint(2, VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "labels": ids}


class Ids(Classification):
    """Classes of five words."""

    def _normalised(self, features):
        return features

    def batch(self, rows):
        generator = torch.Generator().manual_seed(rows)
        return {
            "features": torch.randint(0, 20, (rows, 5), generator=generator),
            "label": torch.randint(0, CLASSES, (rows,), generator=generator),
        }


def _pictures(rows):
    return batches(rows, dtype=torch.float32)[0]


MODELS = {
    "convolutions and norms": (lambda: network().float(), lambda: TASK, _pictures),
    "llama, tied": (lambda: gpt(layers=1, tied=True), lambda: load_task(CausalLMTask(tokens="ids")), texts),
    "gpt2": (gpt2, lambda: load_task(CausalLMTask(tokens="ids")), texts),
    "attention": (encoder, lambda: Ids("features", "label", [5]), Ids("features", "label", [5]).batch),
}
"""Of all that a model may be made of: it, its task, a batch of so many rows."""


@every_curvature
@pytest.mark.parametrize(("name", "damping"), [*((name, DAMPING) for name in MODELS), ("convolutions and norms", None)])
def test_natural_steps_along_it(word, name, damping):
    """Counterparts are finite, and the query's loss rises, by what the step says; with a damping given or chosen."""
    make, make_task, batch = MODELS[name]
    model, by = make(), make_task()
    whole = Sample([batch(6), batch(4)], 10)
    setting = Setting(model, by, [batch(5)], whole, SEED)
    producer = load_producer(Natural(curvature=word, damping=damping))
    found = producer.fit(setting)
    assert all(each.isfinite().all() for each in found.tensors.values())
    ((_, produced),) = producer.produce_all(setting, {"q": batch(1)}, found)
    with torch.no_grad():
        rise = (by.loss_B(produced.model, batch(1)) - by.loss_B(model, batch(1))).item()
    assert math.isfinite(rise)
    assert rise == pytest.approx(produced.details["rise_nats"], rel=0.3)
    assert rise > 0
