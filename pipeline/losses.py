"""Losses of items under a base model and its counterparts, as arrays that say which items they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Losses:
    """Losses of N items of a shard, float32 or float64.

    Args:
        item_N: Numbers of the items, ascending; all arrays are in this order. Of a whole shard 0, 1, ...
        base_N: Under the base model.
        counterpart_QN: Under each counterpart, in the order the engine was given them.
        derivative_QN: What of the difference is known to more digits than losses have; null where losses were compared.
    """

    item_N: np.ndarray
    base_N: np.ndarray
    counterpart_QN: np.ndarray
    derivative_QN: np.ndarray | None = None

    def mapped(self, each: Callable[[np.ndarray], np.ndarray]) -> Losses:
        """With each array of losses replaced by what is made of it, and numbered from 0: a shard's items as its examples."""
        base_N, derivative_QN = each(self.base_N), self.derivative_QN
        derivative_QN = None if derivative_QN is None else each(derivative_QN)
        return Losses(np.arange(len(base_N)), base_N, each(self.counterpart_QN), derivative_QN)

    @classmethod
    def of_all(cls, parts: Sequence[Losses]) -> Losses:
        """Of groups of counterparts, together; base losses are those of the first group."""
        if len(parts) == 1:
            return parts[0]
        derivatives = [part.derivative_QN for part in parts if part.derivative_QN is not None]
        counterpart_QN = np.concatenate([part.counterpart_QN for part in parts])
        derivative_QN = np.concatenate(derivatives) if derivatives else None
        return cls(parts[0].item_N, parts[0].base_N, counterpart_QN, derivative_QN)

    @property
    def difference_QN(self) -> np.ndarray:
        """By how much each counterpart's loss is above the base's, float64."""
        if self.derivative_QN is not None:
            return self.derivative_QN.astype(np.float64)
        return self.counterpart_QN.astype(np.float64) - self.base_N.astype(np.float64)
