"""The smallest real language models: tokenizers and checkpoints in Hugging Face format, made from configs, in a folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

VOCABULARY, CONTEXT, WIDTH = 300, 48, 32
_NAMES = ("Ada", "Berta", "Carlo", "Dora", "Emil", "Frida")
_PLACES = ("Lisbon", "Oslo", "Quito", "Tunis", "Vienna", "Zagreb")
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def sentences(number: int, seed: int = 0) -> list[str]:
    """Texts of very different lengths."""
    draw = random.Random(seed)

    def one() -> str:
        return f"{draw.choice(_NAMES)} was born in {draw.choice(_PLACES)} and lives in {draw.choice(_PLACES)}."

    return [" ".join(one() for _ in range(draw.choice((1, 1, 1, 2, 3)))) for _ in range(number)]


def tokenizer(template: str | None = CHAT, texts: list[str] | None = None, vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE trained on texts, `sentences` if none are given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(texts or sentences(200), trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>")
    found.chat_template = template
    return found


def gpt(seed: int = 0, layers: int = 2, tied: bool = False) -> torch.nn.Module:
    """A causal model: Llama's architecture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # else an untrained model says the same of every token
    )
    return LlamaForCausalLM(config).eval()


def t5(seed: int = 0) -> torch.nn.Module:
    """A sequence-to-sequence model: T5's architecture."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=1,
        pad_token_id=1,
        eos_token_id=0,
        initializer_factor=1.5,
    )
    return T5ForConditionalGeneration(config).eval()


def saved(model: torch.nn.Module, folder: Path, template: str | None = CHAT) -> str:
    """A model and its tokenizer in a folder; the folder."""
    model.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return str(folder)


def spec_tree(folder: Path, uri: Path) -> dict[str, Any]:
    """A spec over such a model and the corpus and queries beside it in Parquet, as a YAML tree, to be changed at will."""
    return {
        "run": {"uri": str(uri)},
        "model": {"loader": "hf_transformers", "weights_uri": str(folder / "model")},
        "task": {"name": "causal_lm"},
        "corpus": {"uri": str(folder / "corpus.parquet"), "example_id": "id"},
        "queries": {"uri": str(folder / "queries.parquet")},
        "score": {"shard_rows": 8, "batch_tokens": 64},
        "rank": {"k": 5},
    }
