"""captum: TracIn (Pruthi et al., 2002.08484) at the last checkpoint, over all parameters and over the last layer alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from captum.influence import TracInCP, TracInCPFast
from torch import nn

from tests.bench.peers.world import Scored, UnsupportedError, World, timed

BATCH_ROWS = {"classification": 1024, "causal_lm": 16}
FAST_BATCH_ROWS = 4096
VECTORIZED = (nn.Linear, nn.Conv2d)


def tracincp(world: World) -> Scored:
    """All parameters; a whole batch at once where every layer is linear or convolutional, else example by example."""
    model = world.model()
    leaves = [module for module in model.modules() if list(module.parameters(recurse=False))]
    at_once = all(isinstance(module, VECTORIZED) for module in leaves)
    batch_rows = world.batch_rows or BATCH_ROWS[world.kind]
    tracin = TracInCP(
        model,
        world.train.loader(batch_rows),
        checkpoints=[0],
        checkpoints_load_func=_loaded,
        loss_fn=nn.CrossEntropyLoss(reduction="sum") if at_once else world.loss_B,
        batch_size=None,
        sample_wise_grads_per_batch=at_once,
    )
    way = "sample_wise_grads_per_batch" if at_once else "a backward pass per example"
    found, score_s = timed(partial(tracin.influence, world.queries.loader(batch_rows)))
    return _scored(found, score_s, f"all parameters, {way}, batches of {batch_rows}")


def tracincp_fast(world: World) -> Scored:
    """The weights of the last linear layer alone."""
    if world.kind != "classification":
        raise UnsupportedError("TracInCPFast asserts logits of two dimensions, and texts have three")
    batch_rows = world.batch_rows or FAST_BATCH_ROWS
    model = world.model()
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    tracin = TracInCPFast(
        model,
        last,
        world.train.loader(batch_rows),
        checkpoints=[0],
        checkpoints_load_func=_loaded,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=None,
    )
    found, score_s = timed(partial(tracin.influence, world.queries.whole()))
    return _scored(found, score_s, f"weights of the last layer alone, batches of {batch_rows}")


def _loaded(_model: nn.Module, _checkpoint: Any) -> float:
    """The only checkpoint is in the model already; its learning rate is 1."""
    return 1.0


def _scored(found: torch.Tensor, score_s: float, settings: str) -> Scored:
    return Scored(found.detach().numpy(), 0.0, score_s, settings)
