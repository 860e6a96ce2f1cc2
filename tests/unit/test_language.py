"""Texts, conversations and token ids as sequences: what counts, what is cut or refused; and losses, against the models' own."""

import sys

import numpy as np
import pytest
import torch

from pipeline.batches import Batch
from pipeline.engine import LossEngine
from pipeline.errors import ContractError, InputError, SpecError
from pipeline.extensions import load_model, load_task
from pipeline.tasks import tokens
from tests.contract.test_adapters import gpt2
from tests.language import CHAT, CONTEXT, VOCABULARY, gpt, saved, sentences, t5, tokenizer
from tests.unit.test_spec import parse

TEXTS = sentences(40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal model with its tokenizer."""
    return saved(gpt(), tmp_path_factory.mktemp("gpt"))


def task(folder, **fields):
    """The task of a spec's section."""
    section = parse(task={"name": "causal_lm", "tokenizer_uri": folder, **fields}).task
    return load_task(section)


def objects(*values):
    out = np.empty(len(values), object)
    out[:] = values
    return out


def encode(task, *texts, **more):
    name = task.columns()[0].name
    return task.encode({name: objects(*texts), **{key: objects(*values) for key, values in more.items()}})


def own_loss(model, ids, labels=None):
    """The model's own `labels=` loss of one sequence."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=ids, labels=ids if labels is None else torch.tensor([labels])).loss.item()


def losses(task, model, sequences, batch_tokens=64):
    return sequences.of_examples(LossEngine(model, task, []).losses(sequences.batches(1, batch_tokens)).base_N)


# --- losses ------------------------------------------------------------------------------------------------------------


def test_a_text_has_the_models_own_loss(folder):
    """Alone, in whatever batch, in whatever bucket: 1e-5 from `labels=` of the model itself (truth 3)."""
    lm, model, plain = task(folder), gpt(), tokenizer()
    expected = [own_loss(model, plain(text)["input_ids"][:CONTEXT]) for text in TEXTS]
    for batch_tokens in (1, 100, 500, 10**6):
        got = losses(lm, model, encode(lm, *TEXTS), batch_tokens)
        assert expected == pytest.approx(got.tolist(), abs=1e-5)


def test_padding_on_the_left_changes_nothing(folder):
    """The same tokens behind padding, with mask and positions as a model needs them then: 1e-5."""
    lm, model = task(folder), gpt()
    sequences = encode(lm, *TEXTS[:6])
    right = {name: torch.from_numpy(array) for name, array in sequences.whole().items()}
    length_B, width = (right["labels"] != tokens.IGNORED).sum(dim=1).tolist(), right["labels"].shape[1]
    left = {
        name: torch.stack([torch.roll(row, width - n) for row, n in zip(rows, length_B, strict=True)])
        for name, rows in right.items()
    }
    left["attention_mask"] = (left["labels"] != tokens.IGNORED).long()
    left["position_ids"] = (left["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        # The first token of a text has no loss; on the left its label stands behind padding.
        first_B = torch.tensor([width - n for n in length_B])
        left["labels"][torch.arange(len(first_B)), first_B] = tokens.IGNORED
        assert lm.loss_B(model, right).tolist() == pytest.approx(lm.loss_B(model, left).tolist(), abs=1e-5)


def test_a_sum_is_the_mean_times_its_tokens(folder):
    """`reduction: sum`, and the number of tokens that goes into the scores."""
    mean, total, model = task(folder), task(folder, reduction="sum"), gpt()
    sequences = encode(mean, *TEXTS[:5])
    expected = losses(mean, model, sequences) * sequences.num_tokens_N
    assert expected.tolist() == pytest.approx(losses(total, model, encode(total, *TEXTS[:5])).tolist(), rel=1e-6)
    assert [len(tokenizer()(text)["input_ids"][:CONTEXT]) - 1 for text in TEXTS[:5]] == sequences.num_tokens_N.tolist()


def test_losses_of_tokens_add_up_to_the_loss(folder):
    """What is shaded on a page is what was scored."""
    lm, model = task(folder, reduction="sum"), gpt()
    batch = {name: torch.from_numpy(array) for name, array in encode(lm, *TEXTS[:4]).whole().items()}
    with torch.no_grad():
        assert lm.loss_B(model, batch).tolist() == pytest.approx(lm.token_losses_BT(model, batch).sum(dim=1).tolist())


class WithCap(torch.nn.Module):
    """A model whose logits are made otherwise than by its last layer alone."""

    def __init__(self, model, change):
        super().__init__()
        self.inner, self._change, self.config = model, change, model.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **inputs):
        return self._change(self.inner(**inputs).logits)


def reference(model, ids):
    logits_TV = model(input_ids=torch.tensor([ids]))
    return torch.nn.functional.cross_entropy(logits_TV[0, :-1], torch.tensor(ids[1:])).item()


def test_what_an_architecture_does_to_its_logits_is_done_here_too(folder):
    """Gemma's soft cap, by its name in the config: the loss of the capped logits, still in chunks."""
    lm, inner = task(folder), gpt()
    inner.config.final_logit_softcapping = 2.0
    model, ids = WithCap(inner, lambda logits: torch.tanh(logits / 2.0) * 2.0), tokenizer()(TEXTS[0])["input_ids"]
    with torch.no_grad():
        assert reference(model, ids) == pytest.approx(losses(lm, model, encode(lm, TEXTS[0]))[0], abs=1e-5)
    assert tokens._heads[model]


def test_a_model_that_makes_logits_its_own_way_is_asked_for_them(folder, capsys):
    """Nothing known does that to logits: they are taken as they come, with a notice, and the loss is right."""
    lm, ids = task(folder), tokenizer()(TEXTS[0])["input_ids"]
    model = WithCap(gpt(), lambda logits: logits**3)
    with torch.no_grad():
        assert reference(model, ids) == pytest.approx(losses(lm, model, encode(lm, TEXTS[0]))[0], abs=1e-5)
    assert "WithCap makes its logits in a way of its own" in capsys.readouterr().err


def test_a_model_that_looks_ahead_is_refused(folder):
    """BERT's, with a language model's head: padding on the right would change what it says of a text."""
    from transformers import BertConfig, BertLMHeadModel

    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    lm = task(folder)
    with pytest.raises(ContractError, match=r"BertLMHeadModel is not causal(.|\n)*is_decoder"):
        losses(lm, BertLMHeadModel(BertConfig(**small)).eval(), encode(lm, TEXTS[0]))
    decoder = BertLMHeadModel(BertConfig(**small, is_decoder=True)).eval()
    assert np.isfinite(losses(lm, decoder, encode(lm, TEXTS[0]))).all()


def test_a_model_with_dropout_is_looked_at_without(folder, capsys):
    """In train mode: still in chunks, still in train mode after, and with the random numbers that were there before."""
    lm, found = task(folder), []
    batch = {name: torch.from_numpy(array) for name, array in encode(lm, *TEXTS[:3]).whole().items()}
    model = gpt2().train()
    for _ in range(2):
        torch.manual_seed(7)
        found.append(lm.loss_B(model, batch).mean().item())
    assert found[0] == found[1]
    assert tokens._heads[model], "chunked"
    assert all(module.training for module in model.modules())


def test_chunks_of_any_size_give_the_same_losses_and_gradients(folder, monkeypatch):
    """One token at a time, or all: 1e-6; in a backward pass the logits are made again and the gradients are the same."""
    lm, found = task(folder), []
    batch = {name: torch.from_numpy(array) for name, array in encode(lm, *TEXTS[:3]).whole().items()}
    for chunk_bytes in (1, 7 * 4 * VOCABULARY, 1 << 30):
        monkeypatch.setattr(tokens, "CHUNK_BYTES", chunk_bytes)
        model = gpt()
        loss = lm.loss_B(model, batch).mean()
        loss.backward()
        found.append([loss.item(), *(parameter.grad.norm().item() for parameter in model.parameters())])
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[1], rel=1e-5)


