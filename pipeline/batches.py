"""Which examples go through a model together. Arrays of one shape in batches of one shape; token sequences by their length.

Shapes: N examples, S sequences, B rows of a batch, T tokens of its longest sequence.

Every batch of arrays has exactly as many rows as asked for: matrix kernels are chosen by shape, and with another batch size
the last bits of a loss move (5e-7 on a digits CNN), which a difference of two losses magnifies. With one shape an example's
loss is the same to the bit wherever it stands and whatever its neighbours are.

Sequences have no one shape, so nothing is filled up: they are sorted by length and cut into batches of so many tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

ALIKE = 0.9
"""Length of the shortest sequence of a batch, over that of the longest."""
BEGUN = 0.125
"""Share of a batch's tokens below which it is filled with whatever comes."""


@dataclass(frozen=True)
class Batch:
    """What goes through a model at once.

    Args:
        item_B: The examples (or sequences) whose losses are wanted: of the first rows, in this order.
        arrays: Name -> [B, ...]; rows beyond `item_B` only fill the shape.
    """

    item_B: np.ndarray
    arrays: Mapping[str, np.ndarray]


def own_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch's tensors, copied for one pass: models and tasks may change what they are given in place."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Ragged:
    """S rows of differing lengths, one behind the other.

    Args:
        values: All rows.
        offsets: Where each begins, and the end: S + 1.
        pad: What a batch is filled up with, on the right.
    """

    values: np.ndarray
    offsets: np.ndarray
    pad: int

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], pad: int) -> Ragged:
        """Of lists of numbers."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.concatenate([np.asarray(row, np.int64) for row in rows]) if len(rows) else np.empty(0, np.int64)
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]), pad)

    @property
    def length_S(self) -> np.ndarray:
        """Numbers in each row."""
        return np.diff(self.offsets)

    def padded(self, rows: np.ndarray) -> np.ndarray:
        """Some rows as one array [B, T], as wide as the longest of them."""
        starts, lengths = self.offsets[rows], self.length_S[rows]
        column_T = np.arange(lengths.max(initial=0))
        there_BT = column_T < lengths[:, None]
        padded_BT = np.full(there_BT.shape, self.pad, np.int64)
        padded_BT[there_BT] = self.values[(starts[:, None] + column_T)[there_BT]]
        return padded_BT


class Inputs(Protocol):
    """N examples as a model takes them."""

    bad: Mapping[int, str]
    """Row -> what was got, of rows that are no examples: they are in nothing else."""
    overlong: int
    """Examples that were longer than they may be: cut, or split."""

    @property
    def num_tokens_N(self) -> np.ndarray | None:
        """Tokens of each example whose loss counts; null where examples are no texts."""
        ...

    @property
    def items(self) -> int:
        """Rows that have a loss of their own."""
        ...

    @property
    def length_SC(self) -> np.ndarray | None:
        """Numbers in each item's columns [S, columns] before they are padded; null where no item ever is."""
        ...

    @property
    def example_S(self) -> np.ndarray:
        """The example that each item is of: ascending, from 0."""
        ...

    @property
    def window_S(self) -> np.ndarray:
        """Which of its example's items each is, from 0."""
        ...

    @property
    def weight_S(self) -> np.ndarray:
        """What each item's loss counts in its example's, which is the sum over its items of weight times loss, float64."""
        ...

    def batches(self, batch_rows: int, batch_tokens: int, full: bool = False) -> Iterator[Batch]:
        """All of them in batches, every item in one; full ones even where that costs padding."""
        ...

    def of_examples(self, losses_S: np.ndarray) -> np.ndarray:
        """Losses of items [..., S] as losses of examples [..., N]."""
        ...

    def items_of(self, examples: np.ndarray) -> np.ndarray:
        """Items of some examples, ascending."""
        ...

    def rows(self, items: np.ndarray) -> Mapping[str, np.ndarray]:
        """Some of them as one batch, in this order."""
        ...

    def whole(self) -> Mapping[str, np.ndarray]:
        """All of them as one batch."""
        ...


