"""dattri-llm (Liu et al., 2609.38767): dot products of gradients of linear and convolutional layers, kept as factors."""

from __future__ import annotations

import warnings
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from dattri_llm import AttributionArguments, AttributionTask, HookManagerConfig, TracInAttributor
from dattri_llm.gradient.streaming import GradientStreamer
from torch import Tensor, nn

from tests.bench.peers.world import QueryClock, Rows, Scored, World, as_it_is, timed

BATCH_ROWS = {"classification": 256, "causal_lm": 32}
LAYERS = (nn.Linear, nn.Conv2d)


def graddot(world: World) -> Scored:
    """All of these layers."""
    return _scores(world, 0)


def trunk(world: World) -> Scored:
    """Without the last, which is a language model's output."""
    return _scores(world, 1)


def _scores(world: World, without: int) -> Scored:
    """Scores of a live pass over queries and examples.

    `TracInAttributor.attribute` does the same, but has no way to hand on how rows become a batch, and writes scores to disk.
    Weights are frozen, so that no gradient of a batch is made that nobody uses.
    """
    model, clock = world.model().requires_grad_(False), QueryClock()
    _let_gradients_through(model)
    named = [name for name, layer in model.named_modules() if isinstance(layer, LAYERS)]
    hooks = HookManagerConfig(
        hook_types=dict.fromkeys(named[: len(named) - without], "linear_io"), include_frozen=True, capture_style="auto"
    )
    batch_rows = world.batch_rows or BATCH_ROWS[world.kind]
    query_rows = min(world.query_rows or len(world.queries), len(world.queries))

    def loss(asked: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        asked()
        return world.loss_B(model(batch[0]), batch[1]).sum()

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*hooked layer.*have no trainable parameter")
        arguments = AttributionArguments(
            folder,
            per_device_train_batch_size=batch_rows,
            per_device_eval_batch_size=query_rows,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        attributor = TracInAttributor(arguments, task=AttributionTask(partial(loss, clock.example), model))

        def stream(rows: Rows, size: int, asked: Any, **options: Any) -> GradientStreamer:
            return GradientStreamer(
                model, rows, arguments, batch_size=size, loss_fn=partial(loss, asked), collate_fn=as_it_is, **options
            )

        train = stream(world.train, batch_rows, clock.example, config=hooks)
        queries = stream(world.queries, query_rows, clock.query, hook_manager=train.hook_manager)
        with train, queries:
            found, score_s = timed(partial(attributor.score_sources, train, queries))
    layers = "linear and convolutional layers" + (" below the output" if without else "")
    settings = f"{layers}; batches of {batch_rows}, queries of {query_rows}"
    return Scored(found[0].T.numpy(), 0.0, score_s, settings, *clock.spent_s)


def _let_gradients_through(model: nn.Module) -> None:
    """Make the first layer's output require a gradient, since nothing in the model does."""
    first = next(layer for layer in model.modules() if list(layer.parameters(recurse=False)))
    first.register_forward_hook(lambda _layer, _inputs, output: output.requires_grad_())
