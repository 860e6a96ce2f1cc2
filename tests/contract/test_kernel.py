"""The Gauss-Newton matrix by the inner products of its rows: what is left out, what has no room, and several workers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.curvatures import kernel
from pipeline.curvatures.base import Parameters, Sample
from pipeline.curvatures.gauss_newton import GaussNewton, product
from pipeline.curvatures.kernel import Kernel, TooLargeError
from pipeline.errors import NumericsError
from pipeline.tasks.classification import Classification
from tests.contract.test_natural import (
    TASK,
    convolution,
    every_model,
    keep_all,
    made,
    natural,
    perceptron,
    query_of,
    sample_of,
    setting_of,
)

pytestmark = pytest.mark.slow
DAMPING = 0.02


def of(model, sample, task=TASK):
    return Kernel(model, task, Parameters(model), sample)


def vectors(model, number=5):
    return torch.randn(number, Parameters(model).size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every_model
def test_its_product_is_that_of_the_matrix(make, monkeypatch):
    """All of it, if nothing is left out; nearly, and never more, with what is kept."""
    model, batch = made(make)
    exact = product(model, TASK, Parameters(model), sample_of(batch), vectors(model))
    kept = of(model, sample_of(batch))
    off = exact - kept.product(vectors(model))
    assert 0 < off.norm() < 0.5 * exact.norm()
    assert ((off * vectors(model)).sum(dim=1) > 0).all()
    keep_all(monkeypatch)
    whole = of(model, sample_of(batch))
    assert kept.rows < whole.rows <= 2 * len(batch["label"])  # three classes bend in two directions
    torch.testing.assert_close(whole.product(vectors(model)), exact, rtol=1e-9, atol=1e-12)


def test_its_solve_is_that_of_the_damped_matrix():
    """For dampings from far below the smallest eigenvalue that counts to far above the largest."""
    model, batch = made(convolution)
    found = of(model, sample_of(batch))
    for damping in (1e-4, DAMPING, 10.0):
        solved = found.solve(vectors(model), damping)
        back = found.product(solved) + damping * solved
        torch.testing.assert_close(back, vectors(model), rtol=1e-6, atol=1e-8)


def test_influence_norms_are_those_of_its_solves():
    """g' v and v' G v for v = (G + damping I)^-1 g, without making v."""
    model, batch = made(convolution)
    found = of(model, sample_of(batch))
    norms = found.norms(vectors(model))
    for damping in (1e-4, DAMPING, 10.0):
        step_QP = found.solve(vectors(model), damping)
        square_Q, part_Q = norms(damping)
        torch.testing.assert_close(square_Q, (vectors(model) * step_QP).sum(dim=1), rtol=1e-6, atol=0)
        torch.testing.assert_close(part_Q, (step_QP * found.product(step_QP)).sum(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "value"), [("MOST_ROWS", 3), ("MOST_BYTES", 100), ("MOST_OUTPUTS", 2)])
def test_what_has_no_room_is_solved_in_iterations(name, value, monkeypatch):
    """To the same, as nearly as iterations and what is kept allow."""
    model, batch = made(perceptron)
    curvature, sample = GaussNewton(60, 1e-9), sample_of(batch)

    def solved():
        curvature.load(model, TASK, Parameters(model), sample, {})
        return curvature.solve(vectors(model), [DAMPING])[0]

    keep_all(monkeypatch)
    direct = solved()
    assert curvature.kernel is not None
    monkeypatch.setattr(kernel, name, value)
    with pytest.raises(TooLargeError):
        of(model, sample)
    sample = sample_of(batch)
    iterative = solved()
    assert curvature.kernel is None
    torch.testing.assert_close(iterative, direct, rtol=1e-6, atol=1e-8)


def test_a_model_whose_outputs_are_not_one_for_each_row_is_solved_in_iterations():
    """One logit for two classes, as a model that joins rows would give it."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.layer(x), "all": self.layer(x).sum(dim=0)[None]}

    class First(Classification):
        def loss_B(self, model, batch):
            found = model(batch["features"])
            return (
                nn.functional.cross_entropy(found["logits"], batch["label"], reduction="none") + 0 * found["all"].sum()
            )

    torch.manual_seed(0)
    _, batch = made(perceptron)
    with pytest.raises(TooLargeError):
        of(Joined().double().eval(), sample_of(batch), First("features", "label", [4]))


