"""`last_blocks`: only the last blocks and what comes behind them are tuned, of any model, by every producer that tunes."""

import copy

import pytest
import torch
from torch import nn

from jobs import digits
from pipeline.blocks import choose
from pipeline.choices import ClassificationTask
from pipeline.errors import ContractError, SpecError
from pipeline.extensions import load_producer, load_task
from pipeline.producer_choices import Finetune, Natural, Unlearn
from pipeline.producers.base import Setting
from tests.contract.test_natural import sample_of
from tests.language import VOCABULARY, gpt, t5
from tests.unit.test_spec import parse

PICTURES = load_task(ClassificationTask(shape=[1, 8, 8]))
TEXTS = load_task(parse(task={"name": "causal_lm", "tokens": "ids"}).task)


class BasicBlock(nn.Module):
    """Two convolutions around which the input goes."""

    def __init__(self, inside, outside):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, padding=1), nn.BatchNorm2d(outside)
        self.around = nn.Sequential(nn.Conv2d(inside, outside, 1), nn.BatchNorm2d(outside))

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.around(x))


class ResNet(nn.Module):
    """Two stages of two blocks; its output layer is defined before everything else, its second stage before its first."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 10)
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.layer2 = nn.Sequential(BasicBlock(4, 8), BasicBlock(8, 8))
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))

    def forward(self, x):
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean(dim=(2, 3)))


def staged():
    """Hugging Face's ResNet: stages in a list, of blocks in lists, of convolutions in lists."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[2, 3], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


class Unlisted(nn.Module):
    """Blocks without a list, one of them called twice, and a parameter of the model's own that is used at the end."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))
        self.first, self.second = (nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.second(self.first(self.second(self.first(x.flatten(1)))))) * self.scale


class Attending(nn.Module):
    """torch's own encoder, which uses some of its parameters without calling the modules that own them."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.encoder(x[:, 0]).mean(dim=1))


def made(factory):
    torch.manual_seed(0)
    return factory().eval()


def pictures(rows=12):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (rows,), generator=generator)
    return {"features": torch.randn((rows, 1, 8, 8), generator=generator), "label": labels}


