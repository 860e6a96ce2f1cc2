"""`natural` as language models have it by default: curvature in blocks, and steps that are kept in any precision."""

import copy

import numpy as np
import pytest
import torch

from pipeline import changes
from pipeline.batches import Arrays
from pipeline.changes import Added
from pipeline.curvatures.base import Parameters, Sample
from pipeline.curvatures.ekfac import EKFAC
from pipeline.engine import LossEngine
from pipeline.extensions import load_producer
from pipeline.producer_choices import Natural
from pipeline.producers.base import Setting
from tests.contract.test_adapters import TASK, batch, gpt2
from tests.language import VOCABULARY, gpt

DEFAULT = {"curvature": "ekfac", "damping_share": 0.1}


def mixture():
    """Experts whose weights are three-dimensional, and a router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=48,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


MODELS = {"llama": gpt, "tied": lambda: gpt(tied=True), "gpt2": gpt2, "mixture": mixture}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


PRODUCER = load_producer(Natural(sample_rows=8, **DEFAULT))


def setting_of(base, first_order=True):
    sample = Sample([batch(4, seed=seed) for seed in (1, 2)], 8)
    return Setting(base, TASK, sample.batches[:1], sample, 0, first_order)


def produced(base, first_order=True, fitted=None):
    """Counterparts of two queries, as changes."""
    setting = setting_of(base, first_order)
    queries = {"a": batch(1, seed=7), "b": batch(2, seed=8)}
    found, steps = {}, {}
    for name, made in PRODUCER.produce_all(setting, queries, fitted or PRODUCER.fit(setting)):
        found[name] = made
        between = changes.between(base, made.model, made.added)  # of a model that the next one changes
        steps[name] = {key: change for key, (change, _) in between.items()}
    return steps, found


def scores(base, counterparts, way="gradient", rows=6):
    arrays = {name: tensor.numpy() for name, tensor in batch(rows, seed=3).items()}
    engine, batches = LossEngine(base, TASK, list(counterparts.values())), Arrays(arrays).batches(4)
    if way == "difference":
        return engine.losses(batches).difference_QN
    return engine.derivatives(batches, None, way).derivative_QN


@every_model
def test_layers_of_blocks_are_factored_and_all_else_is_diagonal(model):
    """Output layers, embeddings, norms, and experts that are no layers; each parameter is one or the other."""
    base = model()
    parameters = Parameters(base)
    found = EKFAC().fit(base, TASK, parameters, Sample([batch(4)], 4), seed=0)
    factored = {name.removesuffix("/eigenvalues") for name in found if name.endswith("/eigenvalues")}
    diagonal = {name.removesuffix("/diagonal") for name in found if name.endswith("/diagonal")}
    biases = {name.removesuffix("weight") + "bias" for name in factored} & set(parameters.names)
    assert set(parameters.names) == factored | biases | diagonal
    layers = {
        f"{name}.weight" for name, module in base.named_modules() if type(module).__name__ in ("Linear", "Conv1D")
    }
    assert {name for name in layers if ".layers." in name or ".h." in name} == factored


@every_model
def test_a_step_is_the_curvatures_solution_and_scores_are_derivatives(model):
    """Along the step the query's loss rises by .01 nats; a score is the slope of the loss along it, by plain autograd."""
    base = model()
    counterparts, made = produced(base)
    assert all(isinstance(change, Added) for each in counterparts.values() for change in each.values())
    query = Parameters(base).gradient(lambda: TASK.loss_B(base, batch(1, seed=7)).mean())
    parameters = Parameters(base)
    step_P = parameters.flat([counterparts["a"][name].step for name in parameters.names])
    assert 0.01 == pytest.approx(float(query.double() @ step_P.double()), rel=1e-4)
    assert made["a"].details["length"] == made["a"].scale
    rows = batch(6, seed=3)
    for row, got in enumerate(scores(base, counterparts)[0]):
        own = {name: value[row : row + 1] for name, value in rows.items()}
        slope_P = parameters.gradient(lambda own=own: TASK.loss_B(base, own).sum())
        assert float(slope_P.double() @ step_P.double()) == pytest.approx(got, rel=2e-3, abs=1e-7)


def test_the_steps_length_is_not_looked_for_and_scores_are_proportional():
    """The search for a length measures the probe a dozen times; its scores differ from those without by one factor."""
    base = gpt()
    without = scores(base, produced(base)[0])
    searched = scores(base, produced(base, first_order=False)[0])
    for plain, long in zip(without, searched, strict=True):
        factor = float(plain @ long / (plain @ plain))
        np.testing.assert_allclose(factor * plain, long, atol=0.02 * np.abs(long).max())


def test_a_step_too_short_for_the_weights_precision_is_kept():
    """In bfloat16 weights would round it away; scores are those of the model in float32 but for that model's own rounding."""
    fine = gpt()
    coarse = copy.deepcopy(fine).to(torch.bfloat16)
    fitted = PRODUCER.fit(setting_of(fine))  # for both: of 88 labels drawn, one that rounding moves would show
    expected, found = (scores(each, produced(each, fitted=fitted)[0]) for each in (fine, coarse))
    for wanted, got in zip(expected, found, strict=True):
        assert np.corrcoef(wanted, got)[0, 1] > 0.99
    counterparts, _ = produced(coarse, fitted=fitted)
    read = {name: changes.from_bytes(changes.to_bytes(each)) for name, each in counterparts.items()}
    np.testing.assert_array_equal(scores(coarse, read), found)


def test_what_is_added_has_the_losses_of_the_sum():
    """By the difference method too, whether there is room for all steps or for one at a time."""
    base = gpt()
    counterparts, _ = produced(base)
    whole = {
        name: {key: base.state_dict()[key] + change.step for key, change in each.items()}
        for name, each in counterparts.items()
    }
    expected = scores(base, whole, way="difference")
    np.testing.assert_array_equal(expected, scores(base, counterparts, way="difference"))
    arrays = {name: tensor.numpy() for name, tensor in batch(6, seed=3).items()}
    engine = LossEngine(base, TASK, list(counterparts.values()), room_bytes=1)
    np.testing.assert_array_equal(expected, engine.losses(Arrays(arrays).batches(4)).difference_QN)
