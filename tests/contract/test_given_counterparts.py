"""Counterparts that no step makes: an existing checkpoint, and the base with its retrieval heads masked."""

import copy

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline import changes
from pipeline.errors import ContractError, InputError, SpecError
from pipeline.extensions import load_producer, needs_query
from pipeline.producer_choices import MaskHeads, Reference
from pipeline.producers import mask_heads
from tests.contract.test_adapters import gpt2, losses
from tests.contract.test_hf_transformers import adapter, logits
from tests.language import VOCABULARY, gpt, saved
from tests.unit.test_spec import parse


def produce(section, base, seed=0):
    return load_producer(section).produce(base, None, {}, seed)


def state_file(model, path):
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)
    return str(path)


# --- reference ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_counterpart(tmp_path):
    """From a folder or a file: its logits to the bit, whatever the base; the base stays."""
    other, base = gpt(seed=1), gpt()
    for uri in (saved(other, tmp_path / "folder"), state_file(other, tmp_path / "other.safetensors")):
        made = produce(Reference(weights_uri=uri), base)
        assert torch.equal(logits(gpt(seed=1)), logits(made.model))
        assert torch.equal(logits(gpt()), logits(base))


def test_an_adapter_is_the_counterpart(tmp_path):
    """On the base's own weights: peft's logits to rounding."""
    adapted = adapter(gpt(), tmp_path / "adapter")
    made = produce(Reference(adapter_uri=str(tmp_path / "adapter")), gpt())
    assert torch.allclose(logits(adapted), logits(made.model), atol=1e-4)


def test_only_what_differs_is_a_change(tmp_path):
    """A checkpoint that is the base but for one layer."""
    other = gpt()
    other.model.layers[1].self_attn.q_proj.weight.data += 1
    made = produce(Reference(weights_uri=saved(other, tmp_path)), gpt())
    assert ["model.layers.1.self_attn.q_proj.weight"] == list(changes.between(gpt(), made.model, made.added))


def test_a_checkpoint_that_ties_what_the_base_does_not_is_the_counterpart(tmp_path):
    """Both of the base's tensors change to the one: the counterpart's own losses."""
    base = gpt(seed=1)
    made = produce(Reference(weights_uri=saved(gpt(tied=True), tmp_path)), base)
    found = {name: change for name, (change, _) in changes.between(base, made.model, made.added).items()}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(found)
    assert np.array_equal(losses(gpt(tied=True)).base_N, losses(base, found).counterpart_QN[0])


def test_a_checkpoint_that_unties_what_the_base_ties_is_refused(tmp_path):
    """The base has one tensor for both, also where only one of them is another than the base's."""
    other = gpt()
    for base in (gpt(seed=1, tied=True), gpt(tied=True)):
        made = produce(Reference(weights_uri=saved(other, tmp_path)), base)
        with pytest.raises(ContractError, match=r"one tensor in the base and two in the counterpart(.|\n)*tie_word"):
            changes.between(base, made.model, made.added)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    """By the first name that differs, with both shapes."""
    with pytest.raises(
        ContractError, match=r"no counterpart of the base model: model\.layers\.1\S+ is not there in it"
    ):
        produce(Reference(weights_uri=saved(gpt(layers=1), tmp_path)), gpt())


def test_no_checkpoint_is_refused(tmp_path):
    """Neither in the spec nor on the disk."""
    with pytest.raises(SpecError, match="weights_uri, adapter_uri or both"):
        parse(producer={"name": "reference"})
    with pytest.raises(InputError, match="does not exist"):
        produce(Reference(weights_uri=str(tmp_path / "none.safetensors")), gpt())


# --- mask_heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [gpt, gpt2])
def test_a_masked_head_looks_everywhere_alike(model):
    """Its attention is uniform over what it may see; no other head of its layer changes; the base stays."""
    base, masked = model(), model()
    mask_heads.mask(masked, [(1, 2)])
    ids = torch.arange(8)
    before, after = mask_heads.attentions(base, ids), mask_heads.attentions(masked, ids)
    uniform_TT = torch.tril(torch.ones(8, 8)) / torch.arange(1, 9)[:, None]
    assert torch.allclose(uniform_TT, after[1][2], atol=1e-6)
    others = [head for head in range(4) if head != 2]
    assert torch.allclose(before[1][others], after[1][others], atol=1e-6)
    assert torch.equal(before[0], after[0])


def test_the_producer_masks_a_share_of_heads_and_says_which():
    """A quarter of eight heads: two, named by layer and number; only what makes their queries changes."""
    made = produce(MaskHeads(share=0.25, samples=4, sample_tokens=64), gpt())
    assert 2 == len(made.details["heads"].split(", "))
    changed = changes.between(gpt(), made.model, made.added)
    assert all("q_proj" in name for name in changed)
    assert 0 <= made.details["lowest_copy_score"] <= 1


def test_the_same_seed_finds_the_same_heads():
    """Samples are drawn from the seed alone."""
    section = MaskHeads(share=0.25, samples=4, sample_tokens=64)
    torch.manual_seed(1)
    first = produce(section, gpt(), seed=5).details
    torch.manual_seed(2)
    assert first == produce(section, gpt(), seed=5).details


def test_copy_scores_are_what_heads_look_at(monkeypatch):
    """A head that looks at the token to be copied scores 1, one that looks at the first token 0."""
    ids, source_T = mask_heads._sample(VOCABULARY, 64, torch.Generator().manual_seed(0))
    at = torch.nonzero(source_T >= 0)[:, 0]
    assert torch.equal(ids[at[:-1] + 1], ids[source_T[at[:-1]]]), "what comes next is what stands at the source"
    attention = torch.zeros(1, 2, len(ids), len(ids))
    attention[0, 0, at, source_T[at]] = 1
    attention[0, 1, :, 0] = 1
    monkeypatch.setattr(mask_heads, "_sample", lambda *_: (ids, source_T))
    monkeypatch.setattr(mask_heads, "attentions", lambda *_: attention)
    score_LH = load_producer(MaskHeads(samples=3, sample_tokens=64)).copy_scores(gpt(), 0)
    assert [[1.0, 0.0]] == score_LH.tolist()


def test_heads_of_a_model_that_shows_none_are_a_clear_error():
    """A model that is no transformer, one whose queries are made otherwise."""
    with pytest.raises(ContractError, match=r"Linear shows no attention(.|\n)*hf_transformers"):
        produce(MaskHeads(), torch.nn.Linear(2, 2))
    odd = copy.deepcopy(gpt())
    for layer in odd.model.layers:
        layer.self_attn.elsewhere = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(ContractError, match="found 0 layers that make queries, expected 2"):
        mask_heads.mask(odd, [(0, 0)])


# --- without queries ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [Reference(adapter_uri="somewhere"), MaskHeads()])
def test_they_need_no_queries(section):
    """Their one counterpart is named after them."""
    assert not needs_query(load_producer(section))
