"""The loss engine: losses of a base model and its counterparts over examples in memory. Knows torch only.

Shapes: N examples, B rows of a batch, Q counterparts.

How a batch goes through base and counterparts is in `passes.py`; of counterparts that are a short step away derivatives serve
as well (`derivatives.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from . import memory
from .batches import Batch
from .changes import Change
from .compiled import Compiled
from .counterparts import Counterparts
from .derivatives import Derivative, Derivatives, experts_apart, forward_along
from .losses import Losses
from .numerics import cast
from .passes import LossFunction, Passes

CHECKED_ROWS = 4
"""Of the first batch, on which derivatives layer by layer are compared with autograd's."""
SHARE_OF_MEMORY = 0.5
"""Of what is free, that a finer copy of the models may take."""
FINER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


class LossEngine:
    """Losses of one base model and Q counterparts.

    Args:
        model: Base model in eval mode, on its device; parameters and buffers may be changed only through the engine.
        task: Says what the loss of one example is.
        counterparts: Per counterpart, parameter or buffer name -> the tensor that differs, or what is added to the base's. They
            are moved to the base tensor's device, tensors to its dtype.
        room_bytes: Memory for counterparts on that device. Those beyond wait where they are, and all examples go through group by
            group. Null: for all.
        compiled: Blocks of the model that run compiled in `losses`, if it bears it; null for none.

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
        compiled: Compiled | None = None,
    ) -> None:
        self._counterparts, self._task = Counterparts(model, counterparts, room_bytes), task
        self._model, self._device, self._dtype = model, self._counterparts.device, self._counterparts.dtype
        self._passes = Passes(self._counterparts, task, compiled)
        self._backward: dict[tuple[int, ...], Derivatives] = {}

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

    @property
    def compiled(self) -> Compiled | None:
        """Blocks that run compiled, from the first batch on; null if that is not asked for, or failed."""
        return self._passes.compiled

    @property
    def is_compiled(self) -> bool:
        """Whether they do now."""
        return self.compiled is not None and self.compiled.is_on

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
        return LossEngine(cast(copy.deepcopy(self._model), dtype), self._task, changes)

    def losses(
        self, batches: Iterable[Batch], positions: Sequence[int] | None = None, base_S: np.ndarray | None = None
    ) -> Losses:
        """Losses of N items: of a whole shard, or of any part of it.

        Args:
            batches: Together they have each of the N items once; floating-point arrays are cast to the model's dtype.
            positions: Counterparts to use, in this order; null for all.
            base_S: Losses of all the shard's items under the base model where they are known: its pass is then left out.

        Raises:
            ValueError: The task returned losses of another shape than [B], or in half precision.
        """
        batches = list(batches) if self.compiled else batches
        try:
            return self._by_groups(batches, positions, base_S, self._losses)
        except RuntimeError as error:
            if not self._passes.gives_up_compiling(error):
                raise
            return self._by_groups(batches, positions, None, self._losses)  # all of them by the same code

    def _losses(self, batches: Iterable[Batch], group: Sequence[int], base_S: np.ndarray | None) -> Losses:
        positions = [*group] if base_S is not None else [None, *group]
        items, losses_M = [np.empty(0, np.int64)], [[torch.empty(0)] for _ in positions]
        with torch.inference_mode(), self._passes.installed():
            for batch in batches:
                tensors, kept = self._tensors(batch), len(batch.item_B)
                items.append(batch.item_B)
                for losses, loss_B in zip(losses_M, self._passes.losses(tensors, positions), strict=True):
                    losses.append(loss_B[:kept])
        item_N, order_N = _ascending(items)
        losses_MN = np.stack([_join(losses) for losses in losses_M]) if losses_M else np.empty((0, len(item_N)))
        losses_MN = losses_MN[:, order_N]
        if base_S is not None:
            return Losses(item_N, base_S[item_N], losses_MN)
        return Losses(item_N, losses_MN[0], losses_MN[1:])

    def derivatives(self, batches: Iterable[Batch], positions: Sequence[int] | None, way: Derivative) -> Losses:
        """Losses of N items under the base, and of what they change by to first order on the way to each counterpart.

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
                with torch.no_grad():
                    self._passes.lay_out(tensors)
                items.append(batch.item_B)
                loss_B, derivative_BQ = self._derivatives(tensors, tuple(group), way)
                base_M.append(loss_B[:kept])
                derivative_M.append(derivative_BQ[:kept])
        item_N, order_N = _ascending(items)
        base_N = _join(base_M)[order_N] if base_S is None else base_S[item_N]
        derivative_QN = np.ascontiguousarray(_join(derivative_M)[order_N].T)
        return Losses(item_N, base_N, (base_N + derivative_QN).astype(base_N.dtype), derivative_QN)

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
                found.append(losses_of(batches, group, base_S))
            if base_S is None and len(groups) > 1:  # the others leave the base's pass out
                base_S = np.empty(found[0].item_N.max(initial=-1) + 1, found[0].base_N.dtype)
                base_S[found[0].item_N] = found[0].base_N
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
        loss, rows = partial(self._passes.loss_B, tensors), len(next(iter(tensors.values())))
        try:
            with experts_apart(self._model):
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
            loss, rows = partial(self._passes.loss_B, few), len(next(iter(few.values())))
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

    def _tensors(self, batch: Batch) -> dict[str, Tensor]:
        """A batch on the device; with versions, which tensors of inference mode do not have."""
        with torch.inference_mode(False):
            tensors = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
            return {
                name: tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)
                for name, tensor in tensors.items()
            }


def _ascending(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Items of batches in ascending order, and where each of them was."""
    item_N = np.concatenate(parts)
    order_N = np.argsort(item_N, kind="stable")
    return item_N[order_N], order_N


def _join(parts: list[Tensor]) -> np.ndarray:
    """Batches of losses as one array; the only place where the device is waited for."""
    return torch.cat(parts[1:] or parts).cpu().numpy()
