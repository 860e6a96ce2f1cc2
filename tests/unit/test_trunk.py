"""The shared trunk: what counterparts have in common is computed once, and losses are those of whole passes to the bit."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from jobs.digits import cnn
from pipeline.batches import Arrays, Ragged, Sequences
from pipeline.engine import LossEngine
from pipeline.tasks.classification import Classification
from pipeline.tasks.language import CausalLM
from tests.language import gpt

TASK = Classification("pixels", "label", [1, 8, 8])
CAUSAL = CausalLM.__new__(CausalLM)  # without a tokenizer: ids are given
CAUSAL.per_token = True
ROWS, BATCH_ROWS = 48, 16
BATCHES = ROWS // BATCH_ROWS


def images():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand((ROWS, 1, 8, 8), generator=generator).numpy()
    return Arrays({"features": features, "label": np.arange(ROWS) % 10})


def texts():
    ids = [[1 + (7 * i + 3 * j) % 30 for j in range(5 + i % 4)] for i in range(ROWS)]
    rows = Ragged.of(ids, 0)
    return Sequences({"input_ids": rows, "labels": Ragged.of(ids, -100)}, np.arange(ROWS), rows.length_S - 1, True)


def moved(model, *prefixes, seed=1, size=0.05):
    """Tensors whose names begin so, moved a little."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}
    assert found
    return {name: p.detach() + size * torch.randn(p.shape, generator=generator) for name, p in found.items()}


class Counted(nn.Module):
    """A module that knows how often it ran."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.runs = inner, 0

    def forward(self, x):
        self.runs += 1
        return self.inner(x)


class Model(nn.Module):
    """Layers that know how often they ran, behind one another as `flow` says."""

    def __init__(self, flow):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Counted(nn.Linear(16, 16)) for _ in range(3))
        self.into, self.out, self.flow = nn.Linear(64, 16), nn.Linear(16, 10), flow

    def forward(self, features):
        return self.out(self.flow(self, self.into(features.flatten(1))))

    @property
    def runs(self):
        return [layer.runs for layer in self.layers]


def chain(model, x):
    for layer in model.layers:
        x = layer(x).relu()
    return x


def again(model, x):
    """The first layer twice, the second time behind the changed one."""
    return model.layers[0](model.layers[2](model.layers[1](model.layers[0](x))))


def in_place(model, x):
    """What an unchanged layer returned is added to where it stands."""
    x = model.layers[0](x)
    x += 1
    return model.layers[2](model.layers[1](x))


def borrowed(model, x):
    """The last layer's weight has a part in what another is given, before its own call."""
    x = model.layers[1](model.layers[0](x) @ model.layers[2].inner.weight)
    return model.layers[2](x)


def stored(model, x):
    """A layer leaves something for later."""
    model.kept = model.layers[0](x)
    return model.layers[2](model.layers[1](model.kept)) + model.kept


def plain(model, task, counterparts, batches):
    """Losses of separate models, batch by batch, by whole passes: [1 + Q, N]."""
    losses = []
    for tensors in ({}, *counterparts):
        own = copy.deepcopy(model)
        own.load_state_dict(tensors, strict=False)
        found = np.empty(ROWS)
        with torch.inference_mode():
            for batch in batches:
                arrays = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
                found[batch.item_B] = task.loss_B(own, arrays)[: len(batch.item_B)].numpy()
        losses.append(found)
    return np.stack(losses)


def assert_plain(model, task, counterparts, inputs, given=None):
    """Losses through the engine are those of whole passes, to the bit; the model is as it was."""
    batches = list(inputs.batches(BATCH_ROWS, 64))
    expected = plain(model, task, counterparts, batches)
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    got = LossEngine(model, task, counterparts).losses(batches, base_S=None if given is None else expected[0])
    assert np.array_equal(expected[0], got.base_N)
    assert np.array_equal(expected[1:], got.counterpart_QN)
    assert forwards == [module.__dict__.get("forward") for module in model.modules()]


def runs_of(model, engine, base_S=None):
    """How often each layer runs in a call of the engine that is not its first."""
    engine.losses(images().batches(BATCH_ROWS), base_S=base_S)
    before = model.runs
    engine.losses(images().batches(BATCH_ROWS), base_S=base_S)
    return [after - earlier for after, earlier in zip(model.runs, before, strict=True)]


@pytest.mark.parametrize(
    ("flow", "changed", "runs"),
    [
        (chain, "layers.2", [1, 1, 3]),
        (chain, "layers.0", [3, 3, 3]),
        (chain, "out", [1, 1, 1]),
        (again, "layers.1", [1 + 3, 3, 3]),
        (stored, "layers.1", [1, 3, 3]),
    ],
)
def test_what_stands_before_the_first_change_runs_once(flow, changed, runs, capsys):
    """Base and two counterparts: a layer that they share runs once for a batch, also one that stores what it returned."""
    model = Model(flow).eval()
    counterparts = [moved(model, changed, seed=seed) for seed in (1, 2)]
    assert_plain(model, TASK, counterparts, images())
    assert [BATCHES * each for each in runs] == runs_of(model, LossEngine(model, TASK, counterparts))
    assert "" == capsys.readouterr().err


