"""The natural producer: products with the Gauss-Newton matrix, solves, steps, dampings, on models small enough to write out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from pipeline.curvatures import kernel
from pipeline.curvatures.base import Parameters, Sample
from pipeline.curvatures.gauss_newton import conjugate_gradients, product
from pipeline.curvatures.linearised import Linearised
from pipeline.errors import ContractError, NumericsError
from pipeline.producer_choices import Natural as NaturalSection
from pipeline.producers.base import Setting
from pipeline.producers.damping import START, SUPPORT, single_examples, supporting
from pipeline.producers.natural import Natural
from pipeline.tasks.classification import Classification

pytestmark = pytest.mark.slow

CLASSES = 3
TASK = Classification("features", "label", [4], temperature=2.0)


class Tied(nn.Module):
    """Token ids to logits of the first four tokens' mean, by one matrix for both ends."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 5)
        self.head = nn.Linear(5, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embedding(ids % CLASSES).mean(dim=1)))


class Attention(nn.Module):
    """One layer of attention over four places, with a norm."""

    def __init__(self):
        super().__init__()
        self.make = nn.Linear(1, 12)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        q, k, v = self.make(x[..., None]).chunk(3, dim=-1)
        return self.head(self.norm(F.scaled_dot_product_attention(q, k, v)).mean(dim=1))


def perceptron():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, CLASSES)
    )


def normed():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))
    model.train()(torch.randn(50, 4))  # statistics of its own
    return model


