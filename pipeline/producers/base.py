"""The protocol of a producer: one method and a direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from ..changes import LowRank
from ..tasks.base import Batch, Task


@dataclass(frozen=True)
class Produced:
    """A counterpart as its producer leaves it.

    Args:
        model: The base model's copy, changed.
        steps: Optimizer steps taken.
        details: Anything worth a line in meta.json: numbers and short strings.
        factors: Parameter name -> the product by which it changed, where that is known: saved instead of the whole matrix.
    """

    model: nn.Module
    steps: int
    details: dict[str, float | str] = field(default_factory=dict)
    factors: Mapping[str, LowRank] = field(default_factory=dict)


class Producer(Protocol):
    """Makes counterparts. Its constructor takes the spec's fields as keyword arguments."""

    direction: int
    """+1 if the query's loss rises (ascent), -1 if it falls: score = direction * (counterpart_loss - base_loss)."""

    def produce(self, base: nn.Module, task: Task, query: Batch, seed: int) -> Produced:
        """One counterpart.

        Args:
            base: Base model in eval mode; must come back unchanged.
            task: Says what the query's loss is.
            query: All rows of the query as one batch [B, *shape].
            seed: Of this query alone; all randomness must derive from it.

        Raises:
            ContractError: The model or query does not fit the producer.
            NumericsError: A gradient or weight is not finite.
        """
        ...
