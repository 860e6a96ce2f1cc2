"""Labels that are drawn: each row's by numbers of its own, however rows are cut into batches and whatever else is drawn."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pipeline.choices import CausalLMTask, CustomTask
from pipeline.curvatures.base import Parameters, Sample
from pipeline.curvatures.fisher import LEAST_UNIFORM, RowUniforms, with_drawn_labels
from pipeline.curvatures.rows import Rows
from pipeline.errors import ContractError, NumericsError
from pipeline.extensions import load_task
from pipeline.importing import construct
from pipeline.tasks.classification import Classification
from pipeline.tasks.outputs import drawn_classes, halvings
from tests.contract.test_curvatures import (
    BUILTIN,
    CLASSES,
    DAMPING,
    FITTED,
    SEED,
    TASK,
    batches,
    every_curvature,
    loaded,
    network,
    slopes,
)
from tests.language import VOCABULARY, gpt

pytestmark = pytest.mark.slow
ROWS, CPU = 24, torch.device("cpu")


def rows_of(batch, ids):
    return Rows(batch, np.array(ids, object), np.zeros(len(ids), np.int64), np.ones(len(ids)))


def sample(each, order=None):
    """24 rows under their names, so many in a batch."""
    (batch,) = batches(ROWS)
    whole = rows_of(batch, [f"row {i}" for i in range(ROWS)])
    order_N = (
        torch.arange(ROWS) if order is None else torch.randperm(ROWS, generator=torch.Generator().manual_seed(order))
    )
    return Sample([whole.some(index) for index in order_N.split(each)], ROWS)


def solved(word, of, model=None, seed=SEED):
    model = model or network()
    tensors = construct(word, BUILTIN, {}, "").fit(model, TASK, Parameters(model), of, seed)
    return loaded(word, model, tensors).solve(slopes(model), [DAMPING])[0]


@every_curvature
def test_batches_and_their_order_do_not_show(word):
    """One of all rows, some of five, one of each; in another order: the same solution, to rounding."""
    expected = solved(word, sample(ROWS))
    for each, order in ((5, None), (1, None), (7, 1), (ROWS, 2)):
        torch.testing.assert_close(solved(word, sample(each, order)), expected, rtol=1e-7, atol=1e-7)


def _work(rank, workers, folder):
    """What one of several workers does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    whole = sample(5, order=1)
    mine = Sample(whole.batches[rank::workers], ROWS, range(5)[rank::workers])
    torch.save({word: solved(word, mine) for word in FITTED}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_nor_do_workers(tmp_path):
    """Two with five batches, against one with one."""
    torch.multiprocessing.spawn(_work, (2, tmp_path), 2)
    for rank in range(2):
        for word, found in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(found, solved(word, sample(ROWS)), rtol=1e-7, atol=1e-7)


def test_rows_of_one_content_are_drawn_by_their_ids():
    """2,000 copies of a row get each class as often as the model predicts it, within 4 standard errors; equal ids the same."""
    model, copies = network(), 2000
    (batch,) = batches(1)
    wide = {name: value.expand(copies, *value.shape[1:]) for name, value in batch.items()}
    drawn = [
        with_drawn_labels(model, TASK, Sample([rows_of(wide, ids)], copies), SEED, CPU).batches
        for ids in ([f"copy {i}" for i in range(copies)], ["one"] * copies)
    ]
    with torch.no_grad():
        chance_C = (model(batch["features"])[0] / 2.0).softmax(dim=0)
    assert 8 == len(drawn[0])
    for rows in drawn[0]:
        share_C = torch.bincount(rows["label"], minlength=CLASSES) / copies
        assert ((share_C - chance_C).abs() < 4 * (chance_C * (1 - chance_C) / copies).sqrt()).all()
    assert not torch.equal(drawn[0][0]["label"], drawn[0][1]["label"])
    assert all(1 == len(rows["label"].unique()) for rows in drawn[1])


def test_padding_does_not_show():
    """A text alone, and beside one three times as long, has the same labels drawn; another window of it has others."""
    task, model = load_task(CausalLMTask(tokens="ids")), gpt(layers=1)
    ids = torch.randint(2, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    ids[1, 10:], labels[1, 10:] = 0, -100
    both = rows_of({"input_ids": ids, "labels": labels}, ["long", "short"])
    alone = rows_of({"input_ids": ids[1:, :10], "labels": labels[1:, :10]}, ["short"])
    further = rows_of(dict(alone), ["short"])
    further.window_B = np.array([1])
    found, expected, others = (
        with_drawn_labels(model, task, Sample([each], 2), SEED, CPU).batches[0]["labels"]
        for each in (both, alone, further)
    )
    assert torch.equal(expected[0], found[1, :10])
    assert (found[1, 10:] == -100).all()
    assert not torch.equal(expected, others)


@given(st.integers(0, 2**40), st.text(max_size=8), st.integers(0, 9), st.integers(1, 40), st.integers(0, 40))
def test_numbers_are_a_rows_own(seed, example, window, places, more):
    """In (0, 1), whatever is beside it; the first of a longer row; others at every call, draw, seed, window and example."""

    def numbers(*calls, seed=seed, time=0, own=(example, window), beside=()):
        rows = Rows({}, np.array([own[0], *beside], object), np.array([own[1], *[0] * len(beside)]), np.ones(1))
        uniforms = RowUniforms(rows, seed, time, CPU)
        return [uniforms(*shape)[0] for shape in calls]

    found, again = numbers((places,), (places,))
    assert found.dtype == torch.float64
    assert ((found > 0) & (found < 1)).all()
    assert torch.equal(found, numbers((places + more,), beside=("other", "third"))[0][:places])
    assert torch.equal(found, numbers((places, 1))[0][:, 0])
    others = [again, *numbers((places,), time=1), *numbers((places,), seed=seed + 1)]
    others += [*numbers((places,), own=(example, window + 1)), *numbers((places,), own=(example + "x", window))]
    assert all(float(found[0]) != float(other[0]) for other in others)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_class_without_a_chance_is_not_drawn(chances, uniform):
    """Any chances, most of them 0, by any numbers, the least and the largest below 1 among them."""
    chance_C = torch.tensor([0.0, *chances, 0.0], dtype=torch.float64)
    chance_C[1] += 1e-9
    numbers = torch.tensor([uniform, LEAST_UNIFORM, 1 - 2**-53], dtype=torch.float64)
    uniform_ML = torch.cartesian_prod(*[numbers] * halvings(len(chance_C)))
    found_M = drawn_classes(chance_C.expand(len(uniform_ML), -1), uniform_ML.view(len(uniform_ML), -1))
    assert (chance_C[found_M] > 0).all()


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 300])
def test_classes_are_drawn_with_their_chances(classes):
    """Of 100,000 draws each class gets its share within 5 standard errors."""
    generator = torch.Generator().manual_seed(classes)
    chance_C = torch.randn(classes, generator=generator, dtype=torch.float64).exp()
    uniform_ML = torch.rand(100_000, halvings(classes), generator=generator, dtype=torch.float64)
    found_M = drawn_classes(chance_C.expand(100_000, -1), uniform_ML)
    share_C, wanted_C = torch.bincount(found_M, minlength=classes) / 100_000, chance_C / chance_C.sum()
    assert ((share_C - wanted_C).abs() <= 5 * (wanted_C * (1 - wanted_C) / 100_000).sqrt()).all()


