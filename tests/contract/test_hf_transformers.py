"""Loader hf_transformers: weights come back to the bit, what does not fit is refused by name, no code in a folder is run."""

import json
import os
import sys
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch

from jobs.seaweed import upload
from pipeline.choices import HfTransformers, TorchModule
from pipeline.errors import ContractError, InputError, SpecError
from pipeline.extensions import load_model, load_task
from tests.contract.test_loaders import Payload, same_bits
from tests.language import gpt, saved, t5
from tests.unit.test_spec import parse


def load(uri, **fields):
    return load_model(HfTransformers(weights_uri=str(uri), **fields), "cpu", 0)


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def adapter(model, folder, **fields):
    """A LoRA adapter with weights of its own, saved in a folder; the adapted model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    targets = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **fields}
    adapted = get_peft_model(model, LoraConfig(**targets)).eval()
    adapted.save_pretrained(folder)
    return adapted


def logits(model):
    ids = torch.arange(10)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("model", [gpt, t5])
def test_weights_come_back_to_the_bit(model, tmp_path):
    """Causal and sequence-to-sequence; in eval mode."""
    saved(model(), tmp_path)
    loaded = load(tmp_path)
    assert same_bits(model().state_dict(), loaded.state_dict())
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_model_computes_in_the_specs_dtype(dtype, tmp_path):
    """Whatever the file's."""
    saved(gpt(), tmp_path)
    assert {getattr(torch, dtype)} == {parameter.dtype for parameter in load(tmp_path, dtype=dtype).parameters()}


def test_a_model_made_here_is_the_same_through_both_loaders(tmp_path):
    """A factory with a state dict, and a folder: the same logits to the bit."""
    saved(gpt(), tmp_path)
    section = TorchModule(
        factory="tests.language:gpt", arguments={"seed": 3}, weights_uri=f"{tmp_path}/all.safetensors"
    )
    state = {name: tensor.clone() for name, tensor in gpt().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "all.safetensors")
    from_factory = load_model(section, "cpu", 0)
    (tmp_path / "all.safetensors").unlink()
    assert torch.equal(logits(from_factory), logits(load(tmp_path)))


