"""LoRA: the counterpart is the base plus products, saved as factors, and its losses are those of peft's own model."""

import numpy as np
import pytest
import torch

from pipeline import changes
from pipeline.batches import Arrays
from pipeline.engine import LossEngine
from pipeline.errors import ContractError, SpecError
from pipeline.extensions import load_producer, load_task
from pipeline.producer_choices import Finetune, Unlearn
from pipeline.producers import adapters
from tests.language import VOCABULARY, gpt
from tests.unit.test_spec import parse

TASK = load_task(parse(task={"name": "causal_lm", "tokens": "ids"}).task)


def batch(rows=3, seed=0):
    ids = torch.randint(0, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def gpt2():
    """A model whose linear layers are transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=48)).eval()


def produce(base, section=Unlearn, seed=3, lr=0.1, **fields):
    made = load_producer(section(lora_rank=4, steps=3, lr=lr, **fields)).produce(base, TASK, batch(), seed)
    found = changes.between(base, made.model, made.added)
    return made, {name: change for name, (change, _) in found.items()}


def losses(engine_model, *counterparts):
    arrays = {name: tensor.numpy() for name, tensor in batch(8, seed=1).items()}
    return LossEngine(engine_model, TASK, counterparts).losses(Arrays(arrays).batches(4))


@pytest.mark.parametrize("model", [gpt, gpt2])
@pytest.mark.parametrize("section", [Unlearn, Finetune])
def test_only_factors_are_saved_and_give_the_counterparts_losses(model, section):
    """Through the file and back: the losses of the counterpart itself to 1e-5, and a file many times smaller than the weights."""
    base = model()
    made, changed = produce(base, section)
    assert changed
    assert all(isinstance(change, changes.LowRank) for change in changed.values())
    data = changes.to_bytes(changed)
    got = losses(base, changes.from_bytes(data))
    expected = losses(made.model).base_N
    assert expected == pytest.approx(got.counterpart_QN[0], abs=1e-5)
    assert np.abs(got.counterpart_QN[0] - got.base_N).max() > 1e-3
    assert len(data) < sum(base.get_parameter(name).numel() * 4 for name in changed)


def test_the_counterpart_is_what_peft_computes():
    """Before and after the adapters are folded into the weights: the same logits to rounding."""
    model = gpt().requires_grad_(False)
    parameters = adapters.add(model, list(model.parameters()), "", 4, 16.0, seed=0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.1)
        before = model(input_ids=batch()["input_ids"]).logits
        adapters.fold(model)
        after = model(input_ids=batch()["input_ids"]).logits
    assert torch.allclose(before, after, atol=1e-4)
    assert list(gpt().state_dict()) == list(model.state_dict())


def test_a_model_in_float64_has_products_in_float64():
    """Nothing is rounded to less: however small, the change is the product and nothing else."""
    base = gpt().double()
    made, changed = produce(base, lr=1e-7)
    for name, change in changed.items():
        moved = made.model.state_dict()[name] - base.state_dict()[name]
        assert torch.allclose(moved, change.left @ change.right, rtol=0, atol=1e-15)
        assert 0 < moved.abs().max() < 1e-6


def test_counterparts_of_both_kinds_share_an_engine():
    """Products and whole tensors by turns: each has its own losses, and the base comes back."""
    base = gpt()
    _, low = produce(base)
    whole = {name: tensor + 0.01 for name, tensor in base.state_dict().items() if "q_proj" in name}
    _, other = produce(base, seed=9)
    alone = [losses(gpt(), changed).counterpart_QN[0] for changed in (low, whole, other)]
    together = losses(base, low, whole, other)
    assert np.array_equal(np.stack(alone), together.counterpart_QN)
    assert np.array_equal(losses(gpt()).base_N, together.base_N)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in gpt().state_dict().items())


def test_the_same_seed_gives_the_same_factors():
    """Wherever torch's own generator stands."""
    torch.manual_seed(1)
    first = changes.to_bytes(produce(gpt())[1])
    torch.manual_seed(2)
    assert first == changes.to_bytes(produce(gpt())[1])
    assert first != changes.to_bytes(produce(gpt(), seed=4)[1])


def test_targets_choose_layers():
    """A pattern searched in names; by default all linear layers but the one that makes the logits."""
    assert {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)} == set(
        produce(gpt(), lora_targets="q_proj")[1]
    )
    everything = set(produce(gpt())[1])
    assert "lm_head.weight" not in everything
    assert 2 * 7 == len(everything)


def test_targets_that_match_nothing_are_a_clear_error():
    """The message has the pattern and the first names that there are."""
    with pytest.raises(
        ContractError, match=r"lora_targets: 'nowhere' matches none of 14 linear layers: model\.layers\.0"
    ):
        produce(gpt(), lora_targets="nowhere")


def test_weights_and_adapters_are_not_both_chosen():
    """The spec says so before anything is loaded."""
    with pytest.raises(SpecError, match="give one of them"):
        parse(producer={"name": "unlearn", "lora_rank": 4, "parameters": "q_proj"})


def test_tied_weights_are_saved_once():
    """Embedding and last layer are one tensor: the counterpart's file has it under one name."""
    base = gpt2()
    made = load_producer(Unlearn(steps=1, lr=0.1)).produce(base, TASK, batch(), 0)
    found = changes.between(base, made.model, made.added)
    assert 1 == sum(name in ("transformer.wte.weight", "lm_head.weight") for name in found)
    got = losses(base, {name: change for name, (change, _) in found.items()})
    assert losses(made.model).base_N == pytest.approx(got.counterpart_QN[0], abs=1e-6)
