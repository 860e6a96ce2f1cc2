"""The Fisher matrix of a sample: what per-example gradients must be taken of so that they square to the Gauss-Newton matrix.

With labels drawn from the model's own predictions, the mean over rows of g g' estimates the mean of J' H J, in the same units
(Martens, 1412.1193, section 9). A loss that is the mean of n tokens' has gradients n times too short for that in the square, so
each is weighted by the root of n.

A document of N tokens in windows of n each has the loss sum (n / N) l over its windows, and the matrix sum (n / N) J' H J: labels
of different tokens are drawn independently, so that products of two tokens' gradients are 0 in the mean. Each window is therefore
a row of its own, its gradient weighted by the root of n and by that of n / N, and the mean is over documents.

Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import own_copy
from ..errors import ContractError
from ..tasks.base import Batch, Task, Uniforms
from .base import Sample, say_first
from .rows import Rows, as_rows, weights

DRAWS = 8
"""Labels drawn for every row of a task whose rows have one each. A model that is certain seldom draws another than its own, and
then a large gradient: on digits EK-FAC's rank correlation with retraining is .39 with 1, .44 with 4 and .46 with 16."""
LEAST_UNIFORM = 2.0**-54
"""In the place of 0, whose normal quantile is not finite."""


def with_drawn_labels(model: nn.Module, task: Task, sample: Sample, seed: int, device: torch.device) -> Sample:
    """The sample with labels drawn from the model's own predictions, several times over; if the task cannot draw them, as it is.

    Texts are drawn once: they have many labels each. What is drawn for a row is a function of the seed and its example's id
    alone.

    Raises:
        ContractError: What the task draws is no such batch.
        NumericsError: The model's predictions are not finite.
    """
    if getattr(task, "sampled", None) is None:
        _warn_of_true_labels(type(task).__name__)
        return sample
    times = 1 if hasattr(task, "token_ids_BT") else DRAWS
    with torch.no_grad():
        drawn = [
            _drawn(task, model, rows, RowUniforms(rows, seed, time, device))
            for time in range(times)
            for rows in map(as_rows, sample.batches, sample.numbers)
        ]
    return Sample(drawn, sample.rows * times, list(sample.numbers) * times)


class RowUniforms:
    """Random numbers of each row's own. See Uniforms.

    Args:
        rows: B rows.
        seed: Of the curvature.
        time: Which draw of the same rows it is.
        device: Where they are wanted.
    """

    def __init__(self, rows: Rows, seed: int, time: int, device: torch.device) -> None:
        self._keys = [_key(seed, *row) for row in zip(rows.window_B.tolist(), rows.example_B, strict=True)]
        self._time, self._device, self._calls = time, device, 0

    def __call__(self, *shape: int) -> Tensor:
        """See Uniforms."""
        found = np.empty((len(self._keys), math.prod(shape)))
        philox = np.random.Philox(0)  # one for all rows: to make one takes longer than to set its state
        generator, state = np.random.Generator(philox), philox.state
        state["state"]["counter"] = np.array([0, 0, self._calls, self._time], np.uint64)
        for own, key in zip(found, self._keys, strict=True):
            state["state"]["key"] = key
            philox.state = state
            generator.random(out=own)
        self._calls += 1
        return torch.from_numpy(found.clip(LEAST_UNIFORM)).view(-1, *shape).to(self._device)


def _key(seed: int, window: int, example: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(f"{seed}/{window}/{example}".encode()).digest()[:16], np.uint64)


def _drawn(task: Task, model: nn.Module, rows: Rows, uniforms: Uniforms) -> Rows:
    """The rows with what was drawn; columns that were handed on are their own, whatever the model did to its copy.

    Raises:
        ContractError: A column is missing, or has another shape.
    """
    own = own_copy(rows)
    drawn: Batch = task.sampled(model, own, uniforms=uniforms)  # type: ignore[attr-defined]
    for name, value in rows.items():
        got = list(drawn[name].shape) if name in drawn else "none"
        if got != list(value.shape):
            raise ContractError(
                f"{type(task).__name__}.sampled: got column {name!r} of shape {got}, expected {list(value.shape)}",
                "uniforms(*shape) gives numbers [B, *shape]: the number of rows is not among its arguments",
            )
    return rows.holding({name: rows[name] if value is own.get(name) else value for name, value in drawn.items()})


def weighted_loss(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    """Losses [B] whose gradients square to the curvature."""
    loss_B = task.loss_B(model, own_copy(batch))
    if getattr(task, "per_token", False):
        loss_B = loss_B * _independent_terms(task, batch).to(loss_B).sqrt()
    return loss_B * weights(batch, loss_B).sqrt()


def _independent_terms(task: Task, batch: Batch) -> Tensor:
    """How many tokens each row's loss is the mean of, [B]."""
    ids_BT: Tensor = task.token_ids_BT(batch)  # type: ignore[attr-defined]
    return (ids_BT >= 0).sum(dim=1)


@cache
def _warn_of_true_labels(task: str) -> None:
    """Once for a process, by one worker."""
    say_first(
        f"warning: {task} has no method `sampled`: the curvature is made of the corpus's own labels (empirical Fisher), and "
        "is small where the model has learned them"
    )
