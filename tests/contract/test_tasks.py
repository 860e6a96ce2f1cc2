"""Every task: a loss is its example's own, in float32 or better, and NaN where an example has none."""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline import tasks
from pipeline.choices import CausalLMTask, ClassificationTask, Seq2SeqTask
from pipeline.curvatures.fisher import RowUniforms
from pipeline.curvatures.rows import as_rows
from pipeline.errors import ContractError, SpecError
from pipeline.extensions import load_task
from pipeline.tasks.classification import FEW_CLASSES, cross_entropy
from pipeline.tasks.tokens import IGNORED
from tests.language import VOCABULARY, gpt, saved, t5
from tests.unit.test_spec import parse

CLASSES = 3


@dataclass(frozen=True)
class Case:
    """How to put a task under contract.

    Args:
        section: Makes its section of the spec.
        model: Makes a model that the task can ask, in eval mode.
        batch: Makes a batch of so many examples.
        spoil: A batch whose row has no loss.
    """

    section: Callable
    model: Callable
    batch: Callable
    spoil: Callable


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, CLASSES)).eval()


def labelled(rows):
    generator = torch.Generator().manual_seed(rows)
    return {
        "features": torch.randn((rows, 2, 2, 2), generator=generator),
        "label": torch.randint(0, CLASSES, (rows,), generator=generator),
    }


def with_label(batch, row, label):
    label_B = batch["label"].clone()
    label_B[row] = label
    return {**batch, "label": label_B}


@functools.cache
def text_folder():
    """A tokenizer and a config that tests of this module share."""
    return saved(gpt(), Path(tempfile.mkdtemp()))


def sequences(rows, *names):
    """Token ids of one length, as inputs and labels."""
    generator = torch.Generator().manual_seed(rows)
    return {name: torch.randint(2, VOCABULARY, (rows, 9), generator=generator) for name in names}


def without_labels(batch, row):
    label_BT = batch["labels"].clone()
    label_BT[row] = IGNORED
    return {**batch, "labels": label_BT}


CASES = {
    "classification": Case(
        lambda: ClassificationTask(shape=[2, 2, 2]),
        classifier,
        labelled,
        lambda batch, row: with_label(batch, row, CLASSES),
    ),
    "causal_lm": Case(
        lambda: CausalLMTask(tokens="ids"),
        gpt,
        lambda rows: sequences(rows, "input_ids", "labels"),
        without_labels,
    ),
    "seq2seq": Case(
        lambda: Seq2SeqTask(tokenizer_uri=text_folder()),
        t5,
        lambda rows: {
            **sequences(rows, "input_ids", "labels"),
            "attention_mask": torch.ones((rows, 9), dtype=torch.long),
        },
        without_labels,
    ),
}
"""Task -> how to make everything it needs."""
every_task = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def losses(case, batch, model=None):
    with torch.no_grad():
        return load_task(case.section()).loss_B(model or case.model(), batch)


def uniforms(batch):
    return RowUniforms(as_rows(batch), 1, 0, torch.device("cpu"))


def test_every_task_is_under_contract():
    """A new word in the table gets its row here."""
    assert set(tasks.BUILTIN) == set(CASES)


@every_task
def test_there_is_one_loss_per_example(case):
    """[B] losses in float32 or better, not negative, for any number of examples."""
    for rows in (1, 2, 33):
        loss_B = losses(case, case.batch(rows))
        assert (rows,) == loss_B.shape
        assert loss_B.dtype in (torch.float32, torch.float64)
        assert (loss_B >= 0).all()


@pytest.mark.slow
@every_task
def test_a_loss_is_that_of_its_example_alone(case):
    """In a batch of one an example has the loss it has among others."""
    batch = case.batch(33)
    alone = [losses(case, {name: value[i : i + 1] for name, value in batch.items()}).item() for i in range(33)]
    assert alone == pytest.approx(losses(case, batch).tolist(), abs=1e-5)


@every_task
def test_labels_are_drawn_where_they_count_and_nowhere_else(case):
    """By the numbers alone; what the model is given stays, and the losses are those of the labels drawn."""
    task, model, batch = load_task(case.section()), case.model(), case.spoil(case.batch(20), 3)
    drawn, again = (task.sampled(model, batch, uniforms=uniforms(batch)) for _ in range(2))
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    label = "label" if "label" in batch else "labels"
    assert all(torch.equal(drawn[name], value) for name, value in batch.items() if name != label)
    counted = batch[label] != IGNORED
    assert torch.equal(counted, drawn[label] != IGNORED)
    assert (drawn[label] != batch[label]).any()
    moved_B = losses(case, drawn, model) != losses(case, batch, model)
    assert moved_B[[0, 1, 2, *range(4, 20)]].sum() > 5


