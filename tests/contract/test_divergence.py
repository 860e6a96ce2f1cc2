"""How far a copy is from its base: KL of cross-entropy, a distance of squared errors; 0 of an untuned copy, to the bit."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.curvatures.divergence import Divergence
from tests.language import gpt
from tests.retained import (
    CLASSES,
    TASK,
    TEXTS,
    SquaredDistance,
    mean_divergence,
    moved,
    of_worlds,
    perceptron,
    rows,
    sample_of,
    texts,
    untuned,
)


@pytest.mark.parametrize("other_labels", [0, 1])
def test_of_cross_entropy_it_is_the_kl_divergence_whatever_the_labels(other_labels):
    """Of distributions at the temperature, mean over all rows though batches differ in size."""
    base = perceptron()
    other, sample = moved(base, 0.3), sample_of(rows)
    relabelled = [{**batch, "label": (batch["label"] + other_labels) % CLASSES} for batch in sample]
    features = torch.cat([batch["features"] for batch in sample])
    before, after = (F.log_softmax(model(features) / 2.0, dim=1) for model in (base, other))
    expected = F.kl_div(after, before, reduction="batchmean", log_target=True).item()
    assert expected == pytest.approx(mean_divergence(Divergence(untuned(base), TASK, relabelled), other), rel=1e-3)


@pytest.mark.slow
def test_of_texts_it_is_that_of_their_tokens():
    """The mean over tokens that count, as of their losses."""
    base, batch = gpt(), texts(6, 1)
    other = moved(base, 0.02)
    before, after = (F.log_softmax(model(batch["input_ids"]).logits[:, :-1], dim=-1) for model in (base, other))
    expected = F.kl_div(after, before, reduction="sum", log_target=True).item() / before[..., 0].numel()
    assert expected == pytest.approx(mean_divergence(Divergence(untuned(base), TEXTS, [batch]), other), rel=1e-3)


def test_of_squared_errors_it_is_half_the_squared_distance_of_outputs():
    """Whatever is wanted of the model."""
    base, batch = perceptron(), rows(9, 1)
    other = moved(base, 0.1)
    distance_BC = other(batch["features"]) - base(batch["features"])
    expected = 0.5 * distance_BC.square().sum(dim=1).mean().item()
    found = mean_divergence(Divergence(untuned(base), SquaredDistance(), [batch]), other)
    assert expected == pytest.approx(found, rel=1e-3)


@of_worlds()
def test_an_untuned_copy_has_no_divergence_and_no_gradient_of_it(make, task, draw):
    """To the bit: so a copy that nothing pushes does not drift, as one that is trained on would."""
    base = make()
    held, other = Divergence(untuned(base), task, sample_of(draw)), untuned(base)
    for i in range(3):
        found = held.of(other, i)
        found.backward()
        assert 0.0 == found.item()
    assert not any(bool(parameter.grad.any()) for parameter in other.parameters() if parameter.grad is not None)


@of_worlds("perceptron", "CNN with batch norm", "own task")
def test_the_curvature_is_the_hessians_largest_eigenvalue(make, task, draw):
    """To a fifth, from batches that take turns; the Hessian by autograd of the divergence itself, in float64."""
    base = make().double()
    sample = [
        {name: each.double() if each.is_floating_point() else each for name, each in batch.items()}
        for batch in sample_of(draw, sizes=(40, 40, 40))
    ]
    held, other = Divergence(untuned(base), task, sample), untuned(base)
    parameters = list(other.parameters())
    total = sum(held.of(other, i) for i in range(3)) / 3
    slope_P = torch.cat([each.flatten() for each in torch.autograd.grad(total, parameters, create_graph=True)])
    rows_P = [torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True) for slope in slope_P]
    hessian_PP = torch.stack([torch.cat([each.flatten() for each in row]) for row in rows_P])
    expected = torch.linalg.eigvalsh(hessian_PP)[-1].item()
    assert expected == pytest.approx(held.largest_curvature(seed=0), rel=0.2)