def test_the_last_layer_comes_back_after_an_error(folder):
    """A forward pass that fails leaves the model as it was."""
    lm, model = task(folder), gpt()
    bad = Batch(np.arange(1), {"input_ids": np.array([[1, VOCABULARY]]), "labels": np.array([[1, 2]])})
    with pytest.raises(IndexError):
        LossEngine(model, lm, []).losses([bad])
    assert "forward" not in model.get_output_embeddings().__dict__
    assert own_loss(gpt(), [1, 2, 3]) == pytest.approx(own_loss(model, [1, 2, 3]))


# --- what counts -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_read_but_does_not_count(folder):
    """Labels of the prompt's tokens are masked, as one does for the model's own loss."""
    lm, model = task(folder, prompt="question"), gpt()
    prompt, answer = "Ada was born in", " Lisbon."
    sequences = encode(lm, answer, prompt=[prompt])
    ids, length = tokenizer()(prompt + answer)["input_ids"], len(tokenizer()(prompt)["input_ids"])
    assert len(ids) - length == sequences.num_tokens_N[0]
    labels = [tokens.IGNORED] * length + ids[length:]
    assert own_loss(model, ids, labels) == pytest.approx(losses(lm, model, sequences)[0], abs=1e-5)


def test_without_a_prompt_all_of_a_text_counts(folder):
    """An empty prompt is none: the same tokens count, with the same loss."""
    bare, prompted, model = task(folder), task(folder, prompt="question"), gpt()
    alone, empty = encode(bare, TEXTS[0]), encode(prompted, TEXTS[0], prompt=[""])
    assert alone.num_tokens_N.tolist() == empty.num_tokens_N.tolist()
    assert losses(bare, model, alone).tolist() == losses(prompted, model, empty).tolist()
    assert [False, True] == [column.optional for column in prompted.columns()]


