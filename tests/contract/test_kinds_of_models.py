"""Models of all kinds: each row has the loss that it has alone, in fresh copies of model and input; or the model is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.batches import Arrays
from pipeline.choices import CausalLMTask, ClassificationTask
from pipeline.curvatures.base import Parameters, Sample
from pipeline.engine import LossEngine
from pipeline.errors import ContractError
from pipeline.extensions import load_producer, load_task
from pipeline.model_check import ModelCheck
from pipeline.numerics import cast
from pipeline.producer_choices import Finetune, Natural, Unlearn
from pipeline.producers.base import Setting
from tests.kinds import (
    CLASSES,
    FEATURES,
    REFUSED,
    SCORED,
    Centred,
    Counting,
    Placed,
    Plain,
    Remembering,
    Scaled,
    Words,
    made,
    rotary,
)
from tests.language import VOCABULARY, gpt

TASK, TEXTS = load_task(ClassificationTask(shape=[FEATURES])), load_task(CausalLMTask(tokens="ids", max_tokens=48))
ROWS = 13
every_kind = pytest.mark.parametrize("kind", SCORED, ids=lambda kind: kind.__name__)
every_way = pytest.mark.parametrize("way", ["difference", "gradient", "jvp"])


def arrays(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    return {"features": features, "label": rng.integers(0, CLASSES, rows)}


def alone(model, inputs, task=TASK):
    """Losses of rows by themselves, each in fresh copies of model and input."""
    found = []
    for item in range(inputs.items):
        batch = {name: torch.tensor(array) for name, array in inputs.rows(np.array([item])).items()}
        with torch.no_grad():
            found.append(float(task.loss_B(copy.deepcopy(model), batch)))
    return np.array(found)


def moved(model, size=0.1):
    """A counterpart: every parameter a step away."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: each.detach() + size * torch.randn(each.shape, generator=generator, dtype=each.dtype)
        for name, each in model.named_parameters()
        if each.numel()
    }


def with_weights(model, tensors):
    other = copy.deepcopy(model)
    other.load_state_dict(tensors, strict=False)
    return other


def along(model, tensors, inputs):
    """Derivatives of the losses of rows by themselves along the way to a counterpart, by autograd."""
    found = []
    for item in range(inputs.items):
        fresh = copy.deepcopy(model)
        batch = {name: torch.tensor(array) for name, array in inputs.rows(np.array([item])).items()}
        named = {name: each for name, each in fresh.named_parameters() if name in tensors}
        slopes = torch.autograd.grad(TASK.loss_B(fresh, batch)[0], list(named.values()))
        parts = [
            (slope.conj() * (tensors[name] - named[name].detach())).sum().real
            for name, slope in zip(named, slopes, strict=True)
        ]
        found.append(float(sum(parts)))
    return np.array(found)


@pytest.mark.slow
@every_kind
@every_way
@pytest.mark.parametrize("batch_rows", [1, 4])
def test_rows_have_the_losses_that_they_have_alone(kind, way, batch_rows):
    """Under the base and a counterpart, in batches of any size, twice over; the model and the arrays come back as they were."""
    model, inputs = made(kind), Arrays(arrays())
    counterpart, pristine = moved(model), copy.deepcopy(model)
    check, engine = ModelCheck(model, TASK), LossEngine(model, TASK, [counterpart])
    base_N = alone(pristine, inputs)
    expected_N = {
        "difference": lambda: alone(with_weights(pristine, counterpart), inputs) - base_N,
        "gradient": lambda: along(pristine, counterpart, inputs),
        "jvp": lambda: along(pristine, counterpart, inputs),
    }[way]()
    for _ in range(2):
        batches = check.batches(inputs, batch_rows, 0)
        got = engine.losses(batches) if way == "difference" else engine.derivatives(batches, None, way)
        np.testing.assert_allclose(base_N, got.base_N, atol=1e-5)
        np.testing.assert_allclose(expected_N, got.difference_QN[0], atol=1e-5)
    for name, array in arrays().items():
        assert np.array_equal(array, inputs.columns[name])
    now, before = model.state_dict(), pristine.state_dict()
    assert before.keys() == now.keys()
    assert all(torch.equal(before[name], now[name]) for name in before)


