"""The loss engine: losses of a base model and its counterparts over examples in memory. Knows torch only.

Shapes: N examples, B rows of a batch, Q counterparts.

What counterparts have in common with the base, up to the first module that they change, is computed once for a batch
(`trunk.py`); of counterparts that are a short step away derivatives serve as well (`derivatives.py`).

On a CPU convolutions and pooling over images are 1.6 to 3.5 times as fast where channels stand last in memory; that takes no
more than kernels that are laid out so. A model that does not bear it, by what the first batch says, has them back as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from . import memory
from .batches import Batch
from .changes import Change
from .counterparts import Counterparts
from .derivatives import Derivative, Derivatives, forward_along
from .losses import Losses
from .observe import say
from .trunk import Trunk

CHECKED_ROWS = 4
"""Of the first batch, on which derivatives layer by layer are compared with autograd's."""
SAME = 1e-3
"""By how much losses may differ between two orders of adding up, in nats and relative; half precision has the most."""
SHARE_OF_MEMORY = 0.5
"""Of what is free, that a finer copy of the models may take."""
FINER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


class LossFunction(Protocol):
    """The one method of a task that the engine calls."""

    def loss_B(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses [B] of a batch, float32 or better."""
        ...


class LossEngine:
    """Losses of one base model and Q counterparts.

    Args:
        model: Base model in eval mode, on its device; parameters and buffers may be changed only through the engine.
        task: Says what the loss of one example is.
        counterparts: Per counterpart, parameter or buffer name -> the tensor that differs, or what is added to the base's. They
            are moved to the base tensor's device, tensors to its dtype.
        room_bytes: Memory for counterparts on that device. Those beyond wait where they are, and all examples go through group by
            group. Null: for all.

    Raises:
        KeyError: A counterpart names a tensor that the model does not have.
        ValueError: A tensor has another shape than the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        task: LossFunction,
        counterparts: Sequence[Mapping[str, Change]],
        room_bytes: int | None = None,
    ) -> None:
        self._counterparts, self._task = Counterparts(model, counterparts, room_bytes), task
        self._model, self._device, self._dtype = model, self._counterparts.device, self._counterparts.dtype
        self._backward: dict[tuple[int, ...], Derivatives] = {}
        self._trunk: Trunk | None = Trunk(model, self._counterparts.changed)
        self._is_trunk_tried = False
        sees_images = any(isinstance(module, nn.Conv2d) for module in model.modules())
        rounds_finely = self._dtype.itemsize >= 4  # else the first batch's luck would decide, by SAME
        self._is_laid_out = not (sees_images and rounds_finely and self._device.type == "cpu")

    @property
    def model(self) -> nn.Module:
        """The base model."""
        return self._model

    @property
    def steps_bytes(self) -> int:
        """Memory that the steps of all counterparts take in a backward pass."""
        return self._counterparts.steps_bytes

    @property
    def groups(self) -> list[list[int]]:
        """Counterparts that are on the device together."""
        return self._counterparts.groups(range(len(self._counterparts)))

    @property
    def free_bytes(self) -> int:
        """Memory of the device that is free."""
        return memory.free_bytes(self._device)

    def counterpart(self, position: int | None) -> AbstractContextManager[nn.Module]:
        """The model with one counterpart's tensors in place, for the time of the block; null for the base as it is."""
        return self._counterparts.in_place(position)

    def finer(self, positions: Sequence[int]) -> LossEngine | None:
        """A copy of the base and of some counterparts in the next finer precision; null if there is none.

        Raises:
            MemoryError: It would take more than SHARE_OF_MEMORY of what is free.
        """
        dtype = FINER.get(self._dtype)
        if dtype is None:
            return None
        changes = [self._counterparts.changes(position) for position in positions]
        whole = [each for found in changes for each in found.values() if isinstance(each, Tensor)]
        numbers = sum(each.numel() for each in (*self._model.state_dict().values(), *whole))
        needed_bytes, free_bytes = 2 * dtype.itemsize * numbers, self.free_bytes
        if needed_bytes > SHARE_OF_MEMORY * free_bytes:
            raise MemoryError(f"it takes {needed_bytes / 2**30:.1f} GiB, {free_bytes / 2**30:.1f} are free")
        return LossEngine(copy.deepcopy(self._model).to(dtype), self._task, changes)

    def _try_channels_last(self, tensors: Mapping[str, Tensor]) -> None:
        """Lay kernels out with channels last, for good if the model's losses stay what they were.

        A model may ask for the order of numbers in memory, as `view` behind a convolution does: then it fails, or says else.
        """
        before_B = self._loss_B(self._model, tensors)
        self._counterparts.lay_out(torch.channels_last)
        try:
            after_B = self._loss_B(self._model, tensors)
        except RuntimeError:
            after_B = None
        if after_B is None or not torch.allclose(before_B, after_B, rtol=SAME, atol=SAME, equal_nan=True):
            self._counterparts.lay_out(torch.contiguous_format)
        self._is_laid_out = True  # last: a batch that fails decides nothing for those after it

    def losses(
        self, batches: Iterable[Batch], positions: Sequence[int] | None = None, base_S: np.ndarray | None = None
    ) -> Losses:
        """Losses of N examples.

        Args:
            batches: Together they have each of the N items once; floating-point arrays are cast to the model's dtype.
            positions: Counterparts to use, in this order; null for all.
            base_S: The items' losses under the base model where they are known: its pass is then left out.

        Raises:
            ValueError: The task returned losses of another shape than [B], or in half precision.
        """
        return self._by_groups(batches, positions, base_S, self._losses)

    def _losses(self, batches: Iterable[Batch], group: Sequence[int], base_S: np.ndarray | None) -> Losses:
        passes = [*group] if base_S is not None else [None, *group]
        items, losses_M = [np.empty(0, np.int64)], [[torch.empty(0)] for _ in passes]
        with torch.inference_mode(), self._trunk.installed() if self._trunk else nullcontext():
            for batch in batches:
                tensors, kept = self._tensors(batch), len(batch.item_B)
                if not self._is_laid_out:
                    self._try_channels_last(tensors)
                items.append(batch.item_B)
                for losses, loss_B in zip(losses_M, self._passes(tensors, passes), strict=True):
                    losses.append(loss_B[:kept])
        item_N = np.concatenate(items)
        losses_MN = np.stack([_join(losses) for losses in losses_M]) if losses_M else np.empty((0, len(item_N)))
        losses_MN[:, item_N] = losses_MN.copy()
        return Losses(losses_MN[0], losses_MN[1:]) if base_S is None else Losses(base_S, losses_MN)

    def derivatives(self, batches: Iterable[Batch], positions: Sequence[int] | None, way: Derivative) -> Losses:
        """Losses of N examples under the base, and of what they change by to first order on the way to each counterpart.

        Args:
            batches: As of `losses`.
            positions: As of `losses`.
            way: `gradient`: one pass forwards and one backwards for all counterparts; `jvp`: one pass on dual numbers for each.

        Raises:
            ValueError: The model does not bear it; what `losses` says may help. Or as `losses`.
        """
        return self._by_groups(batches, positions, None, partial(self._along, way=way))

    def _along(
        self, batches: Iterable[Batch], group: Sequence[int], base_S: np.ndarray | None, way: Derivative
    ) -> Losses:
        items, base_M, derivative_M = [np.empty(0, np.int64)], [torch.empty(0)], [torch.empty(0, len(group))]
        with torch.inference_mode(False):
            for batch in batches:
                tensors, kept = self._tensors(batch), len(batch.item_B)
                if not self._is_laid_out:
                    with torch.no_grad():
                        self._try_channels_last(tensors)
                items.append(batch.item_B)
                loss_B, derivative_BQ = self._derivatives(tensors, tuple(group), way)
                base_M.append(loss_B[:kept])
                derivative_M.append(derivative_BQ[:kept])
        item_N = np.concatenate(items)
        base_N, derivative_NQ = _join(base_M), _join(derivative_M)
        base_N[item_N], derivative_NQ[item_N] = base_N.copy(), derivative_NQ.copy()
        base_N = base_N if base_S is None else base_S
        derivative_QN = np.ascontiguousarray(derivative_NQ.T)
        return Losses(base_N, (base_N + derivative_QN).astype(base_N.dtype), derivative_QN)

    def _by_groups(
        self,
        batches: Iterable[Batch],
        positions: Sequence[int] | None,
        base_S: np.ndarray | None,
        losses_of: Callable[[Iterable[Batch], Sequence[int], np.ndarray | None], Losses],
    ) -> Losses:
        """All batches once for each group of counterparts that there is room for; base losses are those of the first."""
        groups, found = self.groups if positions is None else self._counterparts.groups(positions), list[Losses]()
        batches = batches if len(groups) == 1 else list(batches)
        for group in groups:
            with self._counterparts.held(group):
                found.append(losses_of(batches, group, found[0].base_N if found else base_S))
            if len(groups) > 1:
                self._backward = {}  # with its steps
        return Losses.of_all(found)

    def bend(self, batch: Batch, position: int) -> float:
        """By how much loss differences are off from derivatives for want of a straight line, relative to these.

        To second order: half of what the derivatives change by on the way to the counterpart. Losses' rounding has no part in it.

        Raises:
            ValueError: As `derivatives`, way `gradient`.
        """
        with torch.inference_mode(False):
            tensors = self._tensors(batch)
            here_B = self._derivatives(tensors, (position,), "gradient")[1]
            with self.counterpart(position):
                there_B = self._derivatives(tensors, (position,), "gradient")[1]
        length = float(here_B.norm())
        return float((there_B - here_B).norm()) / length / 2 if length else float("inf")

    def _derivatives(
        self, tensors: Mapping[str, Tensor], chosen: tuple[int, ...], way: Derivative
    ) -> tuple[Tensor, Tensor]:
        """Losses [B] and derivatives [B, Q]."""
        loss, rows = partial(self._loss_B, self._model, tensors), len(next(iter(tensors.values())))
        try:
            if way == "jvp":
                return self._forwards(loss, chosen)
            return self._backward_of(tensors, chosen).along(loss, rows)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            kind = type(self._model).__name__
            raise ValueError(
                f"{kind} does not bear way {way}: {error}; way difference asks nothing of a model"
            ) from error

    def _backward_of(self, tensors: Mapping[str, Tensor], chosen: tuple[int, ...]) -> Derivatives:
        """Along these counterparts' steps; held until others are asked for."""
        if chosen not in self._backward:
            few = {name: tensor[:CHECKED_ROWS] for name, tensor in tensors.items()}
            loss, rows = partial(self._loss_B, self._model, few), len(next(iter(few.values())))
            with torch.no_grad():
                loss()  # tasks may look at their model when it first comes
            backward = Derivatives(self._model, [self._counterparts.step(position) for position in chosen])
            backward.require_right(loss, rows)
            self._backward = {chosen: backward}
        return self._backward[chosen]

    def _forwards(self, loss: Callable[[], Tensor], chosen: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            loss_B = loss()
        columns = [forward_along(self._model, self._counterparts.step(position), loss)[1] for position in chosen]
        return loss_B, torch.stack(columns, dim=1) if columns else loss_B.new_empty(len(loss_B), 0)

    def _passes(self, tensors: Mapping[str, Tensor], passes: Sequence[int | None]) -> list[Tensor]:
        """Losses [B] under the base (null) and counterparts; what they have in common is computed in the first pass."""
        if len(passes) > 1 and self._trunk is not None and not self._is_trunk_tried:
            if not self._bears_trunk(self._trunk, tensors, [passes[0], *{passes[1], passes[-1]}]):
                self._trunk = None
            self._is_trunk_tried = True
        if len(passes) < 2 or self._trunk is None:
            return [self._pass(tensors, position) for position in passes]
        return self._shared_passes(self._trunk, tensors, passes)

    def _shared_passes(self, trunk: Trunk, tensors: Mapping[str, Tensor], passes: Sequence[int | None]) -> list[Tensor]:
        with trunk.recording():
            found = [self._pass(tensors, passes[0])]
        for position in passes[1:]:
            with trunk.replaying():
                found.append(self._pass(tensors, position))
        return found

    def _pass(self, tensors: Mapping[str, Tensor], position: int | None) -> Tensor:
        with self.counterpart(position) as model:
            return self._loss_B(model, tensors)

    def _bears_trunk(self, trunk: Trunk, tensors: Mapping[str, Tensor], passes: Sequence[int | None]) -> bool:
        """Whether there is something in the trunk, and losses with it are those of whole passes to the bit."""
        with trunk.tracing():  # first of all: tasks may look at their model when it first comes
            whole = [self._pass(tensors, passes[0])]
        with trunk.recording():
            self._pass(tensors, passes[0])
        if trunk.is_empty:
            return False
        whole += [self._pass(tensors, position) for position in passes[1:]]
        try:
            shared = self._shared_passes(trunk, tensors, passes)
            if all(torch.allclose(*pair, rtol=0, atol=0, equal_nan=True) for pair in zip(whole, shared, strict=True)):
                return True
        except Exception:  # noqa: BLE001 - whatever a model says whose modules do not run
            pass
        say(
            f"warning: {type(self._model).__name__} uses parameters before the module that owns them is called, or changes what "
            "modules returned: it is computed from its beginning for every counterpart"
        )
        return False

    def _tensors(self, batch: Batch) -> dict[str, Tensor]:
        tensors = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
        return {
            name: tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }

    def _loss_B(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        rows = len(next(iter(tensors.values())))
        loss_B = self._task.loss_B(model, tensors)
        if loss_B.shape != (rows,) or loss_B.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{type(self._task).__name__}.loss_B returned {loss_B.dtype} of shape {list(loss_B.shape)}, "
                f"expected [{rows}] in float32 or float64"
            )
        return loss_B


def _join(parts: list[Tensor]) -> np.ndarray:
    """Batches of losses as one array; the only place where the device is waited for."""
    return torch.cat(parts[1:] or parts).cpu().numpy()
