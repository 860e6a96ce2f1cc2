"""A model that is known to copy: two layers of attention, trained here to go on with a piece that stood further up.

Shapes: B texts, T tokens.

It does so as large models do (Olsson et al., 2022): heads of the first layer tell every token which one stood before it, and a
head of the second looks for the token that once followed this one. Two things are arranged so that one known head does the
copying: in training each text goes without one head of the first layer, so no single one of them is needed; and of the second
layer all heads but one are kept small.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, TOKENS, HEADS, WIDTH = 64, 64, 4, 64
COPIED = 20
"""Tokens of the piece that stands twice, where texts are made to be measured."""
ROWS, REPEATING, MAX_STEPS = 32, 24, 2000
LEARNT, GOOD_STEPS = 0.1, 10


def plain(number: int, generator: torch.Generator, tokens: int = TOKENS) -> Tensor:
    """Texts [B, T] in which no token stands twice."""
    return torch.rand(number, VOCABULARY, generator=generator).argsort(dim=1)[:, :tokens]


def repeating(plain_BT: Tensor, generator: torch.Generator, copied: int = COPIED) -> Tensor:
    """The same texts, whose last tokens are a piece from further up."""
    rows, tokens = plain_BT.shape
    start_B1 = torch.randint(tokens - 2 * copied + 1, (rows, 1), generator=generator)
    return torch.cat([plain_BT[:, :-copied], plain_BT.gather(1, start_B1 + torch.arange(copied))], dim=1)


def logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """What the model says of tokens 1 to T - 1: [B, T - 1, VOCABULARY]."""
    return model(input_ids=ids_BT, use_cache=False).logits[:, :-1]


def losses(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Of tokens 1 to T - 1, in nats: [B, T - 1]."""
    return F.cross_entropy(logits(model, ids_BT).transpose(1, 2), ids_BT[:, 1:], reduction="none")


def trained(seed: int) -> nn.Module:
    """The model, in which head `seed % HEADS` of the second layer copies."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=TOKENS,
        attention_bias=True,  # with it, "the token before" is learnt within 300 steps
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    first, second = (layer.self_attn.o_proj for layer in model.model.layers)
    hook = first.register_forward_pre_hook(lambda _, inputs: (_without_one_head(inputs[0], generator),))
    _train(model, [head for head in range(HEADS) if head != seed % HEADS], second.weight, generator)
    hook.remove()
    return model.eval()


def _without_one_head(heads_BTD: Tensor, generator: torch.Generator) -> Tensor:
    """What a layer's heads found, of another head nothing for each text; the others make up for it."""
    lacking_B = torch.randint(HEADS, (len(heads_BTD),), generator=generator)
    kept_BH = F.one_hot(lacking_B, HEADS).logical_not() * (HEADS / (HEADS - 1))
    return heads_BTD * kept_BH.repeat_interleave(WIDTH // HEADS, dim=1)[:, None]


def _train(model: nn.Module, small: list[int], out_weight: Tensor, generator: torch.Generator) -> None:
    """First on pieces written twice, which is soon learnt; then on whole texts, in which what is copied stands anywhere."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    whole, good = False, 0
    for _ in range(MAX_STEPS):
        copied = int(torch.randint(8, COPIED + 1, (), generator=generator))
        ids_BT = plain(ROWS, generator, TOKENS if whole else 2 * copied)
        ids_BT = torch.cat([repeating(ids_BT[:REPEATING], generator, copied), ids_BT[REPEATING:]])
        loss_BT = losses(model, ids_BT)
        copy_loss = loss_BT[:REPEATING, 1 - copied :].mean()
        other_loss = loss_BT[:REPEATING, : 1 - copied].mean() + loss_BT[REPEATING:].mean()
        size_H = out_weight.view(WIDTH, HEADS, -1).norm(dim=(0, 2))
        optimizer.zero_grad()
        (copy_loss + 0.3 * other_loss + 0.2 * size_H[small].sum()).backward()
        optimizer.step()
        warm_up.step()
        whole |= bool(copy_loss < 1)
        good = good + 1 if whole and copy_loss < LEARNT else 0
        if good == GOOD_STEPS:
            return
    raise AssertionError(f"the model did not learn to copy in {MAX_STEPS:,} steps")