@pytest.mark.parametrize(("kind", "match"), REFUSED.items(), ids=lambda each: getattr(each, "__name__", ""))
@pytest.mark.parametrize("rows", [2, ROWS])
def test_a_model_whose_rows_have_no_loss_of_their_own_is_refused(kind, match, rows):
    """Before anything is scored, with the reason."""
    with pytest.raises(ContractError, match=match):
        ModelCheck(made(kind), TASK).batches(Arrays(arrays(rows)), 4, 0)


def test_a_single_row_is_seen_beside_itself_turned_round():
    """A run of one query of one row is refused as early; a model that cannot take what nobody gave is none the worse."""

    class Strict(Plain):
        def forward(self, x):
            assert bool((x[:, 0] < x[:, 3]).all())
            return super().forward(x)

    row = {"features": np.array([[0.0, 1.0, 2.0, 3.0]], np.float32), "label": np.array([1])}
    for kind in (Centred, Placed):
        with pytest.raises(ContractError, match="another loss beside other rows"):
            ModelCheck(made(kind), TASK).batches(Arrays(row), 4, 0)
    assert 1 == len(list(ModelCheck(made(Strict), TASK).batches(Arrays(row), 4, 0)))


def test_rows_one_by_one_have_no_neighbours():
    """A model that looks at others is scored with `score.batch_rows: 1`, row by row."""
    model, inputs = made(Centred), Arrays(arrays())
    got = LossEngine(model, TASK, []).losses(ModelCheck(model, TASK).batches(inputs, 1, 0))
    np.testing.assert_allclose(alone(model, inputs), got.base_N, atol=1e-6)


def test_an_ordinary_model_is_left_as_it_is():
    """No hook, no state; looked at once."""
    for model, task, inputs in ((made(Plain), TASK, Arrays(arrays())), (gpt(), TEXTS, texts(3, 9, 20))):
        check = ModelCheck(model, task)
        list(check.batches(inputs, 4, 64))
        assert 0 == len(model._forward_hooks)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    list(check.batches(inputs, 4, 64))
    assert [] == calls


def test_a_batch_that_is_changed_later_is_an_error():
    """Inputs are copied for every pass only where the first batch was changed."""

    class Sometimes(Plain):
        def forward(self, x):
            x[x > 9] = 0.0
            return super().forward(x)

    model, first, second = made(Sometimes), arrays(4), arrays(4)
    second["features"][0, 0] = 10.0
    engine = LossEngine(model, TASK, [moved(model)])
    with pytest.raises(ContractError, match="changes some batches in place, but not the first one"):
        engine.losses([*Arrays(first).batches(4), *Arrays(second).batches(4)])


class Mixing(nn.Module):
    """A language model whose texts see each other."""

    def __init__(self):
        super().__init__()
        self.words = Words()

    def forward(self, input_ids):
        logits = self.words(input_ids)
        return logits + 0.1 * logits.mean(dim=0)


@pytest.mark.parametrize("lengths", [(30, 9, 9, 9), (9,), (9, 9)])
def test_texts_that_see_each_other_are_refused(lengths):
    """Also where the longest fills a batch by itself; texts of which each does have no neighbours."""
    with pytest.raises(ContractError, match="another loss beside other rows"):
        ModelCheck(Mixing(), TEXTS).batches(texts(*lengths), 1, 32)
    assert len(lengths) == len(list(ModelCheck(Mixing(), TEXTS).batches(texts(*lengths), 1, 9)))


class Centring:
    """A task that changes its batch in place."""

    def loss_B(self, model, batch):
        batch["features"] -= 1.0
        return TASK.loss_B(model, batch)


def test_a_task_may_change_its_batch_in_place():
    """As models may; producers' queries too."""
    model, inputs, task = made(Plain), Arrays(arrays()), Centring()
    got = LossEngine(model, task, [moved(model)]).losses(inputs.batches(4))
    np.testing.assert_allclose(alone(model, inputs, task), got.base_N, atol=1e-6)
    expected = alone(with_weights(model, moved(model)), inputs, task)
    np.testing.assert_allclose(expected, got.counterpart_QN[0], atol=1e-6)


