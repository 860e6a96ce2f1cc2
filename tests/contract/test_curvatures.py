"""Every curvature that is fitted: equal to the matrix it stands for, whoever measures it, and solved as that matrix is."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch.func import functional_call, grad, vmap

from pipeline.choices import CausalLMTask
from pipeline.curvatures import BUILTIN
from pipeline.curvatures.base import Parameters, Sample
from pipeline.curvatures.fisher import _warn_of_true_labels, with_drawn_labels
from pipeline.curvatures.gauss_newton import product
from pipeline.curvatures.gfim import schulz_inverse
from pipeline.errors import NumericsError
from pipeline.extensions import load_task
from pipeline.importing import construct
from pipeline.tasks.classification import Classification

pytestmark = pytest.mark.slow

CLASSES, TEMPERATURE, SEED, DAMPING = 3, 2.0, 7, 0.01
FITTED = sorted(set(BUILTIN) - {"gauss_newton"})
every_curvature = pytest.mark.parametrize("word", FITTED)
DOUBLE = torch.float64


class Twice(nn.Module):
    """One layer called two times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def network():
    """Convolutions of all sorts, norms, linear layers; [B, 2, 6, 6] -> [B, 3]."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same"), nn.ReLU(inplace=True), nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False, padding_mode="reflect"), nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=2, dilation=2), nn.Flatten(), nn.LayerNorm(4), Twice(), nn.Linear(4, CLASSES),
    )  # fmt: skip
    return layers.to(DOUBLE).eval()


def task(*shape):
    return Classification("features", "label", shape, temperature=TEMPERATURE)


TASK = task(2, 6, 6)


def batches(*sizes, shape=(2, 6, 6), dtype=DOUBLE):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "features": torch.randn((size, *shape), generator=generator, dtype=dtype),
            "label": torch.randint(0, CLASSES, (size,), generator=generator),
        }
        for size in sizes
    ]


def sample(*sizes, **keywords):
    return Sample(batches(*sizes, **keywords), sum(sizes))


SAMPLE = sample(7, 5, 4)


def curvature(word, **options):
    return construct(word, BUILTIN, options, "producer.curvature")


def fitted(word, model, of=SAMPLE, by=TASK, seed=SEED):
    return curvature(word).fit(model, by, Parameters(model), of, seed)


def loaded(word, model, tensors):
    found = curvature(word)
    found.load(model, TASK, Parameters(model), SAMPLE, tensors)
    return found


def slopes(model, rows=2):
    return torch.randn((rows, Parameters(model).size), generator=torch.Generator().manual_seed(2), dtype=DOUBLE)


def per_example(model, of=SAMPLE, by=TASK):
    """Name -> gradients [N, *shape] of the losses of labels drawn, by torch.func."""
    drawn = with_drawn_labels(model, by, of, SEED, torch.device("cpu"))
    features, labels = (torch.cat([batch[name] for batch in drawn.batches]) for name in ("features", "label"))

    def loss(tensors, x, y):
        return F.cross_entropy(functional_call(model, tensors, (x[None],)) / TEMPERATURE, y[None])

    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0, 0))(tensors, features, labels)


def test_the_diagonal_is_the_mean_of_squared_gradients():
    """Of every parameter of every kind, to rounding."""
    model = network()
    squares = {name: (each**2).mean(dim=0) for name, each in per_example(model).items()}
    found = fitted("diagonal", model)
    assert set(squares) == set(found)
    for name, square in squares.items():
        torch.testing.assert_close(found[name], square)


def test_gfim_is_the_mean_of_gradients_times_themselves_over_their_columns():
    """E[g g'] / r of matrices and kernels, and its damped inverse that of torch.linalg."""
    model = network()
    found, slope_QP = fitted("gfim", model), slopes(model)
    solved = Parameters(model).split(loaded("gfim", model, found).solve(slope_QP, [1.0, DAMPING])[1])
    for name, each in per_example(model).items():
        slope = Parameters(model).split(slope_QP)[name]
        if each.ndim > 2:
            wide = each.flatten(2)
            matrix = torch.einsum("ndr,ner->de", wide, wide) / len(wide) / wide.shape[2]
            torch.testing.assert_close(found[name], matrix)
            inverse = torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix), dtype=DOUBLE))
            wanted = (inverse @ slope.flatten(2)).view_as(slope)
        else:
            wanted = slope / ((each**2).mean(dim=0) + DAMPING)
        torch.testing.assert_close(solved[name], wanted)


