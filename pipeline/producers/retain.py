"""Ascent that holds the corpus: unlearn the query in a copy whose outputs on the corpus stay near the base model's.

Plain ascent forgets much that the query has nothing to do with. Here every step goes up the query's loss and down the copy's
divergence from the base on rows of the corpus (`curvatures/divergence.py`), as in unlearning with a KL term (Maini et al. 2024,
2401.06121). For small steps this is gradient descent on the proximal Bregman objective (Bae et al. 2022, 2209.05364), whose
minimum is the influence function's; stopping early damps it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..blocks import Choice
from ..curvatures.divergence import Divergence
from ..errors import NumericsError
from ..tasks.base import Batch, Task
from .base import Produced
from .steps import Tuning, finite_loss, query_loss, scale_gradients


@dataclass(frozen=True)
class Held:
    """What holds the copies of a base model.

    Args:
        choice: Parameters that are tuned.
        divergence: From the base, on the sample.
        curvature: Its largest, in nats: weights are counted in units in which it is 1.
    """

    choice: Choice
    divergence: Divergence
    curvature: float


@dataclass(frozen=True, kw_only=True)
class Retain(Tuning):
    """See CorpusProducer and Tuning; the spec's fields of the same names say what each means."""

    direction: ClassVar[int] = 1

    strength: float
    lr: float
    momentum: float
    steps: int
    max_loss_change: float
    sample_rows: int

    def prepare(self, base: nn.Module, task: Task, sample: Sequence[Batch], seed: int) -> Held:
        """See CorpusProducer.

        Raises:
            ContractError: No parameter is chosen, the task does not call the model, or no row has a loss.
            NumericsError: The corpus's loss does not bend.
        """
        choice = self.choice(base, task, sample[0])
        untuned, _ = self.tunable_copy(base, choice.names, seed)
        divergence = Divergence(untuned, task, sample)
        return Held(choice, divergence, divergence.largest_curvature(seed))

    def produce(self, base: nn.Module, task: Task, query: Batch, seed: int, prepared: Held) -> Produced:
        """See CorpusProducer.

        Raises:
            NumericsError: The query's gradient vanishes, or its loss or the divergence is not finite.
        """
        model, parameters = self.tunable_copy(base, prepared.choice.names, seed)
        divergence_nats = self._climb(model, parameters, task, query, seed, prepared)
        details = {"curvature_nats": prepared.curvature, "divergence_nats": divergence_nats}
        return self.produced(base, model, self.steps, seed, prepared.choice, **details)

    def _climb(
        self, model: nn.Module, parameters: list[nn.Parameter], task: Task, query: Batch, seed: int, held: Held
    ) -> float:
        """Tune the parameters, in place; mean divergence over the last steps, of each batch once."""
        optimizer = torch.optim.SGD(parameters, lr=self.lr / held.curvature, momentum=self.momentum)
        first, divergences = 0.0, list[float]()
        for step, number in zip(range(self.steps), _numbers(len(held.divergence.batches), seed), strict=False):
            optimizer.zero_grad(set_to_none=True)
            loss = query_loss(model, task, query)
            now = finite_loss(loss, step, self.steps)
            first = first if step else now
            if not self.max_loss_change or now - first < self.max_loss_change:
                (-loss).backward()
                # of one length, however certain the model is of the query, and however steep its loss becomes
                scale_gradients(parameters, self.strength * math.sqrt(held.curvature))
            divergence = held.divergence.of(model, number)
            divergences.append(divergence.item())
            if not math.isfinite(divergences[-1]):
                raise NumericsError(
                    f"the outputs on the corpus are {divergences[-1]} nats from the base model's before step {step + 1}",
                    "lower producer.strength or producer.lr",
                )
            divergence.backward()
            optimizer.step()
        last = divergences[-len(held.divergence.batches) :]
        return math.fsum(last) / len(last)


def _numbers(batches: int, seed: int) -> Iterator[int]:
    """Numbers of batches without end: all in random order, and again in another."""
    chance = random.Random(seed)
    while True:
        yield from chance.sample(range(batches), batches)
