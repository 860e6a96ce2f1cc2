"""Documents scored as several windows: the curvature is that of their losses as scored, a mean over documents."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from pipeline.choices import CausalLMTask
from pipeline.curvatures import BUILTIN
from pipeline.curvatures.base import Parameters, Sample
from pipeline.curvatures.divergence import Divergence
from pipeline.curvatures.fisher import with_drawn_labels
from pipeline.curvatures.gauss_newton import product
from pipeline.curvatures.kernel import Kernel
from pipeline.curvatures.rows import Rows, of_examples
from pipeline.extensions import load_task
from pipeline.importing import construct
from pipeline.producers.base import Setting
from pipeline.producers.damping import _slope, single_examples
from pipeline.producers.stepping import Stepper
from tests.contract.test_natural import keep_all

pytestmark = pytest.mark.slow

WORDS, WIDTH, DOUBLE, CPU = 5, 3, torch.float64, torch.device("cpu")
LENGTHS = (2, 3, 4, 7, 9, 23, 40)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])
every_window = pytest.mark.parametrize("window", [3, 5, 16])
FACTORED = sorted(set(BUILTIN) - {"gauss_newton"})


class Reader(nn.Module):
    """Predicts a word from the mean of those before it: [B, T] -> [B, T, V]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, WIDTH, dtype=DOUBLE)
        self.head = nn.Linear(WIDTH, WORDS, dtype=DOUBLE)

    def forward(self, input_ids):
        count_T = torch.arange(1, input_ids.shape[1] + 1, dtype=DOUBLE)[:, None]
        return self.head(torch.tanh(self.table(input_ids).cumsum(dim=1) / count_T))


def texts(lengths=LENGTHS):
    generator = np.random.default_rng(0)
    found = np.empty(len(lengths), object)
    for i, length in enumerate(lengths):
        found[i] = generator.integers(0, WORDS, length).tolist()
    return found


def documents(window, reduction="mean", batch_tokens=24, lengths=LENGTHS):
    """A task, its items, and these in batches as stage tune makes them."""
    task = load_task(CausalLMTask(tokens="ids", max_tokens=window, overlong="windows", reduction=reduction))
    inputs = task.encode({"tokens": texts(lengths)})
    ids = np.array([f"text-{i}" for i in range(len(lengths))], object)
    batches = [
        Rows.of_items(
            {name: torch.from_numpy(array) for name, array in batch.arrays.items()}, inputs, ids, batch.item_B
        )
        for batch in inputs.batches(1, batch_tokens)
    ]
    return task, inputs, batches


def scored(task, inputs, model, tensors=None):
    """Losses [N] of documents as they are scored, as a function of parameters."""
    whole = {name: torch.from_numpy(array) for name, array in inputs.whole().items()}
    called = model if tensors is None else lambda **given: functional_call(model, tensors, kwargs=given)
    loss_S = task.loss_B(called, whole)
    return torch.stack([_as_example(inputs, loss_S, n) for n in range(inputs.example_S.max() + 1)])


def _as_example(inputs, loss_S, n):
    """By tokens: written out, not by `weight_S`."""
    own = torch.from_numpy(np.flatnonzero(inputs.example_S == n))
    tokens = torch.from_numpy(inputs.tokens_S)[own]
    return (loss_S[own] * tokens).sum() / tokens.sum() if inputs.per_token else loss_S[own].sum()


def matrix(task, inputs, model):
    """The Gauss-Newton matrix of the mean of documents' losses, from the Jacobian of all their logits and its Hessian there."""
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    whole = {name: torch.from_numpy(array) for name, array in inputs.whole().items()}

    def mean_loss(logits):
        loss_S = task.loss_B(lambda **_: logits, whole)
        documents = inputs.example_S.max() + 1
        return torch.stack([_as_example(inputs, loss_S, n) for n in range(documents)]).mean()

    def logits(given):
        return functional_call(model, given, kwargs={"input_ids": whole["input_ids"]})

    jacobian = torch.cat([part.flatten(0, 2).flatten(1) for part in jacrev(logits)(tensors).values()], dim=1)
    at = logits(tensors)
    bend = torch.autograd.functional.hessian(mean_loss, at).reshape(at.numel(), at.numel())
    return jacobian.T @ bend @ jacobian


