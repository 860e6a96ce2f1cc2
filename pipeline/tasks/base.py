"""The protocol of a task: two methods. Reading, checking, rejecting, batching and writing are the pipeline's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from ..batches import Sequences
from ..records import Column

Batch = Mapping[str, Tensor]
"""Task column -> tensor [B, *shape]; floating-point columns arrive in the model's dtype, all on the model's device."""


class Task(Protocol):
    """A task adapter. Its constructor takes the spec's options as keyword arguments.

    A third method is optional; `Samples` says it.
    """

    def columns(self) -> list[Column]:
        """What one example consists of, and from which corpus columns it is read."""
        ...

    def loss_B(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of every example of a batch.

        Args:
            model: Base model or counterpart, in the mode the caller chose; may be called as often as needed.
            batch: B examples.

        Returns:
            [B] losses in nats, float32 or better, each a function of its own example alone (in eval mode: see
            model_check.py). NaN where an example has no loss: the row is then rejected.
        """
        ...


class Uniforms(Protocol):
    """Random numbers for the rows of a batch, each row's own: whatever is drawn beside it, and in whatever order."""

    def __call__(self, *shape: int) -> Tensor:
        """Numbers [B, *shape], float64, uniform in (0, 1), on the model's device; every call gives others.

        A row's are a function of the run's seed and its example's id. Those of a smaller first axis are the first of those of a
        larger one, so that padding does not change them. `torch.special.ndtri` makes normal numbers of them, and
        `tasks.outputs.drawn_classes` classes.
        """
        ...


class Samples(Task, Protocol):
    """A task that can also draw labels, for curvatures made of gradients; without it they are of the corpus's labels."""

    def sampled(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Batch:
        """The batch with its labels drawn from what the model itself predicts; without gradients.

        The loss must be minus the logarithm of the probability that a label is drawn with: the mean over draws of g g' is
        then the Gauss-Newton matrix. (Of a loss that is a mean over tokens, that of their sum.)

        Args:
            model: Base model in eval mode.
            batch: B examples; not changed.
            uniforms: All randomness must come from it; given by this name.
        """
        ...


class SequenceTask(Task, Protocol):
    """A task whose examples are sequences of differing lengths: its columns are of the kinds `text`, `messages` or `tokens`."""

    per_token: bool
    """Whether a loss is the mean over an example's tokens, else their sum."""

    def encode(self, raw: Mapping[str, np.ndarray]) -> Sequences:
        """Rows as token sequences.

        Args:
            raw: Task column -> [N] objects: texts, lists of messages, lists of ids.
        """
        ...

    def token_losses_BT(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses of single tokens in nats, 0 for those that do not count: what `loss_B` adds up."""
        ...

    def token_ids_BT(self, batch: Batch) -> Tensor:
        """Ids of these tokens, negative for those that do not count."""
        ...

    def token_texts(self, ids: list[int]) -> list[str]:
        """Token ids as text, one each."""
        ...