def _work(rank, workers, folder):
    """What one of several workers does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    model, batch = made(convolution)
    whole = sample_of(batch)
    mine = Sample(whole.batches[rank::workers], whole.rows, range(3)[rank::workers])
    found = of(model, mine)
    torch.save((found.inner_KK, found.solve(vectors(model), DAMPING)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_workers_together_find_what_one_finds(tmp_path):
    """Two with two batches and one, four of which one has none, against one with all three: inner products to the bit."""
    model, batch = made(convolution)
    alone = of(model, sample_of(batch))
    for workers in (2, 4):
        folder = tmp_path / str(workers)
        folder.mkdir()
        torch.multiprocessing.spawn(_work, (workers, folder), workers)
        for rank in range(workers):
            inner_KK, solved = torch.load(folder / f"{rank}.pt")
            assert torch.equal(inner_KK, alone.inner_KK)
            torch.testing.assert_close(solved, alone.solve(vectors(model), DAMPING), rtol=1e-9, atol=1e-12)


def cut(batch, each):
    rows = len(batch["label"])
    parts = [{name: value[i : i + each] for name, value in batch.items()} for i in range(0, rows, each)]
    return Sample(parts, rows)


@every_model
def test_batches_do_not_show(make):
    """What is kept is chosen of all rows: one batch of them, some of 7 and some of 1 give the same, to rounding."""
    model, batch = made(make, rows=30)
    expected = of(model, cut(batch, 30))
    for each in (7, 1):
        found = of(model, cut(batch, each))
        assert expected.rows == found.rows
        torch.testing.assert_close(found.product(vectors(model)), expected.product(vectors(model)))
        torch.testing.assert_close(found.solve(vectors(model), DAMPING), expected.solve(vectors(model), DAMPING))


@pytest.mark.parametrize("each", [1, 4, 40])
def test_nor_do_they_where_some_of_a_sample_will_do(each, monkeypatch):
    """Rows are taken as long as there is room, not batches: 27 of 40, as a sample of these alone."""
    model, batch = made(convolution, rows=40)
    first = {name: value[:27] for name, value in batch.items()}
    monkeypatch.setattr(kernel, "ENOUGH_ROWS", 20)
    monkeypatch.setattr(kernel, "MOST_ROWS", of(model, cut(first, 27)).rows)
    found = Kernel(model, TASK, Parameters(model), cut(batch, each), some=True)
    assert 27 <= found.of < 40
    alone = of(model, cut({name: value[: found.of] for name, value in batch.items()}, 40))
    torch.testing.assert_close(found.solve(vectors(model), DAMPING), alone.solve(vectors(model), DAMPING))


def test_a_batch_of_which_nothing_is_kept_counts_all_the_same():
    """Rows that the model is certain of do not bend: they have no rows of S, and are in the mean."""
    model, batch = made(lambda: nn.Linear(4, 3))
    certain = {"features": 1e5 * batch["features"], "label": batch["label"]}
    found = of(model, Sample([certain, batch], 48))
    assert (48, [1]) == (found.of, [part.number for part in found.parts])
    exact = product(model, TASK, Parameters(model), Sample([batch], 24), vectors(model)) / 2
    assert (exact - found.product(vectors(model))).norm() < 0.3 * exact.norm()


def test_some_of_a_sample_will_do_if_they_are_enough(monkeypatch):
    """The first rows that there is room for, as if there were no others; too few of them are none."""
    model, batch = made(convolution, rows=40)
    parts = [{name: value[i : i + 10] for name, value in batch.items()} for i in range(0, 40, 10)]
    whole = Sample(parts, 40)
    monkeypatch.setattr(kernel, "ENOUGH_ROWS", 20)
    monkeypatch.setattr(kernel, "MOST_ROWS", of(model, Sample(parts[:3], 30)).rows)
    with pytest.raises(TooLargeError):
        of(model, whole)
    found = Kernel(model, TASK, Parameters(model), whole, some=True)
    assert 30 <= found.of < 40
    alone = of(model, cut({name: value[: found.of] for name, value in batch.items()}, 10))
    torch.testing.assert_close(found.solve(vectors(model), DAMPING), alone.solve(vectors(model), DAMPING))
    monkeypatch.setattr(kernel, "ENOUGH_ROWS", found.of + 1)
    with pytest.raises(TooLargeError):
        Kernel(model, TASK, Parameters(model), whole, some=True)


@pytest.mark.parametrize(("most", "word"), [(6000, "gauss_newton"), (3, "ekfac")])
def test_by_default_a_curvature_is_taken_that_can_be_inverted(most, word, monkeypatch, capsys):
    """The matrix itself where it has room, else EK-FAC, which is said; queries that come later get the same."""
    monkeypatch.setattr(kernel, "MOST_ROWS", most)
    model, batch = made(perceptron)
    setting = setting_of(model, batch)
    fitted = natural(curvature=None).fit(setting)
    assert word == fitted.details["curvature"]
    assert (word == "ekfac") == ("could be inverted directly" in capsys.readouterr().err)
    ((_, produced),) = natural(curvature=None).produce_all(setting, {"a": query_of(batch, 0)}, fitted)
    assert word == produced.details["curvature"]


def test_a_damping_below_rounding_is_an_error():
    """It says what to do."""
    model, batch = made(convolution, torch.float32)
    with pytest.raises(NumericsError, match="too small") as caught:
        of(model, sample_of(batch)).solve(vectors(model).float(), 1e-30)
    assert "raise producer.damping" in caught.value.hint


def test_weights_that_are_not_finite_are_an_error():
    """Said of the losses, before anything is solved."""
    model, batch = made(convolution)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(NumericsError, match="finite"):
        of(model, sample_of(batch))
