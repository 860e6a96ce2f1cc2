"""Every loader: weights that fit come back to the bit, others are refused by name, and no code in a file is run."""

import io
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline import choices, loaders
from pipeline.errors import MAX_NAMES_SHOWN, ContractError, InputError, NumericsError, SpecError
from pipeline.extensions import load_model
from pipeline.loaders.base import load_weights
from pipeline.loaders.torch_module import read_weights


def mlp(hidden=4):
    """A factory: two layers and a buffer, weights drawn from torch's generator."""
    return nn.Sequential(nn.Linear(3, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 2))


def no_module():
    """A factory that returns something else."""
    return {"weights": 1}


HERE = "tests.contract.test_loaders"
SECTIONS = {
    "torch_module": lambda **fields: choices.TorchModule(**{"factory": f"{HERE}:mlp", **fields}),
}
"""Loader -> its section over `mlp`, with fields changed."""
SAVES = {
    "model.safetensors": lambda state, path: safetensors.torch.save_file(state, path),
    "model.pt": lambda state, path: torch.save(state, path),
    "model.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
}
every_loader = pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
every_file = pytest.mark.parametrize("name", SAVES)


def load(section, seed=0):
    return load_model(section, "cpu", seed)


def same_bits(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def weights(tmp_path):
    """`weights(state, name)`: URI of a file of weights."""

    def write(state, name="model.safetensors"):
        SAVES[name](state, tmp_path / name)
        return str(tmp_path / name)

    return write


def test_every_loader_is_under_contract():
    """A new word in the table gets its row here, or a file of its own where weights are a folder."""
    assert set(loaders.BUILTIN) == {*SECTIONS, "hf_transformers"}


@every_loader
@every_file
def test_weights_come_back_to_the_bit(section, name, weights):
    """Parameters and buffers are the file's; the model is in eval mode."""
    state = mlp().state_dict()
    state["1.running_mean"] += 3
    model = load(section(weights_uri=weights(state, name)))
    assert same_bits(state, model.state_dict())
    assert not any(module.training for module in model.modules())


@every_loader
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_model_computes_in_the_specs_dtype(section, dtype, weights):
    """Whatever the file's dtype; counters stay integers."""
    model = load(section(weights_uri=weights(mlp().state_dict()), dtype=dtype))
    assert {getattr(torch, dtype)} == {parameter.dtype for parameter in model.parameters()}
    assert torch.int64 == model[1].num_batches_tracked.dtype


@every_loader
@every_file
def test_weights_that_do_not_fit_are_listed_by_name(section, name, weights):
    """Missing, unexpected and misshaped names stand in one message that names the file."""
    state = mlp().state_dict()
    del state["0.bias"]
    state |= {"2.weight": torch.zeros(2, 5), "ghost": torch.zeros(7)}
    with pytest.raises(ContractError, match=f"weights .*{name} do not fit Sequential") as caught:
        load(section(weights_uri=weights(state, name)))
    assert {
        "missing 0.bias [4]",
        "unexpected ghost [7]",
        "2.weight is [2, 5] in the file, [2, 4] in the model",
    } == {line.strip() for line in str(caught.value).splitlines()[1:]}


def test_a_model_that_weights_do_not_fit_is_left_as_it_was():
    """All of a state dict is copied, or none of it."""
    model, state = mlp(), mlp().state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del state["2.bias"]
    with pytest.raises(ContractError, match=r"missing 2\.bias"):
        load_weights(model, state, "here")
    assert same_bits(before, model.state_dict())


def test_a_long_list_of_misfits_is_cut_and_counted():
    """The weights of another model do not fill the screen."""
    state = {f"name-{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(ContractError, match="do not fit") as caught:
        load_weights(nn.Linear(1, 1, bias=False), state, "here")
    *shown, last = str(caught.value).splitlines()[1:]
    assert (MAX_NAMES_SHOWN, f"and {21 - MAX_NAMES_SHOWN} more") == (len(shown), last.strip())


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self._path),)


@every_loader
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_weights_file_is_refused_and_never_run(section, zipped, tmp_path):
    """A pickle that would create a file when loaded does not: it is an InputError."""
    path, proof = tmp_path / "model.pt", tmp_path / "proof"
    torch.save({"weight": torch.zeros(1), "x": Payload(proof)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="cannot be read as tensors only"):
        load(section(weights_uri=str(path)))
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # the payload was a real one


@every_loader
def test_a_pickled_module_is_refused_with_what_to_save_instead(section, tmp_path):
    """`torch.save(model)` holds code; the hint says how to save the tensors."""
    torch.save(mlp(), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt cannot be read as tensors only") as caught:
        load(section(weights_uri=f"{tmp_path}/model.pt"))
    assert "safetensors.torch.save_file" in caught.value.hint


@every_loader
@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({"model": {"weight": torch.zeros(1)}, "epoch": 3}, "got model, epoch"),
        ([torch.zeros(1)], "got list"),
        (torch.zeros(1), "got Tensor"),
    ],
    ids=["training checkpoint", "list", "tensor"],
)
def test_a_file_that_is_no_state_dict_is_refused(section, content, got, tmp_path):
    """A training checkpoint with the weights one level down says what it holds."""
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(InputError, match=f"are no state dict: {got}") as caught:
        load(section(weights_uri=f"{tmp_path}/model.pt"))
    assert "state_dict()" in caught.value.hint