@every_task
def test_labels_are_drawn_as_the_model_predicts(case):
    """The mean loss of what is drawn for 1,000 copies of a row is the entropy of what is predicted, within 3 %."""
    task, model, batch = load_task(case.section()), case.model(), case.batch(1)
    copies = {name: value.expand(1000, *value.shape[1:]) for name, value in batch.items()}
    drawn = task.sampled(model, copies, uniforms=uniforms(copies))
    label, labels = ("label", CLASSES) if "label" in batch else ("labels", VOCABULARY)
    each = {name: value[:1].expand(labels, *value.shape[1:]) for name, value in drawn.items()}
    each[label] = torch.arange(labels).reshape(-1, *[1] * (each[label].ndim - 1)).expand(each[label].shape)
    with torch.no_grad():
        loss_L = getattr(task, "token_losses_BT", task.loss_B)(model, each)
    entropy = (loss_L.neg().exp() * loss_L).sum(dim=0).mean()
    assert entropy.item() == pytest.approx(losses(case, drawn, model).mean().item(), rel=0.03)


@every_task
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_a_half_precision_model_are_float32(case, dtype):
    """The loss itself is computed in float32 or better, near the float32 model's: 2 %."""
    batch = case.batch(16)
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    loss_B = losses(case, half, case.model().to(dtype))
    assert loss_B.dtype in (torch.float32, torch.float64)
    assert losses(case, batch).tolist() == pytest.approx(loss_B.tolist(), rel=0.02, abs=0.1)


@every_task
def test_losses_of_a_double_model_are_float64(case):
    """Nothing is rounded on the way out."""
    double = {name: value.double() if value.is_floating_point() else value for name, value in case.batch(4).items()}
    assert torch.float64 == losses(case, double, case.model().double()).dtype


@every_task
def test_an_example_without_a_loss_is_nan_and_leaves_its_neighbours_alone(case):
    """NaN rejects the row; all other losses are the same to the bit."""
    batch = case.batch(5)
    expected = losses(case, batch)
    spoiled = losses(case, case.spoil(batch, 2))
    assert [False, False, True, False, False] == spoiled.isnan().tolist()
    assert torch.equal(expected[[0, 1, 3, 4]], spoiled[[0, 1, 3, 4]])


@every_task
def test_a_batch_is_not_changed(case):
    """The engine hands the same tensors to the next model."""
    batch = case.batch(4)
    before = {name: value.clone() for name, value in batch.items()}
    losses(case, batch)
    assert all(torch.equal(before[name], batch[name]) for name in before)


@every_task
def test_a_loss_has_a_gradient_in_every_parameter(case):
    """Producers climb or descend it."""
    model = case.model()
    load_task(case.section()).loss_B(model, case.batch(4)).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@every_task
def test_a_task_names_the_columns_its_batch_has(case):
    """What it asks to be read is what it is handed; but for texts, which become sequences first."""
    if hasattr(load_task(case.section()), "encode"):
        return
    columns = load_task(case.section()).columns()
    batch = case.batch(2)
    assert set(batch) == {column.name for column in columns}
    assert [tuple(batch[column.name].shape[1:]) for column in columns] == [column.shape for column in columns]


@pytest.mark.parametrize("classes", [2, FEW_CLASSES, FEW_CLASSES + 1])
def test_few_classes_have_the_losses_and_gradients_of_many(classes):
    """Either way of computing it is as near to float64 as torch's, from certain to hopeless, and so is its gradient."""
    generator = torch.Generator().manual_seed(classes)
    scale_B = torch.logspace(-3, 2, 1000)[:, None]
    logits_BC = (scale_B * torch.randn(1000, classes, generator=generator)).requires_grad_()
    label_B = torch.randint(classes, (1000,), generator=generator)
    exact_BC = logits_BC.detach().double().requires_grad_()
    found, torchs, exact = (
        (loss_B.detach().double(), torch.autograd.grad(loss_B.sum(), at)[0].double())
        for loss_B, at in (
            (cross_entropy(logits_BC, label_B), logits_BC),
            (F.cross_entropy(logits_BC, label_B, reduction="none"), logits_BC),
            (F.cross_entropy(exact_BC, label_B, reduction="none"), exact_BC),
        )
    )
    for ours, theirs, true in zip(found, torchs, exact, strict=True):
        assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max()


def test_classification_is_the_cross_entropy_of_its_label():
    """-log softmax of the label's logit, in nats."""
    case, batch = CASES["classification"], labelled(7)
    with torch.no_grad():
        logits_BC = case.model()(batch["features"])
    expected = -torch.log_softmax(logits_BC, dim=1)[torch.arange(7), batch["label"]]
    assert expected.tolist() == pytest.approx(losses(case, batch).tolist(), abs=1e-6)


