"""Rows of a sample: a batch, and which example of the corpus each of its rows is of.

A document longer than the model's window is scored as several rows. Its loss is the sum over them of weight times loss, and a
curvature is a mean over documents: so rows carry their weights, and the ids that their random numbers are seeded from.

Shapes: B rows of a batch, S rows of several, N examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..batches import Inputs
from ..tasks.base import Batch


class Rows(dict[str, Tensor]):
    """A batch, and what its rows are of.

    Args:
        columns: Task column -> [B, *shape].
        example_B: Ids of the examples.
        window_B: Which of its example's rows each is, from 0.
        weight_B: What each row's loss counts in its example's, float64.
    """

    def __init__(self, columns: Batch, example_B: np.ndarray, window_B: np.ndarray, weight_B: np.ndarray) -> None:
        super().__init__(columns)
        self.example_B, self.window_B, self.weight_B = example_B, window_B, weight_B

    @classmethod
    def of_items(cls, columns: Batch, inputs: Inputs, example_id_N: np.ndarray, item_B: np.ndarray) -> Rows:
        """Of some items of inputs.

        Args:
            columns: The items as tensors.
            inputs: Whose items they are.
            example_id_N: Ids of its examples.
            item_B: Numbers of the items.
        """
        example_B = example_id_N[inputs.example_S[item_B]]
        return cls(columns, example_B, inputs.window_S[item_B], inputs.weight_S[item_B])

    def some(self, index: slice | Tensor) -> Rows:
        """Some of the rows."""
        own = index if isinstance(index, slice) else index.cpu().numpy()
        columns = {name: value[index] for name, value in self.items()}
        return Rows(columns, self.example_B[own], self.window_B[own], self.weight_B[own])

    def holding(self, columns: Batch) -> Rows:
        """The same rows with other columns."""
        return Rows(columns, self.example_B, self.window_B, self.weight_B)


def as_rows(batch: Batch, number: int = 0) -> Rows:
    """A batch as it is; of a plain one each row is an example, its id made of the batch's number and its place."""
    if isinstance(batch, Rows):
        return batch
    rows = len(next(iter(batch.values())))
    ids = np.array([f"{number}/{row}" for row in range(rows)], object)
    return Rows(batch, ids, np.zeros(rows, np.int64), np.ones(rows))


def weights(batch: Batch, like: Tensor) -> Tensor:
    """What each row's loss counts in its example's: [B], of a tensor's type and on its device."""
    return torch.from_numpy(as_rows(batch).weight_B).to(like)


def of_examples(batches: Sequence[Rows], values: Tensor) -> Tensor:
    """Losses of rows, or their derivatives, [..., S], as those of examples [..., N]."""
    window_S, weight_S, example_S = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("window_B", "weight_B", "example_B")
    )
    if not window_S.any() and (weight_S == 1).all():
        return values
    place = {example: i for i, example in enumerate(dict.fromkeys(example_S))}
    index_S = torch.tensor([place[example] for example in example_S], device=values.device)
    found = values.new_zeros(*values.shape[:-1], len(place))
    return found.index_add_(-1, index_S, values * torch.from_numpy(weight_S).to(values))