@every_loader
def test_an_index_of_several_files_is_refused_with_the_way_out(section, tmp_path):
    """The weights are not in it."""
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(InputError, match="an index of several files") as caught:
        load(section(weights_uri=f"{tmp_path}/model.safetensors.index.json"))
    assert "hf_transformers" in caught.value.hint


DAMAGE = {"empty": lambda data: b"", "junk": lambda data: b"junk", "half": lambda data: data[: len(data) // 2]}


@every_loader
@every_file
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_weights_file_is_an_input_error_that_names_it(section, name, damage, weights):
    """Nothing, junk, or half of it."""
    path = Path(weights(mlp().state_dict(), name))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        load(section(weights_uri=str(path)))


def saved(name):
    buffer = io.BytesIO()
    if name.endswith(".safetensors"):
        return safetensors.torch.save(nn.Linear(2, 1).state_dict())
    torch.save(nn.Linear(2, 1).state_dict(), buffer, _use_new_zipfile_serialization=name.endswith(".pt"))
    return buffer.getvalue()


CONTENT = {name: saved(name) for name in SAVES}


@pytest.mark.filterwarnings("ignore::UserWarning")
@every_file
@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_damage_to_a_weights_file_is_anything_but_an_input_error(tmp_path_factory, name, changes):
    """Bytes that changed on the way give tensors or an InputError, never an exception of torch's own."""
    data = bytearray(CONTENT[name])
    for position, value in changes:
        data[position % min(len(data), 600)] = value
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    path.write_bytes(data)
    try:
        state = read_weights(str(path))
    except InputError as error:
        assert name in str(error)  # noqa: PT017  both outcomes are right
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())


@every_loader
@every_file
def test_a_missing_weights_file_is_an_input_error_that_names_it(section, name, tmp_path):
    """The path stands in the message."""
    with pytest.raises(InputError, match=f"{tmp_path}/{name} does not exist"):
        load(section(weights_uri=f"{tmp_path}/{name}"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factory": "tests.nowhere:mlp"}, "model.factory: tests.nowhere:mlp: cannot import tests.nowhere"),
        ({"factory": f"{HERE}:ghost"}, f"model.factory: .*module {HERE} has no 'ghost'"),
        ({"arguments": {"width": 3}}, "model.factory: .*mlp does not take these options: .*'width'"),
    ],
    ids=["module", "function", "arguments"],
)
def test_a_factory_that_cannot_be_called_is_a_spec_error(fields, message):
    """The message names the spec's field and what is missing."""
    with pytest.raises(SpecError, match=message):
        load(SECTIONS["torch_module"](**fields))


def test_a_factory_that_makes_no_module_is_a_contract_error():
    """The message says what came instead."""
    with pytest.raises(ContractError, match=r"no_module returned dict, expected a torch.nn.Module"):
        load(SECTIONS["torch_module"](factory=f"{HERE}:no_module"))


@every_loader
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(section, bad, weights):
    """Before anything is computed: every tensor with how many there are."""
    state = mlp().state_dict()
    state["0.weight"][1] = bad
    state["2.bias"][:] = bad
    what = "NaN" if bad != bad else "infinite"
    expected = (
        rf"model\.safetensors are not finite:\n  parameter 0\.weight \[4, 3\]: 3 of 12 {what}\n  parameter 2\.bias"
    )
    with pytest.raises(NumericsError, match=expected):
        load(section(weights_uri=weights(state)))


@every_loader
def test_a_buffer_may_be_infinite_but_not_nan(section, weights):
    """As a mask is; a variance that is NaN is a training gone wrong."""
    state = mlp().state_dict()
    state["1.running_mean"][0] = float("-inf")
    load(section(weights_uri=weights(state)))
    state["1.running_var"][0] = float("nan")
    with pytest.raises(NumericsError, match=r"buffer 1\.running_var \[4\]: 1 of 4 NaN"):
        load(section(weights_uri=weights(state)))


@every_loader
def test_weights_that_overflow_in_the_specs_dtype_are_refused(section, weights):
    """A number that float32 holds and float16 does not."""
    state = mlp().state_dict()
    state["0.weight"][0, 0] = 1e6
    load(section(weights_uri=weights(state)))
    with pytest.raises(NumericsError, match=r"0\.weight \[4, 3\]: 1 of 12 infinite(.|\n)*model\.dtype"):
        load(section(weights_uri=weights(state), dtype="float16"))


def test_the_factory_gets_its_arguments(weights):
    """A wider model takes wider weights."""
    model = load(SECTIONS["torch_module"](arguments={"hidden": 9}, weights_uri=weights(mlp(9).state_dict())))
    assert 9 == model[0].out_features


@every_loader
def test_a_model_without_weights_follows_the_seed_alone(section):
    """The same seed draws the same weights, wherever torch's own generator stands; another seed others."""
    torch.manual_seed(1)
    first = load(section(), seed=5).state_dict()
    torch.manual_seed(2)
    assert same_bits(first, load(section(), seed=5).state_dict())
    assert not same_bits(first, load(section(), seed=6).state_dict())


@every_loader
def test_torchs_own_generator_stands_where_it_stood(section):
    """Loading a model moves nobody else's random numbers."""
    before = torch.get_rng_state()
    load(section(), seed=5)
    assert torch.equal(before, torch.get_rng_state())