@pytest.mark.parametrize("label", [-1, CLASSES, -100, 2**40])
def test_a_label_outside_the_models_classes_has_no_loss(label):
    """Below zero, at the number of classes and above, torch's ignore index: NaN, where others keep their loss."""
    case, batch = CASES["classification"], labelled(3)
    spoiled = losses(case, with_label(batch, 1, label))
    assert [False, True, False] == spoiled.isnan().tolist()


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.5, -1.0], []), ([], [2.0, 0.5]), ([0.5, -1.0], [2.0, 0.5]), ([0.25], [4.0])],
    ids=["mean", "std", "both", "one for all channels"],
)
def test_normalisation_equals_doing_it_by_hand(mean, std):
    """(features - mean) / std per channel, before the model."""
    case, batch = CASES["classification"], labelled(6)
    normal = load_task(ClassificationTask(shape=[2, 2, 2], mean=mean, std=std))
    by_hand = batch["features"] - torch.tensor(mean or [0.0]).view(-1, 1, 1)
    by_hand = by_hand / torch.tensor(std or [1.0]).view(-1, 1, 1)
    with torch.no_grad():
        got = normal.loss_B(case.model(), batch)
    assert torch.equal(losses(case, {**batch, "features": by_hand}), got)


def test_normalisation_of_flat_features_is_per_feature():
    """An input of one axis has a mean and a deviation for each of its numbers."""
    features = torch.randn((4, 3), generator=torch.Generator().manual_seed(0))
    batch = {"features": features, "label": torch.tensor([0, 1, 2, 0])}
    task = load_task(ClassificationTask(shape=[3], mean=[1.0, 2.0, 3.0], std=[1.0, 2.0, 4.0]))
    by_hand = (features - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([1.0, 2.0, 4.0])
    expected = F.cross_entropy(by_hand, batch["label"], reduction="none")
    assert expected.tolist() == pytest.approx(task.loss_B(nn.Identity(), batch).tolist(), abs=1e-6)


class Shaped(nn.Module):
    """Returns logits of one shape, whatever comes in."""

    def __init__(self, *shape):
        super().__init__()
        self._shape = shape

    def forward(self, x):
        return torch.zeros(self._shape)


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3), (3, 2), ()])
def test_logits_of_another_shape_are_a_contract_error(shape):
    """The message shows what the model returned and what was expected."""
    with pytest.raises(ContractError, match=r"logits of shape \[.*\], expected \[4, classes\]") as caught:
        losses(CASES["classification"], labelled(4), Shaped(*shape))
    assert str(list(shape)) in caught.value.message


class Returning(nn.Module):
    """Returns logits as a part of something else."""

    def __init__(self, make):
        super().__init__()
        self._make = make

    def forward(self, x):
        return self._make(torch.arange(12.0).view(4, 3))


def with_logits(logits):
    """An output as transformers' models return it."""
    from transformers.modeling_outputs import ImageClassifierOutput

    return ImageClassifierOutput(logits=logits)


@pytest.mark.parametrize(
    "make",
    [with_logits, lambda logits: {"logits": logits, "hidden": logits[:, :1]}, lambda x: SimpleNamespace(logits=x)],
    ids=["transformers", "dict", "attribute"],
)
def test_logits_are_taken_out_of_an_output_that_has_them_by_name(make):
    """The losses are those of the logits alone."""
    case = CASES["classification"]
    expected = losses(case, labelled(4), Returning(lambda logits: logits))
    assert torch.equal(expected, losses(case, labelled(4), Returning(make)))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda x: (x, x), "tuple of Tensor, Tensor"),
        (lambda x: {"scores": x}, "dict with the keys 'scores'"),
        (lambda x: x.numpy(), "ndarray"),
        (lambda x: SimpleNamespace(logits=None), "SimpleNamespace"),
    ],
)
def test_an_output_without_logits_is_a_contract_error(make, what):
    """The message says what came, the hint how to give logits."""
    with pytest.raises(ContractError, match=f"Returning returned {what}, expected a tensor of logits") as caught:
        losses(CASES["classification"], labelled(4), Returning(make))
    assert "model.factory" in caught.value.hint


def test_one_logit_is_no_classifier():
    """The message says what a classifier returns, the hint what to make of one logit."""
    with pytest.raises(ContractError, match=r"shape \[4, 1\], expected \[4, classes\] of 2 classes or more") as caught:
        losses(CASES["classification"], labelled(4), Shaped(4, 1))
    assert "a logit for each class" in caught.value.hint


def test_columns_to_be_stacked_must_fill_the_shape():
    """Three columns make no input of four numbers: the spec is wrong, and says so before any row is read."""
    with pytest.raises(SpecError, match="features"):
        load_task(parse(task={"features": ["a", "b", "c"], "shape": [4]}).task)


def test_a_mean_must_fit_the_channels():
    """Two means for three channels: the spec is wrong, and says so before any model runs."""
    with pytest.raises(SpecError, match="mean"):
        load_task(parse(task={"shape": [3, 8, 8], "mean": [0.5, 0.5]}).task)