def texts(rows=3):
    ids = torch.randint(0, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def names_under(model, *prefixes):
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def tuned(word, base, last_blocks, task=PICTURES, batch=None):
    """The counterpart that a producer makes."""
    batch = pictures() if batch is None else batch
    query = {name: value[:1] for name, value in batch.items()}
    if word in ("unlearn", "finetune"):
        section = Unlearn if word == "unlearn" else Finetune
        return load_producer(section(last_blocks=last_blocks, steps=2)).produce(base, task, query, 0)
    producer = load_producer(Natural(curvature=word, last_blocks=last_blocks, iterations=3))
    sample = sample_of(batch, rows_each=6)
    setting = Setting(base, task, sample.batches[:1], sample, seed=0)
    ((_, produced),) = producer.produce_all(setting, {"a": query}, producer.fit(setting))
    return produced


@pytest.mark.parametrize(
    ("factory", "last_blocks", "expected", "blocks"),
    [
        (digits.cnn, 1, ("9.",), "4 of 4 layers"),
        (digits.cnn, 2, ("7.", "9."), "3-4 of 4 layers"),
        (digits.mlp, 3, ("1.", "3.", "5."), "1-3 of 3 layers"),
        (ResNet, 1, ("fc.", "layer2.1."), "4 of 4 BasicBlock"),
        (ResNet, 3, ("fc.", "layer2.", "layer1.1."), "2-4 of 4 BasicBlock"),
        (Unlisted, 1, ("second.", "head."), "2 of 2 Sequential"),
        (Attending, 2, ("encoder.layers.1.", "encoder.layers.2.", "head."), "2-3 of 3 TransformerEncoderLayer"),
    ],
)
def test_the_last_blocks_and_what_is_called_behind_them_are_chosen(factory, last_blocks, expected, blocks):
    """In the order of calls, wherever the output layer is defined; a model's own parameters are used from its beginning."""
    model = made(factory)
    choice = choose(model, PICTURES, pictures(), last_blocks=last_blocks)
    assert names_under(model, *expected) == list(choice.names)
    assert blocks == choice.details["blocks"]


@pytest.mark.parametrize(("tied", "behind"), [(False, ("model.norm.", "lm_head.")), (True, ("model.norm.",))])
def test_an_output_layer_that_is_tied_to_the_embedding_is_not_behind(tied, behind):
    """Else the embedding would change, and with it everything."""
    model = gpt(layers=4, tied=tied)
    choice = choose(model, TEXTS, texts(), last_blocks=1)
    assert names_under(model, "model.layers.3.", *behind) == list(choice.names)
    assert "4 of 4 LlamaDecoderLayer" == choice.details["blocks"]
    numbers = sum(model.get_parameter(name).numel() for name in choice.names)
    assert f"{numbers:,} of {model.num_parameters():,}" == choice.details["parameters"]


def test_an_encoders_blocks_come_before_a_decoders():
    """Of one class, they count together; the two stacks that hold them are no blocks, though they hold more."""

    class Translation:
        def loss_B(self, model, batch):
            return model(input_ids=batch["input_ids"], decoder_input_ids=batch["labels"]).logits.sum(dim=(1, 2))

    model = t5()
    choice = choose(model, Translation(), texts(), last_blocks=3)
    assert "2-4 of 4 T5Block" == choice.details["blocks"]
    shared = ("encoder.block.1.", "encoder.final", "decoder.block.", "decoder.final")
    assert names_under(model, *shared) == list(choice.names)


@pytest.mark.parametrize("word", ["unlearn", "finetune", "gauss_newton", "ekfac", "gfim", "diagonal"])
@pytest.mark.parametrize("factory", [digits.cnn, pytest.param(ResNet, marks=pytest.mark.slow)])
def test_every_producer_moves_the_chosen_alone(word, factory):
    """Of the counterpart's tensors the others are the base's, buffers too; its details say which moved."""
    base = made(factory)
    before = copy.deepcopy(base.state_dict())
    made_of = tuned(word, base, 1)
    choice = choose(base, PICTURES, pictures(), last_blocks=1)
    moved = [name for name, each in made_of.model.state_dict().items() if not torch.equal(each, before[name])]
    assert sorted(choice.names) == sorted(moved)
    assert choice.details == {name: made_of.details[name] for name in ("blocks", "parameters")}
    assert all(torch.equal(before[name], each) for name, each in base.state_dict().items())


def test_blocks_are_those_of_a_stage_not_the_stage():
    """The finer of two kinds that hold the same."""

    class Pictures:
        def loss_B(self, model, batch):
            return model(batch["features"]).logits.sum(dim=1)

    model = made(staged)
    choice = choose(model, Pictures(), pictures(), last_blocks=2)
    assert "4-5 of 5 ResNetBasicLayer" == choice.details["blocks"]
    prefixes = [f"resnet.encoder.stages.1.layers.{n}." for n in (1, 2)]
    assert names_under(model, *prefixes, "classifier.") == list(choice.names)


def test_all_blocks_leave_out_what_comes_before_them():
    """0 is not the same as as many as there are: the embedding stays."""
    base = gpt()
    moved = {
        blocks: {
            name
            for name, each in tuned("unlearn", base, blocks, TEXTS, texts()).model.state_dict().items()
            if not torch.equal(each, base.state_dict()[name])
        }
        for blocks in (0, 2)
    }
    assert {"model.embed_tokens.weight"} == moved[0] - moved[2]


def test_adapters_go_to_the_last_blocks():
    """To those of their linear layers that match; the output layer has none by itself."""
    base = gpt(layers=3)
    section = Finetune(lora_rank=2, lora_targets="q_proj|down_proj", last_blocks=2, steps=2)
    produced = load_producer(section).produce(base, TEXTS, texts(), 0)
    expected = {f"model.layers.{n}.{layer}.weight" for n in (1, 2) for layer in ("self_attn.q_proj", "mlp.down_proj")}
    assert expected == set(produced.added)
    assert {"blocks": "2-3 of 3 LlamaDecoderLayer"} == produced.details


@pytest.mark.parametrize("section", [Unlearn, Finetune])
def test_train_mode_moves_statistics_of_the_last_blocks_alone(section):
    """Those of batch norms before them would change all that comes after."""
    base = made(ResNet)
    produced = load_producer(section(mode="train", last_blocks=1, steps=2)).produce(base, PICTURES, pictures(4), 0)
    old = base.state_dict()
    moved = {name for name, each in produced.model.state_dict().items() if not torch.equal(each, old[name])}
    buffers = {name for name, _ in base.named_buffers() if name.startswith("layer2.1.")}
    assert 9 == len(buffers)
    assert buffers <= moved <= {*names_under(base, "fc.", "layer2.1."), *buffers}


@pytest.mark.parametrize("preset", [None, "paper"])
def test_noise_leaves_the_choice(preset):
    """The paper's step moves the last layer alone, too, and steps on a query that noise was added to."""
    base = made(digits.cnn)
    query = pictures(1)
    section = Unlearn(preset=preset, last_blocks=1, **({} if preset else {"noise_radius": 1.0, "noise_below": 99.0}))
    produced = load_producer(section).produce(base, PICTURES, query, 0)
    old = base.state_dict()
    assert {"9.weight", "9.bias"} == {
        n for n, each in produced.model.state_dict().items() if not torch.equal(each, old[n])
    }


def test_a_model_is_left_as_it_was():
    """Looking at its calls leaves no hooks, gradients or modes behind."""
    model = made(ResNet)
    choose(model, PICTURES, pictures(), last_blocks=1)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (digits.cnn, r"last_blocks: 9, but Sequential has 4 blocks \(layers\)"),
        (ResNet, r"last_blocks: 9, but ResNet has 4 blocks \(BasicBlock\)"),
    ],
)
def test_more_blocks_than_there_are_is_a_contract_error(factory, message):
    """It says how many there are, and of what class."""
    with pytest.raises(ContractError, match=message) as caught:
        choose(made(factory), PICTURES, pictures(), last_blocks=9)
    assert "at most 4" in caught.value.hint


def test_blocks_that_share_all_their_parameters_with_earlier_ones_are_a_contract_error():
    """Nothing would be tuned."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 10), nn.Linear(10, 10)).eval()
    model[3] = model[2]
    model.append(nn.Linear(10, 10, bias=False)).eval()
    model[4].weight = model[2].weight
    with pytest.raises(ContractError, match="blocks 3 of 3 layers, use no parameters but such as are used before them"):
        choose(model, PICTURES, pictures(), last_blocks=1)


@pytest.mark.parametrize("name", ["unlearn", "finetune", "natural"])
def test_names_and_blocks_are_not_both_chosen(name):
    """The spec says so before anything is loaded."""
    with pytest.raises(SpecError, match="parameters chooses by name, last_blocks by place"):
        parse(producer={"name": name, "parameters": "fc", "last_blocks": 1})