def test_what_rounding_moves_is_drawn_as_before_nearly_always():
    """Chances of 1,000 classes that differ by 1 % each: fewer than 2 % of draws are others."""
    generator = torch.Generator().manual_seed(0)
    chance_MC = torch.randn(5000, 1000, generator=generator).exp()
    moved_MC = chance_MC * (1 + 0.01 * torch.randn(5000, 1000, generator=generator))
    uniform_ML = torch.rand(5000, halvings(1000), generator=generator, dtype=torch.float64)
    others = drawn_classes(chance_MC, uniform_ML) != drawn_classes(moved_MC, uniform_ML)
    assert others.double().mean() < 0.02


def test_chances_that_are_not_finite_are_an_error():
    """Of a model that returns NaN, before any label is made of them."""
    with pytest.raises(NumericsError, match="predictions on rows of the corpus are not finite"):
        drawn_classes(torch.full((2, 3), float("nan")), torch.full((2, 2), 0.5))


class Distance(Classification):
    """Half the squared distance of logits from what is wanted: minus the logarithm of a normal density."""

    def loss_B(self, model, batch):
        return 0.5 * ((model(batch["features"]) - batch["label"]) ** 2).sum(dim=1)

    def sampled(self, model, batch, uniforms):
        with torch.no_grad():
            logits_BC = model(batch["features"])
        return {**batch, "label": logits_BC + torch.special.ndtri(uniforms(logits_BC.shape[1]))}


def test_noise_of_ones_own_task_is_normal_and_finite():
    """By the normal's quantiles: mean 0 and deviation 1 within 4 standard errors, for one row of 2,000 and the next."""
    model = network()
    (batch,) = batches(2000)
    of = rows_of({**batch, "label": torch.zeros(2000, CLASSES)}, [str(i) for i in range(2000)])
    (drawn, *_) = with_drawn_labels(
        model, Distance("features", "label", [2, 6, 6]), Sample([of], 2000), SEED, CPU
    ).batches
    with torch.no_grad():
        noise_BC = drawn["label"] - model(batch["features"])
    assert noise_BC.isfinite().all()
    assert noise_BC.mean().abs() < 4 / noise_BC.numel() ** 0.5
    assert (noise_BC.std() - 1).abs() < 4 / (2 * noise_BC.numel()) ** 0.5


class Squared(Distance):
    """Gives the number of rows to what knows it."""

    def sampled(self, model, batch, uniforms):
        return {**batch, "label": uniforms(len(batch["label"]), CLASSES)}


class Forgetful(Distance):
    """Hands on nothing but labels."""

    def sampled(self, model, batch, uniforms):
        return {"label": batch["label"]}


@pytest.mark.parametrize(
    ("kind", "what"),
    [(Squared, r"'label' of shape \[5, 5, 3\], expected \[5, 3\]"), (Forgetful, "'features' of shape none")],
)
def test_what_is_drawn_has_the_batchs_columns(kind, what):
    """Another shape, and a column that is left out, are named."""
    (batch,) = batches(5)
    of = Sample([{**batch, "label": torch.zeros(5, CLASSES)}], 5)
    with pytest.raises(ContractError, match=f"{kind.__name__}.sampled: got column {what}"):
        with_drawn_labels(network(), kind("features", "label", [2, 6, 6]), of, SEED, CPU)


class Former(Classification):
    """Draws as tasks did."""

    def __init__(self):
        super().__init__("features", "label", [4])

    def sampled(self, model, batch, generator):
        return batch


class Short(Former):
    """Takes too little."""

    def sampled(self, model, batch):
        return batch


@pytest.mark.parametrize("name", ["Former", "Short"])
def test_a_task_that_draws_by_other_means_is_refused(name):
    """When it is loaded: the message has both ways to call it."""
    with pytest.raises(
        ContractError, match=r"got sampled\(model, batch.*\), expected sampled\(model, batch, uniforms\)"
    ):
        load_task(CustomTask(name=f"tests.contract.test_draws:{name}"))