@pytest.fixture(autouse=True)
def _seen_as_causal(monkeypatch):
    monkeypatch.setattr("pipeline.tasks.language.require_causal", lambda model, inputs: None)  # which asks a module


@every_reduction
@every_window
def test_the_gauss_newton_matrix_is_that_of_documents_as_scored(window, reduction):
    """Written out from the documents' losses, for texts of one to twenty windows."""
    task, inputs, batches = documents(window, reduction)
    model = Reader()
    parameters = Parameters(model)
    eye = torch.eye(parameters.size, dtype=DOUBLE)
    found = product(model, task, parameters, Sample(batches, len(LENGTHS)), eye)
    torch.testing.assert_close(found, matrix(task, inputs, model), rtol=1e-9, atol=1e-12)


@every_reduction
def test_its_rows_make_the_same_matrix(reduction, monkeypatch):
    """By inner products, where outputs are few; documents are counted, not windows."""
    keep_all(monkeypatch)
    task, inputs, batches = documents(5, reduction)
    model = Reader()
    eye = torch.eye(Parameters(model).size, dtype=DOUBLE)
    kernel = Kernel(model, task, Parameters(model), Sample(batches, len(LENGTHS)))
    assert len(LENGTHS) == kernel.of
    torch.testing.assert_close(kernel.product(eye), matrix(task, inputs, model), rtol=1e-6, atol=1e-9)


@every_reduction
def test_squares_of_gradients_have_its_diagonal_in_the_mean(reduction):
    """Over 400 draws for each of seven documents, within five standard errors."""
    task, inputs, batches = documents(5, reduction, batch_tokens=200)
    model = Reader()
    parameters = Parameters(model)
    found = []
    for seed in range(40):
        sample = Sample(batches * 10, len(LENGTHS) * 10)
        renamed = [rows.some(slice(None)) for rows in sample.batches]
        for number, rows in enumerate(renamed):
            rows.example_B = np.array([f"{number}/{example}" for example in rows.example_B], object)
        tensors = construct("diagonal", BUILTIN, {}, "").fit(
            model, task, parameters, Sample(renamed, sample.rows), seed
        )
        found.append(parameters.flat([tensors[name] for name in parameters.names]))
    found = torch.stack(found)
    error_P = found.std(dim=0) / math.sqrt(len(found))
    off_P = (found.mean(dim=0) - matrix(task, inputs, model).diagonal()).abs()
    assert (off_P <= 5 * error_P + 1e-12).all()


@every_reduction
def test_a_windows_gradient_counts_as_its_share(reduction):
    """Of the labels drawn: sum over windows of the gradients' squares, n / sqrt(N) times as long, over documents."""
    task, inputs, batches = documents(5, reduction)
    model = Reader()
    parameters, sample = Parameters(model), Sample(batches, len(LENGTHS))
    drawn = with_drawn_labels(model, task, sample, 3, CPU)
    expected, seen = 0, 0
    for rows in drawn.batches:
        for i, example in enumerate(rows.example_B):
            own = {name: value[i : i + 1] for name, value in rows.items()}
            tokens, whole = int((own["labels"][:, 1:] >= 0).sum()), LENGTHS[int(example.split("-")[1])] - 1
            share = tokens / math.sqrt(whole) if reduction == "mean" else 1.0
            gradient = parameters.gradient(lambda own=own: task.loss_B(model, own).sum())
            expected, seen = expected + (share * gradient) ** 2, seen + 1
    assert inputs.items == seen > len(LENGTHS)
    for word in ("diagonal", "ekfac"):
        tensors = construct(word, BUILTIN, {}, "").fit(model, task, parameters, sample, 3)
        total = sum(each.sum() for name, each in tensors.items() if not name.endswith("basis"))
        torch.testing.assert_close(total, expected.sum() / len(LENGTHS))  # a rotation keeps the sum of squares


