"""kronfluence (Grosse et al., 2308.03296): gradient dot products and EK-FAC influence over linear and convolutional layers."""

from __future__ import annotations

import logging
import math
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from tests.bench.peers.world import UNCOUNTED, QueryClock, Scored, World, as_it_is, timed

BATCH_ROWS = {"classification": 1024, "causal_lm": 32}
QUERY_ROWS = {"classification": 256, "causal_lm": 32}
DAMPING = ScoreArguments().damping_factor
RANK = 16
"""Of a query's gradients where they are compressed, in each layer."""


class Losses(Task):  # type: ignore[misc]
    """The world's loss as training loss and as measurement; labels are drawn from the model where factors ask for it."""

    def __init__(self, world: World, layers: list[str] | None = None) -> None:
        self.world, self.layers, self.clock = world, layers, QueryClock()

    def compute_train_loss(self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        """Sum over the batch."""
        self.clock.example()
        return self._loss(batch, model, sample)

    def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        """Sum of the queries' losses."""
        self.clock.query()
        return self._loss(batch, model, sample=False)

    def get_influence_tracked_modules(self) -> list[str] | None:
        """Layers whose gradients are compared; null for all that are linear or convolutions."""
        return self.layers

    def _loss(self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool) -> Tensor:
        inputs, targets = batch
        logits = model(inputs)
        return self.world.loss_B(logits, self._drawn(logits, targets) if sample else targets).sum()

    def get_attention_mask(self, batch: tuple[Tensor, Tensor]) -> Tensor | None:
        """Tokens up to the last one that counts [B, T]; what comes after is padding."""
        if self.world.kind == "classification":
            return None
        counted_BT = (batch[1] != UNCOUNTED).long()
        return counted_BT.flip(1).cumsum(1).flip(1).clamp(max=1)

    def _drawn(self, logits: Tensor, targets: Tensor) -> Tensor:
        drawn: Tensor = torch.distributions.Categorical(logits=logits.detach()).sample()  # type: ignore[no-untyped-call]
        if self.world.kind == "classification":
            return drawn
        shifted = torch.cat([targets[:, :1], drawn[:, :-1]], dim=1)
        return torch.where(targets == UNCOUNTED, UNCOUNTED, shifted)


def identity(world: World) -> Scored:
    """Plain dot products of gradients."""
    return _scores(world, "identity", ScoreArguments(), "no curvature")


def trunk(world: World) -> Scored:
    """Plain dot products of gradients without those of the output layer."""
    return _scores(world, "identity", ScoreArguments(), "no curvature, without output layer", _trunk(world))


def low_rank(world: World) -> Scored:
    """The same with each query's gradients compressed."""
    arguments = ScoreArguments(query_gradient_low_rank=RANK)
    return _scores(
        world, "identity", arguments, f"no curvature, without output layer, queries of rank {RANK}", _trunk(world)
    )


def ekfac(world: World) -> Scored:
    """EK-FAC with the library's own damping."""
    return _scores(world, "ekfac", ScoreArguments(), f"damping {DAMPING} (default), sampled labels")


def ekfac_heuristic(world: World) -> Scored:
    """EK-FAC with the damping of the paper, which the library takes when it is given None."""
    arguments = ScoreArguments(damping_factor=None)
    return _scores(world, "ekfac", arguments, "damping .1 x mean eigenvalue of each layer, sampled labels")


def _scores(
    world: World, strategy: str, arguments: ScoreArguments, settings: str, layers: list[str] | None = None
) -> Scored:
    batch_rows = world.batch_rows or BATCH_ROWS[world.kind]
    held = min(world.query_rows or QUERY_ROWS[world.kind], len(world.queries))
    query_rows = math.gcd(held, QUERY_ROWS[world.kind])
    arguments.query_gradient_accumulation_steps = held // query_rows
    loading = DataLoaderKwargs(collate_fn=as_it_is)
    task = Losses(world, layers)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        model = world.model()
        dtype = next(model.parameters()).dtype
        arguments.per_sample_gradient_dtype = arguments.precondition_dtype = arguments.score_dtype = dtype
        model = prepare_model(model, task)
        analyzer = Analyzer(
            "peer", model, task, cpu=True, log_level=logging.ERROR, disable_tqdm=True, output_dir=folder
        )
        _, fit_s = timed(
            partial(
                analyzer.fit_all_factors,
                "factors",
                world.train,
                per_device_batch_size=batch_rows,
                dataloader_kwargs=loading,
                factor_args=FactorArguments(strategy=strategy),
            )
        )
        _, score_s = timed(
            partial(
                analyzer.compute_pairwise_scores,
                "scores",
                "factors",
                world.queries,
                world.train,
                per_device_query_batch_size=query_rows,
                per_device_train_batch_size=batch_rows,
                score_args=arguments,
                dataloader_kwargs=loading,
            )
        )
        found: Any = analyzer.load_pairwise_scores("scores")
    settings = f"{settings}, {dtype}; batches of {batch_rows}, queries of {held}"
    return Scored(found["all_modules"].float().numpy(), fit_s, score_s, settings, *task.clock.spent_s)


def _trunk(world: World) -> list[str]:
    """Linear layers but the last, which is a language model's output."""
    return [name for name, layer in world.model().named_modules() if isinstance(layer, nn.Linear)][:-1]
