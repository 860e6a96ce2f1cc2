"""A causal language model small enough to be trained hundreds of times: GPT-NeoX's architecture, two layers of width 64."""

from __future__ import annotations

import torch
from torch import nn

VOCABULARY, WIDTH, LAYERS, CONTEXT = 1000, 64, 2, 64


def untrained() -> nn.Module:
    """The model with its first weights, always the same."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPTNeoXForCausalLM(config)