@pytest.mark.parametrize("word", FACTORED)
def test_documents_of_one_window_are_plain_rows_to_the_bit(word):
    """What is fitted on whole documents is what is fitted on a batch that says nothing of them, with the same numbers."""
    task, _, batches = documents(64)
    model = Reader()
    parameters = Parameters(model)
    eye = torch.eye(parameters.size, dtype=DOUBLE)
    plain = [dict(rows) for rows in batches]
    whole, bare = (Sample(each, len(LENGTHS)) for each in (batches, plain))
    assert torch.equal(product(model, task, parameters, whole, eye), product(model, task, parameters, bare, eye))
    for number, rows in enumerate(batches):
        rows.example_B = np.array([f"{number}/{i}" for i in range(len(rows.example_B))], object)
    found, expected = (construct(word, BUILTIN, {}, "").fit(model, task, parameters, each, 3) for each in (whole, bare))
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_the_length_of_windows_matters_as_far_as_the_context_does():
    """A model that does not look back has the same matrix for any window, long document among short ones or not."""

    class Successor(Reader):
        def forward(self, input_ids):
            return self.head(torch.tanh(self.table(input_ids)))

    model = Successor()
    parameters = Parameters(model)
    eye = torch.eye(parameters.size, dtype=DOUBLE)
    found = []
    for window in (2, 3, 7, 64):
        task, _, batches = documents(window)
        found.append(product(model, task, parameters, Sample(batches, len(LENGTHS)), eye))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-9, atol=1e-12)


@every_reduction
def test_the_probe_is_looked_at_as_documents(reduction):
    """Dampings by their gradients, steps by their losses and derivatives, though windows lie in several batches."""
    task, inputs, batches = documents(5, reduction)
    model = Reader()
    parameters = Parameters(model)
    setting = Setting(model, task, batches, Sample(batches, len(LENGTHS)), 0)
    with torch.no_grad():
        losses = dict(zip((f"text-{i}" for i in range(len(LENGTHS))), scored(task, inputs, model), strict=True))
    slopes = {f"text-{i}": parameters.gradient(lambda i=i: scored(task, inputs, model)[i]) for i in range(len(LENGTHS))}
    order = list(dict.fromkeys(example for rows in batches for example in rows.example_B))
    examples = single_examples(setting.probe, 100)
    assert order == [rows[0].example_B[0] for rows in examples]
    for example, rows in zip(order, examples, strict=True):
        torch.testing.assert_close(_slope(setting, parameters, rows), slopes[example])
    loss_S = torch.cat([task.loss_B(model, dict(rows)) for rows in batches])
    torch.testing.assert_close(of_examples(batches, loss_S), torch.stack([losses[each] for each in order]))
    direction_QP = torch.randn(2, parameters.size, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([direction_QP @ slopes[each] for each in order], dim=1)
    torch.testing.assert_close(Stepper(model, task, parameters, setting.probe).derivatives(direction_QP), expected)


def test_a_divergence_is_that_of_documents():
    """To second order half the step along the Gauss-Newton matrix of documents' losses."""
    task, inputs, batches = documents(5)
    model, other = Reader(), Reader()
    step_P = 1e-4 * torch.randn(Parameters(model).size, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, change in Parameters(model).split(step_P).items():
            dict(other.named_parameters())[name].add_(change)
    divergence = Divergence(model, task, batches)
    found = sum(divergence.of(other, number).item() for number in range(len(batches))) / len(batches)
    assert found == pytest.approx(float(step_P @ matrix(task, inputs, model) @ step_P) / 2, rel=1e-2)
