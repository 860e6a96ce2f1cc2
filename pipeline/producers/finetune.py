"""Descent: fine-tune a copy on the query. Examples whose loss falls with it are like the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..tasks.base import Batch, Task
from .base import Produced
from .early_stopping import EarlyStopping, split
from .steps import Steps


@dataclass(frozen=True, kw_only=True)
class Finetune(Steps):
    """See Producer and Steps."""

    direction: ClassVar[int] = -1

    validation_fraction: float
    patience: int

    def produce(self, base: nn.Module, task: Task, query: Batch, seed: int) -> Produced:
        """See Producer. `seed` draws held-out rows; torch has it, too, for what the model draws (dropout in train mode).

        Raises:
            ContractError: Rows are to be held out of a query that has one.
            NumericsError: No step lowers the held-out rows' loss; and as `take`.
        """
        choice = self.choice(base, task, query)
        model, parameters = self.tunable_copy(base, choice.names, seed)
        if not self.validation_fraction:
            return self.produced(base, model, self.take(model, parameters, task, query, sign=-1), seed, choice)
        tuned, held_out = split(query, self.validation_fraction, seed)
        stopping = EarlyStopping(model, parameters, task, held_out, self.patience)
        self.take(model, parameters, task, tuned, sign=-1, after_step=stopping.after_step)
        steps = stopping.restore()
        return self.produced(base, model, steps, seed, choice, **stopping.details)