def test_counterparts_that_change_different_layers_share_what_none_of_them_changes():
    """The earliest change counts for all."""
    model = Model(chain).eval()
    counterparts = [moved(model, "layers.2"), moved(model, "layers.1", "out")]
    assert_plain(model, TASK, counterparts, images())
    assert [BATCHES, 3 * BATCHES, 3 * BATCHES] == runs_of(model, LossEngine(model, TASK, counterparts))


@pytest.mark.parametrize(("flow", "changed"), [(in_place, "layers.1"), (borrowed, "layers.2")])
def test_a_model_that_does_not_bear_it_is_computed_whole(flow, changed, capsys):
    """It says so once."""
    model = Model(flow).eval()
    counterparts = [moved(model, changed)]
    assert_plain(model, TASK, counterparts, images())
    assert "it is computed from its beginning for every counterpart" in capsys.readouterr().err
    assert [2 * BATCHES] * 3 == runs_of(model, LossEngine(model, TASK, counterparts))


def test_known_base_losses_leave_their_pass_out():
    """The first counterpart's pass then makes the trunk; without counterparts nothing runs."""
    model = Model(chain).eval()
    counterparts = [moved(model, "layers.2", seed=seed) for seed in (1, 2)]
    assert_plain(model, TASK, counterparts, images(), given=True)
    known = np.zeros(ROWS)
    assert [BATCHES, BATCHES, 2 * BATCHES] == runs_of(model, LossEngine(model, TASK, counterparts), known)
    assert [0, 0, 0] == runs_of(model, LossEngine(model, TASK, []), known)


def test_a_batch_that_fails_leaves_the_model_as_it_was():
    """Also in the middle of the shared passes; what comes after it has the losses of whole passes."""
    model = Model(chain).eval()
    counterparts = [moved(model, "layers.2")]
    engine = LossEngine(model, TASK, counterparts)
    engine.losses(images().batches(BATCH_ROWS))
    model.flow = lambda model, x: chain(model, x) / 0 if model.layers[2].runs % 2 else [][0]
    with pytest.raises(IndexError):
        engine.losses(images().batches(BATCH_ROWS))
    model.flow = chain
    assert_plain(model, TASK, counterparts, images())
    expected = plain(model, TASK, counterparts, list(images().batches(BATCH_ROWS)))
    assert np.array_equal(expected[1:], engine.losses(images().batches(BATCH_ROWS)).counterpart_QN)


def test_convolutions_share_with_channels_last():
    """The digits CNN whose last layers are tuned."""
    model = cnn(16).eval().to(memory_format=torch.channels_last)
    names = [name for name, _ in model.named_parameters()]
    assert_plain(model, TASK, [moved(model, *names[-3:])], images())


@pytest.mark.slow
@pytest.mark.parametrize(("changed", "tied"), [("model.layers.1", True), ("lm_head", False), ("model.norm", True)])
def test_language_models_share_their_first_blocks(changed, tied, capsys):
    """The output layer, which the task takes out of the model, included."""
    model = gpt(tied=tied)
    runs = [0, 0]
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    counterparts = [moved(model, changed, seed=seed) for seed in (1, 2)]
    assert_plain(model, CAUSAL, counterparts, texts())
    engine = LossEngine(model, CAUSAL, counterparts)
    engine.losses(texts().batches(BATCH_ROWS, 64))
    runs[:] = [0, 0]
    engine.losses(texts().batches(BATCH_ROWS, 64))
    batches = len(list(texts().batches(BATCH_ROWS, 64)))
    assert [batches, batches * (3 if changed == "model.layers.1" else 1)] == runs
    assert "" == capsys.readouterr().err


def test_layers_that_use_what_is_in_them_without_a_call(capsys):
    """torch's own transformer layers do so in eval mode; the first of two is shared."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Flatten(1, 2), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(64, 10)).eval()
    runs, first, own = [], model[1].layers[0], model[1].layers[0].forward
    first.forward = lambda *args, **keywords: (runs.append(1), own(*args, **keywords))[1]
    counterparts = [moved(model, "1.layers.1", seed=seed) for seed in (1, 2)]
    assert_plain(model, TASK, counterparts, images())
    engine = LossEngine(model, TASK, counterparts)
    engine.losses(images().batches(BATCH_ROWS))
    runs.clear()
    engine.losses(images().batches(BATCH_ROWS))
    assert BATCHES == len(runs)
    assert "" == capsys.readouterr().err


def test_a_tied_embedding_that_changes_leaves_nothing_to_share(capsys):
    """Its output layer's weight is the first thing that the model uses."""
    model = gpt(tied=True)
    assert_plain(model, CAUSAL, [moved(model, "model.embed_tokens")], texts())
    assert "" == capsys.readouterr().err