@every_kind
@pytest.mark.parametrize("section", [Finetune, Unlearn])
def test_steps_are_those_of_plain_torch(kind, section):
    """Three steps of SGD from fresh copies of the query each; state that no step changes stays the base's."""
    base = made(kind)
    query = {name: torch.tensor(array) for name, array in arrays(2, seed=3).items()}
    ModelCheck(base, TASK).require_independent(Arrays(arrays()), 4, 0)
    recipe = section(
        steps=3,
        lr=0.1,
        momentum=0.0,
        normalize=False,
        max_loss_change=0.0,
        optimizer="sgd",
        mode="eval",
        weight_decay=0,
    )
    produced = load_producer(recipe).produce(base, TASK, query, 0)
    expected = copy.deepcopy(base)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, maximize=section is Unlearn)
    for _ in range(3):
        optimizer.zero_grad()
        TASK.loss_B(expected, {name: value.clone() for name, value in query.items()}).mean().backward()
        optimizer.step()
    wanted, got = expected.state_dict(), produced.model.state_dict()
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("curvature", ["gauss_newton", "ekfac", "gfim", "diagonal"])
def test_natural_steps_move_losses_as_derivatives_say(kind, curvature):
    """Every kind with every curvature: the counterpart's losses change as those of rows alone do along its step."""
    base = made(kind)
    rows = Arrays(arrays(12))
    ModelCheck(base, TASK).require_independent(rows, 4, 0)
    tensors = [{name: torch.tensor(array) for name, array in rows.rows(np.arange(i, i + 4)).items()} for i in (0, 4, 8)]
    sample = Sample(tensors, 12)
    setting = Setting(base, TASK, tensors[:1], sample, 0)
    producer = load_producer(Natural(curvature=curvature, damping=0.1))
    query = {name: torch.tensor(array) for name, array in arrays(2, seed=3).items()}
    pristine = copy.deepcopy(base)
    ((_, produced),) = producer.produce_all(setting, {"q": query}, producer.fit(setting))
    state, before = produced.model.state_dict(), pristine.state_dict()
    changed = {name: each for name, each in state.items() if not torch.equal(each, before[name])}
    real = {name for name, each in base.named_parameters() if each.numel() and not each.is_complex()}
    assert real == set(changed)
    expected_N = along(pristine, changed, rows)
    found_N = alone(produced.model, rows) - alone(pristine, rows)
    assert np.linalg.norm(found_N - expected_N) < 0.1 * np.linalg.norm(expected_N)
    assert alone(produced.model, Arrays(arrays(2, seed=3))).mean() > alone(pristine, Arrays(arrays(2, seed=3))).mean()


