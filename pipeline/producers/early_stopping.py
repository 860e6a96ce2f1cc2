"""Where to end steps on a query: at the lowest loss of rows that no step was taken on (Prechelt 1998)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import ContractError, NumericsError
from ..tasks.base import Batch, Task
from . import sharding
from .steps import query_loss


def split(query: Batch, fraction: float, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A query's rows in two parts, drawn by seed: those to tune on, and the held-out share of them.

    Args:
        query: All rows, tensors [B, *shape].
        fraction: Share of the rows that is held out, rounded; at least one row is in each part.
        seed: Of the query.

    Raises:
        ContractError: There are not two rows.
    """
    rows = len(next(iter(query.values())))
    if rows < 2:
        raise ContractError(
            f"the query has {rows} row; with producer.validation_fraction it needs 2 or more, some of which are held out",
            "give it more rows of the same query_id, or set producer.validation_fraction to 0",
        )
    held_out = min(max(1, round(fraction * rows)), rows - 1)
    row_B = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    # Each part keeps the order of the rows, so that sums over it do not depend on the draw's.
    parts = (row_B[held_out:].sort().values, row_B[:held_out].sort().values)
    tuned, kept = ({name: value[part.to(value.device)] for name, value in query.items()} for part in parts)
    return tuned, kept


class EarlyStopping:
    """Measures held-out loss after every step, and keeps the weights of the step after which it was lowest.

    Args:
        model: The tunable copy, before its first step.
        parameters: Those that the steps move.
        task: Says what a loss is.
        held_out: Rows that no step is taken on.
        patience: Steps without a lower loss after which to end.

    Raises:
        NumericsError: The base model's held-out loss is not finite.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], task: Task, held_out: Batch, patience: int
    ) -> None:
        self._model, self._task, self._held_out, self._patience = model, task, held_out, patience
        # Batch norm statistics, too: in train mode every step moves them.
        self._tensors = [*parameters, *model.buffers()]
        self._before = self._loss()
        if not math.isfinite(self._before):
            raise NumericsError(
                f"the loss of held-out rows is {self._before}", "check the query's rows and their labels"
            )
        self._best, self._best_step, self._steps = math.inf, 0, 0
        self._kept: list[Tensor] = []

    def _loss(self) -> float:
        """Mean loss of the held-out rows, as scoring sees the model."""
        with _in_eval_mode(self._model), torch.no_grad():
            return sharding.of_first(query_loss(self._model, self._task, self._held_out).item())

    def after_step(self, step: int) -> bool:
        """Look at the model after a step, counted from 1; whether it was the last one."""
        loss, self._steps = self._loss(), step
        if loss < self._best:
            self._best, self._best_step = loss, step
            self._kept = [tensor.detach().clone() for tensor in self._tensors]
        return step - self._best_step >= self._patience

    def restore(self) -> int:
        """Give the model back the weights of the best step; its number.

        Raises:
            NumericsError: No step led below the base model's held-out loss.
        """
        if not self._best < self._before:
            raise NumericsError(
                f"no step lowers the loss of the held-out rows: {self._before:.4g} nats before, {self._best:.4g} after the "
                f"best of {self._steps}",
                "lower producer.lr, give the query more rows, or set producer.validation_fraction to 0 to take all steps",
            )
        with torch.no_grad():
            for tensor, kept in zip(self._tensors, self._kept, strict=True):
                tensor.copy_(kept)
        return self._best_step

    @property
    def details(self) -> dict[str, float | str]:
        """What was measured, for meta.json."""
        return {
            "held_out_rows": len(next(iter(self._held_out.values()))),
            "held_out_loss_before_nats": self._before,
            "held_out_loss_after_nats": self._best,
            "steps_tried": self._steps,
        }


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """A model in eval mode for a while; modules that were in train mode are so again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