def test_a_conversation_is_the_templates_text(folder):
    """All of it, or its last message alone."""
    talk = [{"role": "user", "content": "Where was Ada born?"}, {"role": "assistant", "content": "In Lisbon."}]
    whole = encode(task(folder, messages="talk"), talk)
    ids = tokenizer()("<user>Where was Ada born?\n<assistant>In Lisbon.\n")["input_ids"]
    assert [ids] == whole.whole()["input_ids"].tolist()
    answer = encode(task(folder, messages="talk", answer_only=True), talk)
    assert len(tokenizer()("In Lisbon.\n")["input_ids"]) == answer.num_tokens_N[0]


def test_a_conversation_that_is_none_is_refused_alone(folder, tmp_path):
    """By the template, or because no answer stands at its end; its neighbours stay."""
    strict = saved(
        gpt(), tmp_path, template="{% if messages[0].role != 'user' %}{{ raise_exception('roles!') }}{% endif %}" + CHAT
    )
    asked, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}
    sequences = encode(task(strict, messages="talk"), [asked, answer], [answer, asked], [asked])
    assert {1: "a conversation that the tokenizer's template refuses: roles!"} == sequences.bad
    assert [0, 1] == sequences.example_S.tolist()
    sequences = encode(task(folder, messages="talk", answer_only=True), [asked, answer], [answer], [answer, asked])
    assert [1, 2] == list(sequences.bad)
    assert all("last message is no answer" in why for why in sequences.bad.values())


def test_the_end_of_a_text_counts_if_asked(folder):
    """One more token, the tokenizer's end of text."""
    without, with_end = encode(task(folder), TEXTS[0]), encode(task(folder, end=True), TEXTS[0])
    assert without.num_tokens_N[0] + 1 == with_end.num_tokens_N[0]
    assert tokenizer().eos_token_id == with_end.whole()["input_ids"][0, -1]


def test_token_ids_need_no_tokenizer(tmp_path):
    """What is in the corpus is what the model gets; a prompt of ids is masked."""
    lm = load_task(parse(task={"name": "causal_lm", "tokens": "ids", "prompt": "before"}).task)
    sequences = lm.encode({"tokens": objects([5, 6]), "prompt": objects([3, 4])})
    assert [[3, 4, 5, 6]] == sequences.whole()["input_ids"].tolist()
    assert 2 == sequences.num_tokens_N[0]


