"""Descent: fine-tune a copy on the query. Examples whose loss falls with it are like the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..tasks.base import Batch, Task
from .base import Produced
from .steps import Steps


@dataclass(frozen=True, kw_only=True)
class Finetune(Steps):
    """See Producer and Steps."""

    direction: ClassVar[int] = -1

    def produce(self, base: nn.Module, task: Task, query: Batch, seed: int) -> Produced:
        """See Producer. `seed` is used by torch for what the model itself draws (dropout in train mode)."""
        choice = self.choice(base, task, query)
        model, parameters = self.tunable_copy(base, choice.names, seed)
        return self.produced(base, model, self.take(model, parameters, task, query, sign=-1), seed, choice)
