"""AttentionInfluence (2505.07293): the counterpart is the base with its retrieval heads made to look everywhere alike.

Shapes: S samples, T tokens, L layers, H heads of a layer.

A head is a retrieval head if it copies: while the model writes out a value that stood behind the same key before, the head looks
most at the very token that is copied. Its copy score is the share of copied tokens for which it does. Masking it means zero
queries: all its attention logits are then zero, and its attention uniform over what it may see. That is a change of weights,
so nothing in the engine knows of heads.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ContractError
from ..tasks.base import Batch, Task
from .base import Produced

KEY_TOKENS, VALUE_TOKENS = 4, 12
UNIFORM_TOLERANCE = 1e-3
_QUERIES = re.compile(r"(?:^|\.)(q_proj|c_attn)$")
"""Layers that make queries: of their own (Llama and its many kin), or beside keys and values (GPT-2)."""


@dataclass(frozen=True, kw_only=True)
class MaskHeads:
    """See Producer; the spec's fields of the same names say what each means."""

    share: float
    samples: int
    sample_tokens: int
    direction: int = 1
    needs_query: bool = False

    def produce(self, base: nn.Module, task: Task, query: Batch, seed: int) -> Produced:
        """See Producer.

        Raises:
            ContractError: The model shows no attention, or makes its queries in a way that is not known.
        """
        model = copy.deepcopy(base)
        score_LH = self.copy_scores(model, seed)
        chosen = retrieval_heads(score_LH, self.share)
        mask(model, chosen)
        _require_uniform(model, chosen, seed)
        heads = ", ".join(f"{layer}.{head}" for layer, head in chosen)
        lowest = float(min(score_LH[layer, head] for layer, head in chosen))
        return Produced(model, 0, {"heads": heads, "lowest_copy_score": lowest})

    def copy_scores(self, model: nn.Module, seed: int) -> Tensor:
        """Copy score of every head: [L, H], from 0 to 1.

        Raises:
            ContractError: The model shows no attention.
        """
        config: Any = _config(model)
        longest = getattr(config, "max_position_embeddings", None) or self.sample_tokens
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(self.samples):
            ids, source_T = _sample(config.vocab_size, min(self.sample_tokens, longest), generator)
            at_T = torch.nonzero(source_T >= 0)[:, 0]
            looks_LHT = torch.stack([layer_HTT[:, at_T].argmax(dim=-1) for layer_HTT in attentions(model, ids)])
            found.append((looks_LHT == source_T[at_T].to(looks_LHT.device)).float().mean(dim=-1))
        return torch.stack(found).mean(dim=0)


def _sample(vocabulary: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A sequence of keys and values, and one of the keys again with its value behind.

    Returns:
        Token ids [T]; and for each place [T] the place of the token that is to be copied next, -1 where none is.
    """
    pairs = max(2, (tokens - KEY_TOKENS - VALUE_TOKENS) // (KEY_TOKENS + VALUE_TOKENS))
    length = KEY_TOKENS + VALUE_TOKENS
    pairs_P = torch.randint(vocabulary, (pairs, length), generator=generator)
    asked = int(torch.randint(pairs, (), generator=generator))
    ids = torch.cat([pairs_P.flatten(), pairs_P[asked]])
    source_T = torch.full_like(ids, -1)
    first = pairs * length + KEY_TOKENS - 1  # the key's last token: what comes next is the value's first
    source_T[first : first + VALUE_TOKENS] = asked * length + KEY_TOKENS + torch.arange(VALUE_TOKENS)
    return ids, source_T


def _config(model: nn.Module) -> Any:
    """A model's config. Raises ContractError for a model that is not transformers'."""
    if not hasattr(model, "set_attn_implementation"):
        raise ContractError(
            f"{type(model).__name__} shows no attention", "mask_heads works on models of loader hf_transformers"
        )
    return model.config


def attentions(model: Any, ids: Tensor) -> list[Tensor]:
    """Attention of every head on a sequence: L of [H, T, T]. Raises ContractError if the model does not show it."""
    config, device = _config(model), next(model.parameters()).device
    before = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model(input_ids=ids[None].to(device), output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)
    if not found or any(layer is None for layer in found):
        raise ContractError(f"{type(model).__name__} shows no attention")
    return [layer[0] for layer in found]


def retrieval_heads(score_LH: Tensor, share: float) -> list[tuple[int, int]]:
    """(layer, head) of the top share of all heads by copy score, at least one; ties fall to the earlier."""
    number = max(1, round(share * score_LH.numel()))
    order = torch.argsort(score_LH.flatten(), descending=True, stable=True)[:number].tolist()
    return sorted(divmod(place, score_LH.shape[1]) for place in order)


def mask(model: nn.Module, heads: list[tuple[int, int]]) -> None:
    """Make heads look everywhere alike, in place, by zeroing what makes their queries. Raises ContractError."""
    config: Any = model.config
    layers = [layer for name, layer in model.named_modules() if _QUERIES.search(name)]
    if len(layers) != config.num_hidden_layers:
        raise ContractError(
            f"{type(model).__name__}: found {len(layers)} layers that make queries, expected {config.num_hidden_layers}",
            "mask_heads knows q_proj and c_attn",
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        for number, head in heads:
            layer: Any = layers[number]
            rows = slice(head * width, (head + 1) * width)
            if isinstance(layer, nn.Linear):
                layer.weight[rows] = 0
            else:  # GPT-2's Conv1D is transposed
                layer.weight[:, rows] = 0
            if layer.bias is not None:
                layer.bias[rows] = 0


def _require_uniform(model: nn.Module, heads: list[tuple[int, int]], seed: int) -> None:
    """See that masked heads look everywhere alike. Raises ContractError."""
    config: Any = model.config
    ids = torch.randint(config.vocab_size, (16,), generator=torch.Generator().manual_seed(seed))
    attention = attentions(model, ids)
    expected_TT = torch.tril(torch.ones(16, 16)) / torch.arange(1, 17)[:, None]
    for layer, head in heads:
        if (attention[layer][head].float().cpu() - expected_TT).abs().max() > UNIFORM_TOLERANCE:
            raise ContractError(
                f"{type(model).__name__}: head {head} of layer {layer} is not uniform without its queries",
                "its attention adds something of its own, as relative positions: mask_heads cannot mask it",
            )