def test_a_folder_of_token_ids_needs_no_tokenizer(tmp_path):
    """Nor one whose config does not say how long a text may be; tokens are then shown as numbers."""
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    lm = task(str(tmp_path), tokens="ids")
    sequences = encode(lm, list(range(49)), [3, 50])
    assert (48, 0) == (sequences.num_tokens_N[0], sequences.overlong)
    assert "token id 50" in sequences.bad[1]
    assert ["3 ", "4 "] == lm.token_texts([3, 4])


def test_a_tokens_space_is_shown(tmp_path):
    """SentencePiece writes it before a word, and decoding a word alone leaves it out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"?": 0, "\u2581Ada": 1, "\u2581sang": 2, ".": 3}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    made.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    assert [" Ada", " sang", "."] == task(str(tmp_path)).token_texts([1, 2, 3])


# --- too long ----------------------------------------------------------------------------------------------------------


def long_text():
    return " ".join(TEXTS[:8])


def test_a_longer_text_is_cut_and_counted(folder):
    """Its first tokens, as many as the model was made for."""
    sequences = encode(task(folder), long_text(), TEXTS[0])
    assert CONTEXT == sequences.whole()["input_ids"].shape[1]
    assert 1 == sequences.overlong


def test_a_longer_text_in_windows_has_every_token_once(folder):
    """Each but the very first counts in exactly one window, with the token before it as context; the sums are one example's."""
    lm, model = task(folder, overlong="windows", max_tokens=10, reduction="sum"), gpt()
    ids = tokenizer()(long_text())["input_ids"]
    sequences = encode(lm, TEXTS[0], long_text())
    assert len(ids) - 1 == sequences.num_tokens_N[1]
    parts = [ids[start : start + 10] for start in range(0, len(ids) - 1, 9)]
    expected = sum(own_loss(model, part) * (len(part) - 1) for part in parts)
    assert expected == pytest.approx(losses(lm, model, sequences)[1], rel=1e-5)
    assert 2 == sequences.overlong


def test_a_longer_text_is_refused_if_asked(folder):
    """The reason has both lengths."""
    sequences = encode(task(folder, overlong="reject"), TEXTS[0], long_text(), TEXTS[0])
    assert [1] == list(sequences.bad)
    assert f"tokens, more than {CONTEXT}" in sequences.bad[1]
    assert [0, 1] == sequences.example_S.tolist()


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([7], "1 tokens, none with a loss"),
        ([7, VOCABULARY], f"token id {VOCABULARY}, outside of the model's {VOCABULARY} tokens"),
        ([-1, 7], "token id -1"),
    ],
)
def test_what_has_no_loss_is_refused(folder, ids, why):
    """A single token, ids that the model does not know; their neighbours stay."""
    sequences = encode(task(folder, tokens="ids"), [1, 2, 3], ids, [4, 5])
    assert why in sequences.bad[1]
    assert [2, 1] == sequences.num_tokens_N.tolist()


def test_a_text_that_is_cut_within_its_prompt_has_no_loss(folder):
    """Nothing of the answer is left."""
    sequences = encode(task(folder, prompt="question"), TEXTS[0], prompt=[long_text()])
    assert "none with a loss" in sequences.bad[0]


# --- specs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"text": "a", "tokens": "b"}, "one of text, messages and tokens"),
        ({"messages": "a", "prompt": "b"}, "answer_only"),
        ({"answer_only": True}, "goes with messages"),
        ({"max_tokens": 1}, "greater than or equal to 2"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(fields, why):
    """Before anything is read."""
    with pytest.raises(SpecError, match=why):
        parse(task={"name": "causal_lm", **fields})


def test_text_without_a_tokenizer_is_refused():
    """The message names the field, and the way without one."""
    with pytest.raises(SpecError, match=r"tokenizer_uri: text needs a tokenizer(.|\n)*task\.tokens"):
        load_task(parse(task={"name": "causal_lm"}).task)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    """A model alone, an empty folder, a tokenizer without a template."""
    gpt().save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"no tokenizer can be read from \S+bare"):
        task(str(tmp_path / "bare"))
    with pytest.raises(InputError, match=r"is no folder of a model: no config\.json"):
        task(str(tmp_path))
    with pytest.raises(InputError, match="has no chat template"):
        task(saved(gpt(), tmp_path / "plain", template=None), messages="talk")


