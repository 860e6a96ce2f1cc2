"""kronfluence (Grosse et al., 2308.03296): gradient dot products and EK-FAC influence over linear and convolutional layers."""

from __future__ import annotations

import logging
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from tests.bench.peers.world import UNCOUNTED, Scored, World, as_it_is, timed

BATCH_ROWS = {"classification": 1024, "causal_lm": 32}
QUERY_ROWS = {"classification": 256, "causal_lm": 32}
DAMPING = ScoreArguments().damping_factor


class Losses(Task):  # type: ignore[misc]
    """The world's loss as training loss and as measurement; labels are drawn from the model where factors ask for it."""

    def __init__(self, world: World) -> None:
        self.world = world

    def compute_train_loss(self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        """Sum over the batch."""
        inputs, targets = batch
        logits = model(inputs)
        return self.world.loss_B(logits, self._drawn(logits, targets) if sample else targets).sum()

    def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        """Sum of the queries' losses."""
        return self.compute_train_loss(batch, model)

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
    return _scores(world, "identity", DAMPING, "no curvature, float32")


def ekfac(world: World) -> Scored:
    """EK-FAC with the library's own damping."""
    return _scores(world, "ekfac", DAMPING, f"damping {DAMPING} (default), sampled labels, float32")


def ekfac_heuristic(world: World) -> Scored:
    """EK-FAC with the damping of the paper, which the library takes when it is given None."""
    return _scores(world, "ekfac", None, "damping .1 x mean eigenvalue of each layer, sampled labels, float32")


def _scores(world: World, strategy: str, damping: float | None, settings: str) -> Scored:
    batch_rows, query_rows = world.batch_rows or BATCH_ROWS[world.kind], QUERY_ROWS[world.kind]
    loading = DataLoaderKwargs(collate_fn=as_it_is)
    task = Losses(world)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        model = prepare_model(world.model(), task)
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
                score_args=ScoreArguments(damping_factor=damping),
                dataloader_kwargs=loading,
            )
        )
        found: Any = analyzer.load_pairwise_scores("scores")
    settings = f"{settings}; batches of {batch_rows}, queries of {query_rows}"
    return Scored(found["all_modules"].numpy(), fit_s, score_s, settings)