MODELS = {
    "perceptron": perceptron,
    "convolution": convolution,
    "batch norm": normed,
    "attention": Attention,
    "tied": Tied,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def made(make, dtype=torch.float64, rows=24):
    """A model in eval mode, and rows that it takes."""
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    features = torch.randint(CLASSES, (rows, 4)) if make is Tied else torch.randn(rows, 4, dtype=dtype)
    return model, {"features": features, "label": torch.randint(CLASSES, (rows,))}


def matrix(model, batch):
    """The Gauss-Newton matrix, written out from Jacobians and Hessians of single rows."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def logits(given, x):
        return functional_call(model, given, (x[None],))[0]

    total = 0
    for x, y in zip(batch["features"], batch["label"], strict=True):
        parts = jacrev(logits)(parameters, x)
        jacobian_CP = torch.cat([part.reshape(CLASSES, -1) for part in parts.values()], dim=1)
        bend_CC = jacrev(jacrev(lambda z, y=y: F.cross_entropy(z / 2.0, y)))(logits(parameters, x))
        total = total + jacobian_CP.T @ bend_CC @ jacobian_CP
    return total / len(batch["label"])


def sample_of(batch, rows_each=10):
    parts = [
        {name: value[i : i + rows_each] for name, value in batch.items()}
        for i in range(0, len(batch["label"]), rows_each)
    ]
    return Sample(parts, len(batch["label"]))


def setting_of(model, batch, task=TASK):
    sample = sample_of(batch)
    return Setting(model, task, sample.batches[:1], sample, seed=0)


def keep_all(monkeypatch):
    """Of the Gauss-Newton matrix."""
    monkeypatch.setattr(kernel, "LEAST_KEPT", 1.0)
    monkeypatch.setattr(kernel, "MOST_KEPT", 1.0)


@pytest.fixture(params=["direct", "iterative"])
def exact(request, monkeypatch):
    """Both ways to invert the matrix; the first without leaving anything out."""
    keep_all(monkeypatch)
    if request.param == "iterative":
        monkeypatch.setattr(kernel, "MOST_ROWS", 0)


def natural(**fields) -> Natural:
    return Natural(**NaturalSection(**{"curvature": "gauss_newton", **fields}).keywords)


def query_of(batch, row):
    return {name: value[row : row + 1] for name, value in batch.items()}


@every_model
def test_products_are_those_of_the_written_out_matrix(make):
    """J'HJ v, summed over batches, for models with convolutions, attention, norms and tied weights."""
    model, batch = made(make)
    parameters = Parameters(model)
    vector_QP = torch.randn(3, parameters.size, dtype=torch.float64)
    expected_QP = vector_QP @ matrix(model, batch)
    found_QP = product(model, TASK, parameters, sample_of(batch), vector_QP)
    assert torch.allclose(expected_QP, found_QP, rtol=1e-9, atol=1e-12)


@every_model
def test_derivatives_of_losses_are_dot_products_with_gradients(make):
    """The change of each row's loss along a direction is its own gradient's share in it."""
    model, batch = made(make)
    parameters = Parameters(model)
    vector_QP = torch.randn(2, parameters.size, dtype=torch.float64)
    gradient_NP = torch.stack(
        [
            parameters.gradient(lambda i=i: TASK.loss_B(model, query_of(batch, i)).sum())
            for i in range(len(batch["label"]))
        ]
    )
    found_QN = Linearised(model, TASK, parameters, batch).loss_along(vector_QP)
    assert torch.allclose(vector_QP @ gradient_NP.T, found_QN, rtol=1e-9, atol=1e-12)


@every_model
def test_a_direction_is_the_exact_damped_solve(make, exact):
    """Truth 6: its cosine with the solve of the written-out matrix is above .99."""
    model, batch = made(make)
    producer = natural(damping=0.02, iterations=60)
    setting, queries = setting_of(model, batch), {str(row): query_of(batch, row) for row in range(4)}
    parameters = Parameters(model)
    exact_PP = matrix(model, batch) + 0.02 * torch.eye(parameters.size, dtype=torch.float64)
    for query_id, produced in producer.produce_all(setting, queries, producer.fit(setting)):
        slope_P = parameters.gradient(lambda q=query_id: TASK.loss_B(model, queries[q]).mean())
        moved_P = parameters.flat(
            [
                new.detach() - old.detach()
                for new, old in zip(produced.model.parameters(), model.parameters(), strict=True)
            ]
        )
        assert F.cosine_similarity(moved_P, torch.linalg.solve(exact_PP, slope_P), dim=0) > 0.99
        assert moved_P @ slope_P > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_one_solve_serves_all_dampings(dtype, tolerance):
    """Every damping's solution is that of a direct solve; a right-hand side of zeros stays zeros."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 80, generator=generator, dtype=dtype)
    matrix_PP, b_QP = root.T @ root / 30, torch.randn(4, 80, generator=generator, dtype=dtype)
    b_QP[2] = 0
    dampings = [1.0, 0.1, 0.01]
    found = conjugate_gradients(lambda vector_QP: vector_QP @ matrix_PP, b_QP, dampings, iterations=60)
    for damping, x_QP in zip(dampings, found, strict=True):
        expected_QP = torch.linalg.solve(matrix_PP + damping * torch.eye(80, dtype=dtype), b_QP.T).T
        assert (x_QP - expected_QP).norm() <= tolerance * expected_QP.norm()
        assert 0 == x_QP[2].abs().max()


def test_scores_are_influences_within_the_error_that_was_measured():
    """Loss differences of the counterpart are the step times the derivatives, to the linear error of its details."""
    model, batch = made(perceptron, torch.float32, rows=60)
    setting, producer = setting_of(model, batch), natural()
    queries = {"a": query_of(batch, 3)}
    ((_, produced),) = producer.produce_all(setting, queries, producer.fit(setting))
    probe = setting.probe[0]
    with torch.no_grad():
        change_N = (TASK.loss_B(produced.model, probe) - TASK.loss_B(model, probe)).double()
    parameters = Parameters(model)
    moved_P = parameters.flat([p.detach() for p in produced.model.parameters()]) - parameters.flat(
        [p.detach() for p in model.parameters()]
    )
    expected_N = Linearised(model, TASK, parameters, probe).loss_along(moved_P[None])[0].double()
    error = float((change_N - expected_N).norm() / expected_N.norm())
    assert error == pytest.approx(produced.details["linear_error"], abs=0.02)
    assert error < 0.02
    assert produced.details["half_step_difference"] < 0.02


def test_a_step_that_is_given_is_taken():
    """The query's loss rises by what is asked, to first order."""
    model, batch = made(perceptron)
    setting, producer = setting_of(model, batch), natural(step=0.001)
    ((_, produced),) = producer.produce_all(setting, {"a": query_of(batch, 5)}, producer.fit(setting))
    with torch.no_grad():
        rise = TASK.loss_B(produced.model, query_of(batch, 5)) - TASK.loss_B(model, query_of(batch, 5))
    assert 0.001 == pytest.approx(rise.item(), rel=0.02)


@pytest.mark.parametrize("step", [3.0, 300.0])
def test_a_step_out_of_the_linear_range_is_said(capsys, step):
    """A warning with figures; also where the step is so long that losses rise in proportion again."""
    model, batch = made(perceptron)
    setting, producer = setting_of(model, batch), natural(step=step)
    list(producer.produce_all(setting, {"a": query_of(batch, 5)}, producer.fit(setting)))
    assert "of 1 of 1 queries the loss differences are off by more than 10%" in capsys.readouterr().err


def test_the_base_comes_back_unchanged():
    """Weights, gradients and what requires them are as before."""
    model, batch = made(perceptron, torch.float32)
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    setting, producer = setting_of(model, batch), natural()
    list(producer.produce_all(setting, {"a": query_of(batch, 0)}, producer.fit(setting)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_parameters_that_match_are_moved():
    """The others of the counterpart are the base's."""
    model, batch = made(perceptron)
    setting, producer = setting_of(model, batch), natural(parameters=r"^2\.")
    ((_, produced),) = producer.produce_all(setting, {"a": query_of(batch, 0)}, producer.fit(setting))
    same = [torch.equal(new, old) for new, old in zip(produced.model.parameters(), model.parameters(), strict=True)]
    assert [True, True, False, False] == same


@pytest.mark.parametrize("steps", [1, 3])
def test_every_step_goes_where_the_query_points_from_there(steps, exact):
    """Together as long as one; each by an exact solve of the query's gradient where the one before ended (by hand here)."""
    model, batch = made(perceptron)
    setting, query = setting_of(model, batch), query_of(batch, 5)
    producer = natural(damping=0.02, iterations=60, tolerance=1e-9, step=1.0, steps=steps)
    ((_, produced),) = producer.produce_all(setting, {"a": query}, producer.fit(setting))
    hand, parameters = copy.deepcopy(model), Parameters(model)
    exact_PP = matrix(model, batch) + 0.02 * torch.eye(parameters.size, dtype=torch.float64)
    there, length = Parameters(hand), None
    for _ in range(steps):
        slope_P = there.gradient(lambda: TASK.loss_B(hand, query).mean())
        direction_P = torch.linalg.solve(exact_PP, slope_P)
        length = length or 1.0 / float(slope_P @ direction_P) / steps
        with torch.no_grad():
            for name, change in there.split(length * direction_P).items():
                there.tensors[name] += change
    for one, other, base in zip(produced.model.parameters(), hand.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one - base, other - base, rtol=1e-5, atol=1e-9)
    assert steps == produced.steps


@pytest.mark.parametrize("steps", [1, 3])
def test_several_queries_get_what_each_gets_alone(steps, exact):
    """To the bit, though some are solved in fewer iterations: a retry of one query must not give another counterpart."""
    model, batch = made(perceptron, torch.float32)
    setting, producer = setting_of(model, batch), natural(tolerance=0.05, steps=steps)
    fitted = producer.fit(setting)
    queries = {str(row): query_of(batch, row) for row in range(8)}
    together = {
        query_id: copy.deepcopy(produced.model)  # which the next one changes
        for query_id, produced in producer.produce_all(setting, queries, fitted)
    }
    for query_id, query in queries.items():
        ((_, alone),) = producer.produce_all(setting, {query_id: query}, fitted)
        for one, other in zip(alone.model.parameters(), together[query_id].parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_sample_supports_its_share_at_the_damping_chosen(exact):
    """As the written-out matrix has it, over rows of the probe; all dampings that were tried are told."""
    model, batch = made(perceptron, rows=60)
    setting = setting_of(model, batch)
    details = natural(iterations=60, tolerance=1e-9).fit(setting).details
    whole_PP, damping = matrix(model, batch), details["damping"]
    norms, parts = [], []
    for (row,) in single_examples(setting.probe, 10):
        slope_P = setting.slope(Parameters(model), row)
        step_P = torch.linalg.solve(whole_PP + damping * torch.eye(len(slope_P), dtype=torch.float64), slope_P)
        norms.append(float(slope_P @ step_P) ** 0.5)
        parts.append(float(step_P @ whole_PP @ step_P) / norms[-1])
    assert SUPPORT == pytest.approx(sum(parts) / sum(norms), abs=0.02)
    tried = [float(each.split(": ")[0]) for each in details["damping_support"].split(", ")]
    assert 3 < len(tried) < 9
    assert min(tried) < damping < max(tried)


@pytest.mark.parametrize("bending", [1e-9, 1e-3, 1.0, 3e6])
def test_the_search_goes_as_far_as_it_must(bending, capsys):
    """Where everything bends by so much, bending / (bending + damping) is the share."""
    found = supporting(lambda damping: bending / (bending + damping), SUPPORT)
    assert found == pytest.approx(bending * (1 / SUPPORT - 1), rel=0.03)
    assert "" == capsys.readouterr().err


@pytest.mark.parametrize(("share", "compare"), [(0.9, float.__gt__), (0.1, float.__lt__)])
def test_an_end_of_the_search_is_said(share, compare, capsys):
    """What the sample supports does not change with the damping: the last that was tried is taken."""
    assert compare(supporting(lambda damping: share, SUPPORT), START)
    assert "were tried, and none is right" in capsys.readouterr().err


def test_without_any_support_there_is_no_damping():
    """Nothing bends; or nothing can be computed."""
    assert supporting(lambda damping: 0.0, SUPPORT) is None
    assert supporting(lambda damping: math.nan, SUPPORT) is None


def test_a_query_without_a_slope_does_not_stop_the_others():
    """A loss that is exactly zero leads nowhere: that is said of this query, and the others get their counterparts."""
    model, batch = made(perceptron, torch.float32)
    setting, producer = setting_of(model, batch), natural(damping=0.1)
    with torch.no_grad():
        model[2].bias[0] = 1e4
    certain = {"features": batch["features"][:1], "label": torch.tensor([0])}
    wrong = {"features": batch["features"][:1], "label": torch.tensor([1])}
    queries = {"a": wrong, "certain": certain, "b": wrong}
    made_of = dict(producer.produce_all(setting, queries, producer.fit(setting)))
    assert isinstance(made_of["certain"], NumericsError)
    assert "query 'certain': its gradient has length 0" in str(made_of["certain"])
    assert ["a", "b"] == sorted(query_id for query_id, each in made_of.items() if not isinstance(each, NumericsError))


def test_a_loss_that_does_not_bend_is_a_numerics_error():
    """There is no natural step on a straight line."""

    class Straight:
        def loss_B(self, model, batch):
            return model(batch["features"]).sum(dim=1)

    model, batch = made(perceptron)
    with pytest.raises(NumericsError, match="no natural step"):
        natural().fit(setting_of(model, batch, Straight()))


def test_a_task_that_does_not_call_its_model_is_a_contract_error():
    """Without outputs there is nothing to take a curvature of."""

    class Aside:
        def loss_B(self, model, batch):
            return model.get_submodule("2")(torch.zeros(len(batch["label"]), 6, dtype=torch.float64)).sum(dim=1)

    model, batch = made(perceptron)
    with pytest.raises(ContractError, match="must call its model"):
        Linearised(model, Aside(), Parameters(model), batch)


def test_a_pattern_that_matches_nothing_is_a_contract_error():
    """It names parameters that there are."""
    model, batch = made(perceptron)
    with pytest.raises(ContractError, match=r"matches none of 4 parameters: 0\.weight"):
        natural(parameters="nothing").fit(setting_of(model, batch))


def test_damping_of_a_linear_regression_is_finite():
    """A loss that bends everywhere alike, by a task of two methods."""

    class Squared:
        def loss_B(self, model, batch):
            return (model(batch["features"])[:, 0] - batch["label"]) ** 2

    model, batch = made(perceptron)
    details = natural().fit(setting_of(model, batch, Squared())).details
    assert math.isfinite(details["damping"])