def test_the_models_tokenizer_and_config_are_the_tasks(folder, tmp_path):
    """With loader hf_transformers there is nothing to say; a tokenizer from elsewhere does not say how long a text may be."""
    model = {"loader": "hf_transformers", "weights_uri": folder}
    for name in ("causal_lm", "seq2seq"):
        section = parse(model=model, task={"name": name}).task
        assert [folder, folder] == [section.tokenizer_uri, section.config_uri]
    elsewhere = tokenizer()
    elsewhere.model_max_length = 8
    elsewhere.save_pretrained(tmp_path)
    section = parse(model=model, task={"name": "causal_lm", "tokenizer_uri": str(tmp_path)}).task
    assert CONTEXT == encode(load_task(section), long_text()).whole()["input_ids"].shape[1]


def test_more_tokens_than_the_model_has_places_for_are_refused(folder):
    """Before a table of positions is left at its end."""
    with pytest.raises(SpecError, match=rf"max_tokens: got {CONTEXT + 1}, the model has places for {CONTEXT}"):
        task(folder, max_tokens=CONTEXT + 1)


def test_a_package_that_is_missing_is_named_with_its_extra(folder, monkeypatch):
    """By the task as by the loader."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SpecError, match=r"task: (.|\n)*pip install 'mirrorscope\[hf\]'"):
        task(folder)
    with pytest.raises(SpecError, match=r"model\.loader hf_transformers: (.|\n)*mirrorscope\[hf\]"):
        load_model(parse(model={"loader": "hf_transformers", "weights_uri": folder}).model, "cpu", 0)


# --- sequence to sequence ----------------------------------------------------------------------------------------------


def test_a_targets_loss_is_the_models_own(tmp_path):
    """T5: alone and in batches, 1e-5 from `labels=`; the source does not count."""
    uri = saved(t5(), tmp_path)
    spec = parse(model={"loader": "hf_transformers", "weights_uri": uri}, task={"name": "seq2seq"})
    lm, model, plain = load_task(spec.task), load_model(spec.model, "cpu", 0), tokenizer()
    targets = sentences(12, seed=1)
    sequences = lm.encode({"text": objects(*TEXTS[:12]), "target": objects(*targets)})
    expected = []
    for text, target in zip(TEXTS[:12], targets, strict=True):
        inputs, labels = plain(text, return_tensors="pt"), plain(target, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(model(input_ids=inputs["input_ids"], labels=labels).loss.item())
    for batch_tokens in (1, 200, 10**6):
        assert expected == pytest.approx(losses(lm, model, sequences, batch_tokens).tolist(), abs=1e-5)
    assert tokens._heads[model], "chunked"
    assert [len(plain(target)["input_ids"]) for target in targets] == sequences.num_tokens_N.tolist()


def test_targets_are_as_long_as_sources_may_be(folder):
    """If nothing else is said; both are cut, and the example counts once."""
    text = objects(long_text())
    for fields, expected in (({}, CONTEXT), ({"max_tokens": 9}, 9), ({"max_tokens": 9, "max_target_tokens": 5}, 5)):
        lm = load_task(parse(task={"name": "seq2seq", "tokenizer_uri": folder, **fields}).task)
        sequences = lm.encode({"text": text, "target": text})
        assert [expected] == sequences.num_tokens_N.tolist()
        assert fields.get("max_tokens", CONTEXT) == sequences.columns["input_ids"].length_S[0]
        assert 1 == sequences.overlong


def test_a_model_without_a_decoder_is_no_sequence_to_sequence_model(folder):
    """The message says which task it is for."""
    lm = load_task(parse(task={"name": "seq2seq", "tokenizer_uri": folder}).task)
    sequences = lm.encode({"text": objects("Who?"), "target": objects("Ada.")})
    with pytest.raises(ContractError, match=r"no decoder_start_token_id(.|\n)*causal_lm"):
        losses(lm, gpt(), sequences)


# --- positions ---------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PLACES = 20


def decoder(kind, **fields):
    """A causal model of one of transformers' classes, with 20 positions by its config."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{"max_position_embeddings": PLACES, **SMALL, **fields})
    return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()


