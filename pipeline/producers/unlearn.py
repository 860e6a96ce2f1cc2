"""Ascent: unlearn the query in a copy. Examples whose loss rises with it helped the query.

With `preset: paper` this is the released recipe of Ko et al., *The Mirrored Influence Hypothesis* (CVPR 2024): the query
twice in train mode, one Adam step of 5e-3, and a random point on a sphere around a query whose loss is near zero.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..blocks import Choice
from ..errors import ContractError, NumericsError
from ..tasks.base import Batch, Task
from .base import Produced
from .steps import Steps, query_loss


@dataclass(frozen=True, kw_only=True)
class Unlearn(Steps):
    """See Producer and Steps; the spec's fields of the same names say what each means."""

    direction: ClassVar[int] = 1

    repeat: int
    noise_radius: float
    noise_growth: float
    noise_below: float
    noise_until: float
    noise_tries: int

    def produce(self, base: nn.Module, task: Task, query: Batch, seed: int) -> Produced:
        """See Producer. Raises NumericsError when no noise within `noise_tries` lifts a near-zero loss."""
        batch = {name: value.repeat(self.repeat, *[1] * (value.ndim - 1)) for name, value in query.items()}
        details: dict[str, float | str] = {}
        choice = self.choice(base, task, query)
        if self.noise_radius:
            batch, details = self._lifted(base, task, batch, choice, seed)
        # A forward pass in train mode moves batch norm statistics: the steps start from a fresh copy.
        model, parameters = self.tunable_copy(base, choice.names, seed)
        steps = self.take(model, parameters, task, batch, sign=1)
        return self.produced(base, model, steps, seed, choice, **details)

    def _lifted(
        self, base: nn.Module, task: Task, batch: Batch, choice: Choice, seed: int
    ) -> tuple[dict[str, Tensor], dict[str, float | str]]:
        """The batch, or a noisy one whose loss is large enough to have a gradient."""
        if not self._half_loss(base, task, batch, choice) < self.noise_below:  # NaN too: the steps say what is wrong
            return dict(batch), {}
        if not any(value.is_floating_point() for value in batch.values()):
            raise ContractError(
                "the query's loss is near zero and it has no floating-point column to add noise to",
                "set producer.noise_radius to 0",
            )
        generator = torch.Generator().manual_seed(seed)
        radius = self.noise_radius
        for tries in range(1, self.noise_tries + 1):
            noisy = {name: _on_sphere(value, radius, self.repeat, generator) for name, value in batch.items()}
            if self._half_loss(base, task, noisy, choice) >= self.noise_until:
                return noisy, {"noise_radius": radius, "noise_tries": tries}
            radius *= self.noise_growth
        raise NumericsError(
            f"the query's loss stayed under {2 * self.noise_until} nats after {self.noise_tries} tries of noise "
            f"up to radius {radius:.3g}",
            "raise producer.noise_tries, or use a recipe without noise",
        )

    def _half_loss(self, base: nn.Module, task: Task, batch: Batch, choice: Choice) -> float:
        """Half the mean loss, as the release compares it, from a fresh copy in the recipe's mode."""
        model, _ = dataclasses.replace(self, lora_rank=0).tunable_copy(base, choice.names, 0)
        with torch.no_grad():
            return float(query_loss(model, task, batch)) / 2


def _on_sphere(value: Tensor, radius: float, repeat: int, generator: torch.Generator) -> Tensor:
    """A floating-point input plus a uniform point of the L2 sphere, one draw per row of the query; others unchanged."""
    if not value.is_floating_point():
        return value
    rows = len(value) // repeat
    noise = torch.randn((rows, *value.shape[1:]), generator=generator, dtype=torch.float64)
    noise = noise / noise.flatten(1).norm(dim=1).view(-1, *[1] * (value.ndim - 1)) * radius
    return value + noise.to(value).repeat(repeat, *[1] * (value.ndim - 1))