def test_gradients_of_single_numbers_are_summed_as_all_others():
    """The diagonal of a parameter without dimensions is its mean squared gradient."""
    from pipeline.curvatures.diagonal import mean_squares
    from pipeline.curvatures.per_example import PerExample

    model = made(Scaled)
    batch = {name: torch.tensor(array) for name, array in arrays(8).items()}
    sample, parameters = Sample([batch], 8), Parameters(model)
    got = mean_squares(PerExample(model, TASK, parameters, sample), parameters, sample, ["logit_scale"])["logit_scale"]
    slopes = [
        torch.autograd.grad(TASK.loss_B(model, {n: v[i : i + 1] for n, v in batch.items()})[0], model.logit_scale)[0]
        for i in range(8)
    ]
    torch.testing.assert_close(torch.stack(slopes).square().mean(), got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_complex_tensors_keep_their_type(dtype):
    """Real ones are cast, complex and whole numbers are not; what a complex one holds stays."""
    model = nn.Module()
    turn = torch.polar(torch.ones(3), torch.arange(3.0))
    model.register_buffer("turn", turn.clone())
    model.register_buffer("count", torch.tensor(3))
    model.weight, model.phase = nn.Parameter(torch.ones(2)), nn.Parameter(turn.clone())
    cast(model, dtype)
    assert (dtype, torch.int64) == (model.weight.dtype, model.count.dtype)
    assert torch.equal(turn, model.turn)
    assert torch.equal(turn, model.phase)


def test_a_finer_copy_keeps_complex_tensors_and_resets_its_own_state():
    """Noise is measured on it: float64 losses of the same model."""
    for kind in SCORED:
        model, inputs = made(kind), Arrays(arrays())
        batches = list(ModelCheck(model, TASK).batches(inputs, 4, 0))
        finer = LossEngine(model, TASK, [moved(model)]).finer([0])
        got = finer.losses(batches)
        np.testing.assert_allclose(alone(model, inputs), got.base_N, atol=1e-5)
        np.testing.assert_allclose(alone(with_weights(model, moved(model)), inputs), got.counterpart_QN[0], atol=1e-5)


@pytest.mark.parametrize("kind", [Counting, Remembering])
def test_copies_reset_their_own_state(kind):
    """A copy of the model that is trained or moved begins each pass as it was, too."""
    model = made(kind)
    ModelCheck(model, TASK).require_independent(Arrays(arrays()), 4, 0)
    other, x = copy.deepcopy(model), torch.ones(2, FEATURES)
    first = other(x)
    assert torch.equal(first, other(x))
    assert all(torch.equal(left, right) for left, right in zip(model.buffers(), other.buffers(), strict=True))
    assert {id(each) for each in model.buffers()}.isdisjoint(map(id, other.buffers()))


def texts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.empty(len(lengths), object)
    for i, length in enumerate(lengths):
        rows[i] = rng.integers(0, VOCABULARY, length).tolist()
    return TEXTS.encode({"tokens": rows})


LENGTHS = (3, 30, 12, 13, 25, 9, 13, 30, 11, 40, 12, 5)
PADDED = {
    "plain": (gpt, False),
    "in place": (lambda: Words(in_place=True), False),
    "by its length": (lambda: Words(of_length=True), True),
    "longrope": (lambda: rotary("longrope"), True),
    "dynamic": (lambda: rotary("dynamic"), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("batch_tokens", [64, 256, 4096])
def test_texts_have_the_losses_that_they_have_alone(name, batch_tokens, capsys):
    """Whatever the batch's longest text: batches are smaller where padding matters, which is said once."""
    make, is_split = PADDED[name]
    model, inputs = make(), texts(*LENGTHS)
    check, expected = ModelCheck(model, TEXTS), alone(copy.deepcopy(model), inputs, TEXTS)
    engine = LossEngine(model, TEXTS, [moved(model, 0.01)])
    for part in (inputs, texts(*LENGTHS[:4]), texts(40, 38)):
        expected = alone(copy.deepcopy(model), part, TEXTS)
        got = engine.losses(check.batches(part, 0, batch_tokens))
        np.testing.assert_allclose(expected, got.base_N, atol=1e-5)
        moved_N = alone(with_weights(model, moved(model, 0.01)), part, TEXTS)
        np.testing.assert_allclose(moved_N, got.counterpart_QN[0], atol=1e-5)
    assert is_split == ("only texts of one length go through it together" in capsys.readouterr().err)


def test_a_long_text_leaves_nothing_behind_for_those_after_it():
    """Shards of one text each, the longest first: what a model keeps of it is reset."""
    model, inputs = rotary("dynamic"), texts(30, 25, 13, 12)
    check, expected = ModelCheck(model, TEXTS), alone(copy.deepcopy(model), inputs, TEXTS)
    engine = LossEngine(model, TEXTS, [])
    for item in range(4):
        one = inputs.rows(np.array([item]))
        single = TEXTS.encode({"tokens": np.array([one["input_ids"][0].tolist(), None], object)[:1]})
        np.testing.assert_allclose(expected[item], engine.losses(check.batches(single, 0, 64)).base_N[0], atol=1e-5)


def test_only_batches_that_straddle_are_split():
    """Texts on one side of the length at which a model turns otherwise go together."""
    model, inputs = rotary("longrope", places=12), texts(3, 5, 8, 12, 14, 20, 30)
    batches = list(ModelCheck(model, TEXTS).batches(inputs, 0, 4096))
    assert sorted(range(7)) == sorted(np.concatenate([batch.item_B for batch in batches]).tolist())
    short = texts(3, 5, 8, 12)
    assert 1 == len(list(ModelCheck(model, TEXTS).batches(short, 0, 4096)))
    assert 1 == len(list(ModelCheck(model, TEXTS).batches(texts(14, 20, 30), 0, 4096)))
