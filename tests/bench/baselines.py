"""What attribution of texts is compared with: words in common, like hidden states, gradients that point the same way.

Shapes: Q queries, N training texts, D width. Every one returns scores [Q, N], higher = more to do with the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from pipeline.batches import Sequences
from pipeline.tasks.language import CausalLM

BATCH_TOKENS = 4096


def bm25(texts: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """Okapi BM25 by the library bm25s, with its defaults and its English stop words."""
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize(list(queries), stopwords="en", return_ids=False, show_progress=False)
    return np.stack([index.get_scores(each) for each in words])


def chance(texts: int, queries: int, seed: int = 0) -> np.ndarray:
    """Uniform noise."""
    return np.random.default_rng(seed).random((queries, texts))


def hidden_states(model: nn.Module, texts: Sequences, queries: Sequences) -> np.ndarray:
    """Cosine of the mean hidden states before the last layer."""
    text_ND, query_QD = _means(model, texts), _means(model, queries)
    return query_QD @ text_ND.T


def _means(model: Any, sequences: Sequences) -> np.ndarray:
    found = torch.empty(sequences.items, model.config.hidden_size)
    with torch.inference_mode():
        for batch in sequences.batches(1, BATCH_TOKENS):
            states_BTD = model.get_decoder()(torch.from_numpy(batch.arrays["input_ids"]), use_cache=False)[0]
            lengths = sequences.columns["input_ids"].length_S[batch.item_B]
            for item, states_TD, length in zip(batch.item_B, states_BTD, lengths, strict=True):
                found[item] = states_TD[:length].float().mean(dim=0)
    return nn.functional.normalize(found, dim=1).numpy()


def gradients(model: nn.Module, task: CausalLM, texts: Sequences, queries: Sequence[Sequences]) -> np.ndarray:
    """Dot products of loss gradients at the last checkpoint (TracIn; Pruthi et al., 2002.08484), over all parameters.

    A text's product with a query is the derivative of the text's loss along the query's gradient: exact, by forward-mode
    differentiation, without a gradient per text.
    """
    return np.stack([_along(model, task, texts, _gradient(model, task, query)) for query in queries])


def _gradient(model: nn.Module, task: CausalLM, query: Sequences) -> dict[str, Tensor]:
    batch = {name: torch.from_numpy(array) for name, array in query.whole().items()}
    parameters = dict(model.named_parameters())
    parts = torch.autograd.grad(task.loss_B(model, batch).mean(), list(parameters.values()))
    return {f"model.{name}": part for name, part in zip(parameters, parts, strict=True)}


class _Losses(nn.Module):
    """Losses of a batch as the output of a module, so that its parameters can be handed in."""

    def __init__(self, model: nn.Module, task: CausalLM) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.task.loss_B(self.model, batch)


def _along(model: nn.Module, task: CausalLM, texts: Sequences, direction: dict[str, Tensor]) -> np.ndarray:
    losses = _Losses(model, task)
    parameters = {name: parameter.detach() for name, parameter in losses.named_parameters()}
    found_S = np.empty(texts.items)
    for batch in texts.batches(1, BATCH_TOKENS):
        arrays = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
        with torch.no_grad():
            _, change_B = jvp(
                lambda given, arrays=arrays: functional_call(losses, given, (arrays,)), (parameters,), (direction,)
            )
        found_S[batch.item_B] = change_B.numpy()
    return texts.of_examples(found_S)
