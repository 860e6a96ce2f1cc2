"""The loss engine: losses of a base model and its counterparts over examples in memory. Knows torch only.

Shapes: N examples, B rows of a batch, Q counterparts.

A counterpart is the tensors in which it differs from the base. The one module is pointed at them and back again (a
pointer per tensor, no copy), so memory is the base plus the differences and any `nn.Module` works as it is.

Every batch has exactly `batch_rows` rows: matrix kernels are chosen by shape, and with another batch size the last bits of
a loss move (5e-7 on a digits CNN), which a difference of two losses magnifies. With one shape an example's loss is the
same to the bit wherever it stands and whatever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn


class LossFunction(Protocol):
    """The one method of a task that the engine calls."""

    def loss_B(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses [B] of a batch, float32 or better."""
        ...


@dataclass(frozen=True)
class Losses:
    """Losses of N examples, float32 or float64.

    Args:
        base_N: Under the base model.
        counterpart_QN: Under each counterpart, in the order the engine was given them.
    """

    base_N: np.ndarray
    counterpart_QN: np.ndarray


class LossEngine:
    """Losses of one base model and Q counterparts.

    Args:
        model: Base model in eval mode, on its device; parameters and buffers may be changed only through the engine.
        task: Says what the loss of one example is.
        counterparts: Per counterpart, parameter or buffer name -> the tensor that differs. They are moved to the base
            tensor's device and dtype.

    Raises:
        KeyError: A counterpart names a tensor that the model does not have.
        ValueError: A tensor has another shape than the model's.
    """

    def __init__(self, model: nn.Module, task: LossFunction, counterparts: list[Mapping[str, Tensor]]) -> None:
        self._model, self._task = model, task
        self._slots = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._counterparts = [self._aligned(tensors) for tensors in counterparts]
        floats = [slot for slot in self._slots.values() if slot.is_floating_point()]
        self._dtype = floats[0].dtype if floats else torch.float32
        self._device = next(iter(self._slots.values())).device if self._slots else torch.device("cpu")

    def _aligned(self, tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(slot, base tensor, counterpart tensor) of every tensor that differs; tied names share one slot."""
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for name, tensor in tensors.items():
            slot = self._slots[name]
            if slot.shape != tensor.shape:
                raise ValueError(f"{name} is {list(tensor.shape)} in the counterpart, {list(slot.shape)} in the model")
            found[id(slot)] = (slot, slot.data, tensor.detach().to(slot.device, slot.dtype))
        return list(found.values())

    @contextmanager
    def counterpart(self, position: int) -> Iterator[nn.Module]:
        """The model with one counterpart's tensors in place, for the time of the block."""
        swaps = self._counterparts[position]
        try:
            for slot, _, tensor in swaps:
                slot.data = tensor
            yield self._model
        finally:
            for slot, base, _ in swaps:
                slot.data = base

    def losses(
        self, examples: Mapping[str, np.ndarray], batch_rows: int, positions: Sequence[int] | None = None
    ) -> Losses:
        """Losses of N examples.

        Args:
            examples: Task column -> array [N, *shape]; floating-point columns are cast to the model's dtype.
            batch_rows: Rows of every forward pass; the last batch is filled up with copies of its last row.
            positions: Counterparts to use, in this order; null for all.

        Raises:
            ValueError: The task returned losses of another shape than [B], or in half precision.
        """
        rows = len(next(iter(examples.values())))
        positions = range(len(self._counterparts)) if positions is None else positions
        base, counterparts = [], [[] for _ in positions]  # type: ignore[var-annotated]
        with torch.inference_mode():
            for start in range(0, rows, batch_rows):
                batch = self._batch(examples, start, batch_rows)
                kept = min(batch_rows, rows - start)
                base.append(self._loss_B(self._model, batch, batch_rows)[:kept])
                for position, losses in zip(positions, counterparts, strict=True):
                    with self.counterpart(position) as model:
                        losses.append(self._loss_B(model, batch, batch_rows)[:kept])
        return Losses(
            _join(base), np.stack([_join(losses) for losses in counterparts]) if counterparts else np.empty((0, rows))
        )

    def _batch(self, examples: Mapping[str, np.ndarray], start: int, batch_rows: int) -> dict[str, Tensor]:
        batch = {}
        for name, array in examples.items():
            piece = torch.from_numpy(array[start : start + batch_rows])
            if len(piece) < batch_rows:
                piece = torch.cat([piece, piece[-1:].expand(batch_rows - len(piece), *piece.shape[1:])])
            batch[name] = piece.to(self._device, self._dtype if piece.is_floating_point() else piece.dtype)
        return batch

    def _loss_B(self, model: nn.Module, batch: Mapping[str, Tensor], batch_rows: int) -> Tensor:
        loss_B = self._task.loss_B(model, batch)
        if loss_B.shape != (batch_rows,) or loss_B.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{type(self._task).__name__}.loss_B returned {loss_B.dtype} of shape {list(loss_B.shape)}, "
                f"expected [{batch_rows}] in float32 or float64"
            )
        return loss_B


def _join(parts: list[Tensor]) -> np.ndarray:
    """Batches of losses as one array; the only place where the device is waited for."""
    return torch.cat(parts).cpu().numpy() if parts else np.empty(0, np.float32)