def test_weights_that_do_not_fit_are_listed_by_name(tmp_path):
    """Missing, unexpected and misshaped names stand in one message that names the folder."""
    saved(gpt(), tmp_path)
    state = weights(tmp_path)
    del state["model.norm.weight"]
    state |= {"ghost": torch.zeros(7), "model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 5)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ContractError, InputError)) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "q_proj.weight" in str(caught.value)


@pytest.mark.parametrize(("change", "why"), [("drop", "missing model.norm.weight"), ("add", "unexpected ghost")])
def test_weights_that_are_missing_or_too_many_are_refused(change, why, tmp_path):
    """Nothing is drawn at random to fill a gap."""
    saved(gpt(), tmp_path)
    state = weights(tmp_path)
    if change == "drop":
        del state["model.norm.weight"]
    else:
        state["ghost"] = torch.zeros(7)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ContractError, match=why):
        load(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    """An encoder has no next token; a name that nobody knows."""
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    with pytest.raises(ContractError, match=r"no language model|do not fit"):
        load(tmp_path / "bert")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(InputError, match="no-such-model"):
        load(tmp_path / "odd")


def test_a_folder_without_safetensors_is_refused(tmp_path):
    """Pickled weights are never opened: their code does not run."""
    saved(gpt(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    proof = tmp_path / "proof"
    torch.save({"x": Payload(proof)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load(tmp_path)
    assert not proof.exists()


CODE = """
from pathlib import Path
Path({proof!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """`with_code(file, **fields)`: a model's folder with these fields in a file of it, and code that would leave `proof`.

    Standard input is a terminal on which somebody has typed yes.
    """
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    master, terminal = os.openpty()
    os.write(master, b"y\n" * 4)
    folder, proof = Path(saved(gpt(), tmp_path / "model")), tmp_path / "proof"
    (folder / "own.py").write_text(CODE.format(proof=str(proof)))

    def change(name, **fields):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **fields}))
        return str(folder), proof

    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield change
    os.close(master)


OWN = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}


def test_a_model_that_asks_for_code_is_refused_on_a_terminal_too(with_code):
    """With a sentence that names the file; transformers, left alone, asks there, and runs it on one key."""
    folder, proof = with_code("config.json", model_type="own", auto_map=OWN)
    with pytest.raises(
        InputError, match=r"code of its own, which is never run \(auto_map in config\.json: .*own\.Config"
    ):
        load(folder)
    assert not proof.exists()
    from transformers import AutoConfig

    left_alone = AutoConfig.from_pretrained
    left_alone(folder)
    assert proof.exists()  # the code was real, and somebody had said yes


def test_a_tokenizer_that_asks_for_code_is_refused_on_a_terminal_too(with_code):
    """As the model is."""
    folder, proof = with_code(
        "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Tokenizer", None]}
    )
    with pytest.raises(InputError, match=r"code of its own, which is never run \(auto_map in tokenizer_config\.json"):
        load_task(parse(task={"name": "causal_lm", "tokenizer_uri": folder}).task)
    assert not proof.exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run(with_code):
    """Many folders name both: the class that transformers has is taken, and the weights fit it."""
    folder, proof = with_code("config.json", auto_map=OWN)
    with_code("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})
    assert torch.equal(logits(gpt()), logits(load(folder)))
    load_task(parse(task={"name": "causal_lm", "tokenizer_uri": folder}).task)
    assert not proof.exists()


def test_a_model_gets_the_attention_that_transformers_has_for_it(tmp_path):
    """sdpa where there is one, else eager; a kernel that its config names is not asked for. By the spec: refused by name."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    Gemma2ForCausalLM(
        Gemma2Config(**small, num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0)
    ).save_pretrained(tmp_path / "gemma2")
    assert "eager" == load(tmp_path / "gemma2").config._attn_implementation
    with pytest.raises(SpecError, match=r"model\.attention: transformers has no sdpa for Gemma2ForCausalLM") as caught:
        load(tmp_path / "gemma2", attention="sdpa")
    assert "leave model.attention out" in caught.value.hint
    folder = Path(saved(gpt(), tmp_path / "gpt"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "somebody/kernel"}))
    assert "sdpa" == load(folder).config._attn_implementation
    assert "eager" == load(folder, attention="eager").config._attn_implementation


def test_an_adapter_in_place_of_a_model_is_refused_with_the_field_for_it(tmp_path):
    """An adapter's folder has no config of a model."""
    adapter(gpt(), tmp_path)
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load(tmp_path)
    assert "model.adapter_uri" in caught.value.hint


def test_damaged_weights_are_refused(tmp_path):
    """Half a file."""
    saved(gpt(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load(tmp_path)


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_no_folder_is_refused(where, tmp_path):
    """Nothing there, or nothing in it: what is missing, and how to make it."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no folder of a model") as caught:
        load(tmp_path / where)
    assert "save_pretrained" in caught.value.hint


def test_an_adapter_is_merged_into_the_base(tmp_path):
    """The logits are those of PEFT's own model, to rounding."""
    saved(gpt(), tmp_path / "base")
    adapted = adapter(gpt(), tmp_path / "adapter")
    got = logits(load(tmp_path / "base", adapter_uri=str(tmp_path / "adapter")))
    assert not torch.allclose(logits(gpt()), got)
    assert torch.allclose(logits(adapted), got, atol=1e-4)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    """Its shapes, or the layers that it is for."""
    saved(gpt(layers=1), tmp_path / "base")
    adapter(t5(), tmp_path / "adapter", target_modules=["q", "v"])
    with pytest.raises((ContractError, InputError), match="adapter"):
        load(tmp_path / "base", adapter_uri=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="no folder of a model"):
        load(tmp_path / "base", adapter_uri=str(tmp_path / "none"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "fields", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_adapters_of_all_kinds_are_whole(fields, tmp_path):
    """Layers, whole modules, embeddings: none is missed where none is missing."""
    saved(gpt(), tmp_path / "base")
    adapted = adapter(gpt(), tmp_path / "adapter", **fields)
    assert torch.allclose(
        logits(adapted), logits(load(tmp_path / "base", adapter_uri=str(tmp_path / "adapter"))), atol=1e-4
    )


def test_an_adapter_whose_names_are_others_is_refused(tmp_path):
    """As one saved from another class of model: peft would leave the model as it is, and only warn."""
    saved(gpt(), tmp_path / "base")
    adapter(gpt(), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {
        name.replace("model.model.", "model."): tensor for name, tensor in safetensors.torch.load_file(path).items()
    }
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ContractError, match=r"missing base_model\.model\.model\.layers\.0\S+lora_A"):
        load(tmp_path / "base", adapter_uri=str(tmp_path / "adapter"))


def test_a_folder_on_a_store_is_copied_once(s3, tmp_path, monkeypatch):
    """From s3:// it is the same model; the copy is shared; a folder that changed is copied anew."""
    monkeypatch.setenv("MIRRORSCOPE_CACHE", str(tmp_path / "cache"))
    saved(gpt(), tmp_path / "model")
    uri = s3.prefix("model")
    for path in sorted(Path(tmp_path / "model").iterdir()):
        upload(path, f"{uri}/{path.name}")
    assert torch.equal(logits(gpt()), logits(load(uri)))
    assert torch.equal(logits(gpt()), logits(load(uri)))
    assert 1 == len(list((tmp_path / "cache").iterdir()))
    saved(gpt(seed=1), tmp_path / "other")
    upload(tmp_path / "other" / "model.safetensors", f"{uri}/model.safetensors")
    assert torch.equal(logits(gpt(seed=1)), logits(load(uri)))
    assert 2 == len(list((tmp_path / "cache").iterdir()))


@pytest.fixture
def in_memory(tmp_path, monkeypatch):
    """URI of a model's folder on a store that is in memory; copies go to a folder of this test."""
    monkeypatch.setenv("MIRRORSCOPE_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.put(f"{saved(gpt(), tmp_path / 'model')}/", "/gpt/", recursive=True)
    yield "memory://gpt"
    fs.rm("/gpt", recursive=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_copy_that_was_changed_is_never_loaded(in_memory, tmp_path, name):
    """One bit of the weights, another config, another tokenizer: it is replaced, and the model is the folder's."""
    load(in_memory)
    (path,) = (tmp_path / "cache").glob(f"*/files/{name}")
    if name == "config.json":
        path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1.0'))
    else:
        data = bytearray(path.read_bytes())
        data[-3] ^= 64
        path.write_bytes(data)
    changed = path.read_bytes()
    assert torch.equal(logits(gpt()), logits(load(in_memory)))
    assert changed != path.read_bytes()