@dataclass(frozen=True)
class Arrays:
    """Examples of one shape, an array [N, *shape] per column of the task. See Inputs."""

    columns: Mapping[str, np.ndarray]
    bad: Mapping[int, str] = field(default_factory=dict)
    overlong: int = 0
    num_tokens_N: None = None
    length_SC: None = None

    @property
    def items(self) -> int:
        """See Inputs."""
        return len(next(iter(self.columns.values())))

    @property
    def example_S(self) -> np.ndarray:
        """See Inputs: they are the examples."""
        return np.arange(self.items)

    @property
    def window_S(self) -> np.ndarray:
        """See Inputs: each is its example's only one."""
        return np.zeros(self.items, np.int64)

    @property
    def weight_S(self) -> np.ndarray:
        """See Inputs."""
        return np.ones(self.items)

    def batches(self, batch_rows: int, batch_tokens: int = 0, full: bool = False) -> Iterator[Batch]:
        """In batches of exactly `batch_rows` rows, the last filled up with copies of its last row."""
        for start in range(0, self.items, batch_rows):
            stop = min(start + batch_rows, self.items)
            rows_B = np.minimum(np.arange(start, start + batch_rows), stop - 1)
            pieces = {
                name: array[start:stop] if stop - start == batch_rows else array[rows_B]
                for name, array in self.columns.items()
            }
            yield Batch(np.arange(start, stop), pieces)

    def of_examples(self, losses_S: np.ndarray) -> np.ndarray:
        """See Inputs: they are the examples."""
        return losses_S

    def items_of(self, examples: np.ndarray) -> np.ndarray:
        """See Inputs."""
        return examples

    def rows(self, items: np.ndarray) -> Mapping[str, np.ndarray]:
        """See Inputs."""
        return {name: array[items] for name, array in self.columns.items()}

    def whole(self) -> Mapping[str, np.ndarray]:
        """See Inputs."""
        return self.columns


@dataclass(frozen=True)
class Sequences:
    """Examples as token sequences: one each, or several where a long one was split into windows. See Inputs.

    Args:
        columns: What the model takes, S rows each.
        example_S: The example that a sequence is of: ascending, from 0, none left out.
        tokens_S: Tokens whose loss counts, at least one.
        per_token: Whether a loss is the mean over these tokens, else their sum.
        bad: See Inputs.
        overlong: See Inputs.
    """

    columns: Mapping[str, Ragged]
    example_S: np.ndarray
    tokens_S: np.ndarray
    per_token: bool
    bad: Mapping[int, str] = field(default_factory=dict)
    overlong: int = 0

    @property
    def items(self) -> int:
        """See Inputs."""
        return len(self.example_S)

    @cached_property
    def length_SC(self) -> np.ndarray:
        """See Inputs."""
        return np.stack([ragged.length_S for ragged in self.columns.values()], axis=1)

    @cached_property
    def _first_N(self) -> np.ndarray:
        return np.flatnonzero(np.diff(self.example_S, prepend=-1))

    @cached_property
    def num_tokens_N(self) -> np.ndarray:
        """See Inputs."""
        return np.add.reduceat(self.tokens_S, self._first_N) if self.items else self.tokens_S

    @cached_property
    def window_S(self) -> np.ndarray:
        """See Inputs."""
        return np.arange(self.items) - self._first_N[self.example_S]

    @cached_property
    def weight_S(self) -> np.ndarray:
        """See Inputs: a window's share of its example's tokens, or 1 where losses are sums."""
        return self.tokens_S / self.num_tokens_N[self.example_S] if self.per_token else np.ones(self.items)

    def batches(self, batch_rows: int, batch_tokens: int, full: bool = False) -> Iterator[Batch]:
        """In batches of at most `batch_tokens` tokens, padding included; a sequence that is longer than that goes alone.

        Longest first, so that memory is at its peak in the first batch. A sequence that would be padded by more than a tenth
        begins the next batch, unless this one has hardly begun, or all are to be full. A function of the sequences alone.
        """
        length_S = self.length_SC.max(axis=1)
        order_S = np.argsort(-length_S, kind="stable")
        start = 0
        while start < self.items:
            longest = int(length_S[order_S[start]])
            alike = int((length_S[order_S[start:]] >= ALIKE * longest).sum())
            rows = min(batch_tokens // longest, max(alike, int((1 if full else BEGUN) * batch_tokens) // longest))
            item_B = order_S[start : start + max(1, rows)]
            yield Batch(item_B, {name: ragged.padded(item_B) for name, ragged in self.columns.items()})
            start += len(item_B)

    def of_examples(self, losses_S: np.ndarray) -> np.ndarray:
        """See Inputs: windows together, sums added, means weighted by their tokens."""
        if len(self._first_N) == self.items:
            return losses_S
        if not self.per_token:
            return np.add.reduceat(losses_S, self._first_N, axis=-1)
        return np.add.reduceat(losses_S * self.tokens_S, self._first_N, axis=-1) / self.num_tokens_N

    def items_of(self, examples: np.ndarray) -> np.ndarray:
        """See Inputs."""
        return np.flatnonzero(np.isin(self.example_S, examples))

    def rows(self, items: np.ndarray) -> Mapping[str, np.ndarray]:
        """See Inputs."""
        return {name: ragged.padded(items) for name, ragged in self.columns.items()}

    def whole(self) -> Mapping[str, np.ndarray]:
        """See Inputs."""
        return self.rows(np.arange(self.items))