def test_ekfac_is_the_damped_inverse_in_a_kronecker_basis():
    """Of a convolution, a layer called twice, and a linear one: dense Q diag(E[(Q' g)^2]) Q', weight and bias together."""
    model = network()
    found, slope_QP, rows = fitted("ekfac", model), slopes(model), per_example(model)
    solved = Parameters(model).split(loaded("ekfac", model, found).solve(slope_QP, [DAMPING])[0])
    slope = Parameters(model).split(slope_QP)
    for layer in ("0", "8.layer", "9"):

        def joined(tensors, layer=layer):
            return torch.cat([tensors[f"{layer}.weight"].flatten(2), tensors[f"{layer}.bias"][..., None]], 2).flatten(1)

        basis = torch.kron(found[f"{layer}.weight/output_basis"], found[f"{layer}.weight/input_basis"])
        values = ((joined(rows) @ basis) ** 2).mean(dim=0)
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=DOUBLE))
        torch.testing.assert_close(joined(solved), joined(slope) @ basis @ torch.diag(1 / (values + DAMPING)) @ basis.T)
    others = {name for name in rows if name.split(".")[0] in "257"}
    assert others == {name.removesuffix("/diagonal") for name in found if name.endswith("/diagonal")}
    for name in others:
        torch.testing.assert_close(solved[name], slope[name] / ((rows[name] ** 2).mean(dim=0) + DAMPING))


def test_ekfacs_bases_are_eigenvectors_of_the_covariances():
    """Of inputs (with a 1 for the bias) and of output gradients, at the last layer of an MLP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).to(DOUBLE).eval()
    of = sample(9, 8, shape=(4,))
    found, rows = fitted("ekfac", model, of, task(4)), per_example(model, of, task(4))
    inputs = model[1](model[0](torch.cat([batch["features"] for batch in of.batches])))
    inputs, slope = (
        torch.cat([inputs, torch.ones(17, 1)], 1),
        rows["2.bias"],
    )  # each row is drawn as often as the others
    for vectors, of_what in ((found["2.weight/input_basis"], inputs), (found["2.weight/output_basis"], slope)):
        turned = vectors.T @ of_what.T.detach() @ of_what.detach() @ vectors
        torch.testing.assert_close(turned, torch.diag(turned.diagonal()))


def test_ekfac_is_exact_where_the_matrix_falls_apart():
    """Inputs at right angles, two classes: the solve is that with the whole Fisher matrix."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False).to(DOUBLE)
    features = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=DOUBLE))
    of = Sample([{"features": features, "label": torch.tensor([0, 1, 0, 1])}], 4)
    rows = per_example(model, of, task(4))["weight"].flatten(1)
    matrix, slope_QP = rows.T @ rows / len(rows) + DAMPING * torch.eye(8, dtype=DOUBLE), slopes(model)
    found = loaded("ekfac", model, fitted("ekfac", model, of, task(4))).solve(slope_QP, [DAMPING])[0]
    torch.testing.assert_close(found, torch.linalg.solve(matrix, slope_QP.T).T)


def trace(model, by, of):
    """Of the Gauss-Newton matrix."""
    parameters = Parameters(model)
    return product(model, by, parameters, of, torch.eye(parameters.size, dtype=DOUBLE)).trace()


def test_the_fisher_matrix_has_the_gauss_newton_matrixs_units():
    """Two classes, equally likely at any temperature: whatever is drawn, the diagonals are equal."""
    model = nn.Linear(4, 2).to(DOUBLE)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    of = Sample([{**batch, "label": batch["label"] % 2} for batch in batches(30, 11, shape=(4,))], 41)
    parameters = Parameters(model)
    diagonal_P = parameters.flat(list(fitted("diagonal", model, of, task(4)).values()))
    matrix_PP = product(model, task(4), parameters, of, torch.eye(10, dtype=DOUBLE))
    torch.testing.assert_close(diagonal_P, matrix_PP.diagonal())


