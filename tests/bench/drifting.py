"""Producer `retain` as it would be without a divergence: copies are held by the training loss, and drift as training goes on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.batches import own_copy
from pipeline.curvatures.divergence import Divergence
from pipeline.producers.retain import Held, Retain
from pipeline.tasks.base import Batch, Task


class TrainingLoss(Divergence):
    """See Divergence: the corpus's own loss instead, whose gradient at the base is not 0."""

    def of(self, copy: nn.Module, number: int) -> Tensor:
        """See Divergence."""
        return self._task.loss_B(copy, own_copy(self.batches[number])).sum() / self.rows_each


class Drifting(Retain):
    """See Retain."""

    def prepare(self, base: nn.Module, task: Task, sample: Sequence[Batch], seed: int) -> Held:
        """See Retain. Steps are of the same lengths."""
        held = super().prepare(base, task, sample, seed)
        return Held(held.choice, TrainingLoss(base, task, sample), held.curvature)