@pytest.mark.parametrize(
    ("kind", "fields", "places"),
    [
        ("Roberta", {"is_decoder": True, "intermediate_size": 32}, 18),
        ("XLMRoberta", {"is_decoder": True, "intermediate_size": 32, "pad_token_id": 3}, 16),
        ("Data2VecText", {"is_decoder": True, "intermediate_size": 32}, 18),
        ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16}, 20),
        ("BioGpt", {"intermediate_size": 32}, 20),
        ("GPT2", {"bos_token_id": 0, "eos_token_id": 0}, 20),
    ],
)
def test_texts_are_cut_to_the_positions_that_a_model_has(kind, fields, places, tmp_path):
    """Which its config's number is not where rows of the table stand for padding; the loss is the model's own."""
    model = decoder(kind, **fields)
    folder = saved(model, tmp_path)
    lm = task(folder)
    sequences = encode(lm, long_text())
    assert (places, 1) == (sequences.whole()["input_ids"].shape[1], sequences.overlong)
    expected = own_loss(model, tokenizer()(long_text())["input_ids"][:places])
    assert expected == pytest.approx(losses(lm, model, sequences)[0], abs=1e-5)
    with pytest.raises(SpecError, match=rf"max_tokens: got {places + 1}, the model has places for {places}"):
        task(folder, max_tokens=places + 1)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": PLACES},
    ],
)
def test_positions_that_a_config_scales_serve_as_many_tokens_as_are_asked_for(rope, tmp_path):
    """Rotary positions are computed: by default a text is as long as the config says, by the spec it may be longer."""
    rope = {"rope_theta": 10000.0, **rope}
    model = decoder("Llama", num_key_value_heads=2, intermediate_size=32, rope_parameters=rope)
    folder = saved(model, tmp_path)
    assert PLACES == encode(task(folder), long_text()).whole()["input_ids"].shape[1]
    lm = task(folder, max_tokens=4 * PLACES)
    ids = tokenizer()(long_text())["input_ids"][: 4 * PLACES]
    assert own_loss(model, ids) == pytest.approx(losses(lm, model, encode(lm, long_text()))[0], abs=1e-5)


def test_source_and_target_are_cut_to_the_positions_of_encoder_and_decoder(tmp_path):
    """LED's differ; more than there are is refused before any text is read."""
    from transformers import LEDConfig, LEDForConditionalGeneration

    sides = {
        f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    places = {"max_encoder_position_embeddings": 40, "max_decoder_position_embeddings": PLACES}
    config = LEDConfig(vocab_size=VOCABULARY, d_model=16, attention_window=[4], **sides, **places)
    folder = saved(LEDForConditionalGeneration(config), tmp_path)

    def seq2seq(**fields):
        return load_task(parse(task={"name": "seq2seq", "tokenizer_uri": folder, **fields}).task)

    sequences = seq2seq().encode({"text": objects(long_text()), "target": objects(long_text())})
    assert [40, PLACES] == [sequences.columns[name].length_S[0] for name in ("input_ids", "labels")]
    for name, there in (("max_tokens", 40), ("max_target_tokens", PLACES)):
        with pytest.raises(SpecError, match=rf"task\.{name}: got {there + 1}, the model has places for {there}"):
            seq2seq(**{name: there + 1})


def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path):
    """ByT5's: a prompt's bytes do not count; one of another class without its files is none."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    lm = task(str(tmp_path / "bytes"), prompt="ask")
    sequences = encode(lm, "Öl", "ab", prompt=["eh", ""])
    assert [len("Öl".encode()) + 1, len("ab") + 1 - 1] == sequences.num_tokens_N.tolist()  # an end; a first has no loss
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "none" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(InputError, match="there is no vocabulary in it"):
        task(str(tmp_path / "none"))