class Words(nn.Module):
    """A word's successor from the word alone: [B, T] -> [B, T, V]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 5, dtype=DOUBLE)

    def forward(self, input_ids):
        return self.table(input_ids)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mean_over_tokens_has_the_gauss_newton_matrixs_units_too(reduction):
    """Texts of 2 to 9 tokens: the traces agree within 5 %, the noise of 4,000 draws."""
    lm, model = load_task(CausalLMTask(tokens="ids", reduction=reduction)), Words()
    generator = torch.Generator().manual_seed(0)
    of = []
    for length in range(2, 10):
        ids = torch.randint(0, 5, (100, length), generator=generator)
        of.append({"input_ids": ids, "labels": ids})
    of = Sample(of, 800)
    diagonal = fitted("diagonal", model, of, lm)["table.weight"]
    assert trace(model, lm, of).item() == pytest.approx(diagonal.sum().item(), rel=0.05)


@every_curvature
def test_what_is_saved_solves_as_what_was_fitted(word):
    """To the bit after safetensors, for all dampings in one call or each in one of its own."""
    model = network()
    tensors = fitted(word, model)
    found = loaded(word, model, tensors).solve(slopes(model), [1.0, DAMPING])
    again = loaded(word, model, load(save({name: each.contiguous() for name, each in tensors.items()})))
    assert all(
        torch.equal(each, again.solve(slopes(model), [d])[0]) for each, d in zip(found, [1.0, DAMPING], strict=True)
    )


@every_curvature
def test_a_seed_says_what_is_drawn(word):
    """The same tensors for the same seed, in whatever order batches come; others for another; the base as it was."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    first = fitted(word, model)
    turned = Sample(SAMPLE.batches[::-1], SAMPLE.rows, [2, 1, 0])
    for found in (fitted(word, model), fitted(word, model, turned)):
        for name, each in first.items():
            torch.testing.assert_close(found[name].abs(), each.abs(), rtol=1e-6, atol=1e-8)
    assert any(not torch.allclose(each, first[name]) for name, each in fitted(word, model, seed=8).items())
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def _work(rank, workers, folder):
    """What one of several workers does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    mine = Sample(SAMPLE.batches[rank::workers], SAMPLE.rows, range(3)[rank::workers])
    model = network()
    found = {word: loaded(word, model, fitted(word, model, mine)).solve(slopes(model), [DAMPING])[0] for word in FITTED}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_workers_together_find_what_one_finds(tmp_path):
    """Two processes with two batches and one, against one with all three."""
    torch.multiprocessing.spawn(_work, (2, tmp_path), 2)
    model = network()
    for rank in range(2):
        for word, found in torch.load(tmp_path / f"{rank}.pt").items():
            alone = loaded(word, model, fitted(word, model)).solve(slopes(model), [DAMPING])[0]
            torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-7)


class NoDraws:
    """A task of two methods."""

    per_token = False

    def columns(self):
        return TASK.columns()

    def loss_B(self, model, batch):
        return TASK.loss_B(model, batch)


def test_a_task_that_cannot_draw_gets_the_empirical_fisher(capsys):
    """Squares of gradients for the labels as they are, and one warning."""
    _warn_of_true_labels.cache_clear()
    model = network()
    found = fitted("diagonal", model, by=NoDraws())
    fitted("gfim", model, by=NoDraws())
    parameters = Parameters(model)
    rows = [
        {name: value[i : i + 1] for name, value in b.items()} for b in SAMPLE.batches for i in range(len(b["label"]))
    ]
    gradients = [parameters.gradient(lambda row=row: TASK.loss_B(model, row).sum()) for row in rows]
    torch.testing.assert_close(parameters.flat(list(found.values())), (torch.stack(gradients) ** 2).mean(dim=0))
    assert 1 == capsys.readouterr().err.count("NoDraws has no method `sampled`")


def by_share(word, model, tensors, share, of_model):
    found = curvature(word, by_share=True)
    found.load(model, TASK, Parameters(model), SAMPLE, tensors)
    return Parameters(model).split(found.solve(of_model, [share])[0])


@every_curvature
def test_a_share_is_of_each_parts_own_mean(word):
    """The solution of every layer is the one with that damping in nats, whatever the other layers' is."""
    model = network()
    tensors, slope_QP, share = fitted(word, model), slopes(model), 0.3
    solved = by_share(word, model, tensors, share, slope_QP)
    parts = {
        "diagonal": lambda name: tensors[name],
        "gfim": lambda name: tensors[name].diagonal() if tensors[name].ndim == 2 and name.endswith("weight") else tensors[name],
        "ekfac": lambda name: tensors.get(f"{name}/eigenvalues", tensors.get(f"{name}/diagonal")),
    }[word]  # fmt: skip
    for name in ("0.weight", "2.weight", "9.weight"):
        unit = parts(name).mean().item()
        alone = Parameters(model).split(loaded(word, model, tensors).solve(slope_QP, [share * unit])[0])
        torch.testing.assert_close(solved[name], alone[name])


def test_a_part_without_curvature_is_damped_as_the_others_are():
    """By a share of their mean; where nothing bends there is no natural step."""
    model = network()
    tensors, slope_QP = dict(fitted("diagonal", model)), slopes(model)
    tensors["0.weight"] = torch.zeros_like(tensors["0.weight"])
    means = [each.mean() for name, each in tensors.items() if name != "0.weight"]
    solved = by_share("diagonal", model, tensors, 0.1, slope_QP)
    expected = Parameters(model).split(slope_QP)["0.weight"] / (0.1 * torch.stack(means).mean())
    torch.testing.assert_close(solved["0.weight"], expected)
    with pytest.raises(NumericsError, match="the corpus's loss does not bend"):
        by_share("diagonal", model, {name: torch.zeros_like(each) for name, each in tensors.items()}, 0.1, slope_QP)


def test_schulz_inverts_what_is_nearly_singular():
    """Eigenvalues over ten orders of magnitude, far from the published start's range."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=DOUBLE)).Q
    matrix = basis @ torch.diag(torch.logspace(-5, 5, 12, dtype=DOUBLE)) @ basis.T
    torch.testing.assert_close(matrix @ schulz_inverse(matrix, "w"), torch.eye(12, dtype=DOUBLE), rtol=0, atol=1e-6)


def test_what_schulz_cannot_invert_is_an_error():
    """A singular matrix."""
    with pytest.raises(NumericsError, match=r"w: Schulz's iteration .* 60 steps"):
        schulz_inverse(torch.ones(2, 2, dtype=DOUBLE), "w")
