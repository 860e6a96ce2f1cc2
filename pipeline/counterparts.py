"""One model, and its counterparts put in its place: tensors by pointer, without a copy.

A counterpart is the tensors in which it differs from the base. The one module is pointed at them and back again (a
pointer per tensor), so memory is the base plus the differences and any `nn.Module` works as it is. Of a tensor to which
something is added, a low-rank product above all, only that is held; it is made of it when its counterpart's turn comes.

Counterparts for which there is no room beside the base wait where they were given, and are held group by group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .changes import Added, Change, LowRank
from .layer_rules import slots_of
from .numerics import dtype_of, to_loss_dtype

_Swaps = list[tuple[Tensor, Change]]
"""Slots of the model, and what becomes of what they hold in the base."""


class Counterparts:
    """A base model and what its counterparts have otherwise.

    Args:
        model: Base model, on its device; parameters and buffers may be changed only through this.
        changes: Per counterpart, parameter or buffer name -> the tensor that differs, or what is added to the base's. When they
            are held they are moved to the base tensor's device, tensors to its dtype.
        room_bytes: Memory for counterparts on that device; one is held even if it takes more. Null: for all.

    Raises:
        KeyError: A counterpart names a tensor that the model does not have.
        ValueError: A tensor has another shape than the model's.
    """

    def __init__(
        self, model: nn.Module, changes: Sequence[Mapping[str, Change]], room_bytes: int | None = None
    ) -> None:
        self.model, self._slots = model, slots_of(model)
        self._bases = {id(slot): slot.data for slot in self._slots.values()}
        self._names = {id(slot): name for name, slot in self._slots.items()}
        self._order: torch.memory_format | None = None
        self._waiting = [self._by_slot(each) for each in changes]
        self._held: dict[int, _Swaps] = {}
        fits = room_bytes is None or self.steps_bytes <= room_bytes
        self._room_bytes = None if fits else room_bytes
        self._keep()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def device(self) -> torch.device:
        """Of the base model."""
        return next(iter(self._slots.values())).device if self._slots else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """In which the base model computes."""
        return dtype_of(self.model)

    @property
    def changed(self) -> list[Tensor]:
        """Slots that any counterpart has otherwise."""
        return list({id(slot): slot for swaps in self._waiting for slot, _ in swaps}.values())

    @property
    def steps_bytes(self) -> int:
        """Memory of all counterparts' steps, as tensors of the model's precision or products."""
        return sum(map(self._bytes, range(len(self))))

    def groups(self, positions: Sequence[int]) -> list[list[int]]:
        """Counterparts in the order given, so many together as there is room for; of none, one group of none."""
        groups, taken_bytes = [list[int]()], 0
        for position in positions:
            needed_bytes = self._bytes(position)
            if groups[-1] and self._room_bytes is not None and taken_bytes + needed_bytes > self._room_bytes:
                groups, taken_bytes = [*groups, []], 0
            groups[-1].append(position)
            taken_bytes += needed_bytes
        return groups

    def changes(self, position: int) -> dict[str, Change]:
        """What a counterpart was given as; of tied tensors under one name."""
        return {self._names[id(slot)]: change for slot, change in self._waiting[position]}

    def step(self, position: int) -> dict[str, Tensor | LowRank]:
        """What a counterpart adds to the base."""
        return {self._names[id(slot)]: self._step(slot, change) for slot, change in self._swaps(position)}

    def _step(self, slot: Tensor, change: Change) -> Tensor | LowRank:
        if isinstance(change, Tensor):
            return to_loss_dtype(change) - to_loss_dtype(self._bases[id(slot)])
        return to_loss_dtype(change.step) if isinstance(change, Added) else change

    @contextmanager
    def held(self, group: Sequence[int]) -> Iterator[None]:
        """On the device for the time of the block; none other is that had to wait."""
        if self._room_bytes is not None:
            self._held = {position: self._placed(self._waiting[position]) for position in group}
        try:
            yield
        finally:
            self._held = {}

    @contextmanager
    def in_place(self, position: int | None) -> Iterator[nn.Module]:
        """The model with one counterpart's tensors in place, for the time of the block; null for the base as it is."""
        swaps = self._swaps(position) if position is not None else []
        try:
            for slot, change in swaps:
                slot.data = self._changed(slot, change)
            yield self.model
        finally:
            for slot, _ in swaps:
                slot.data = self._bases[id(slot)]

    def lay_out(self, order: torch.memory_format) -> None:
        """Put the numbers of kernels over images into another order in memory, under the base and all counterparts."""
        self._order = order
        with torch.inference_mode(False):  # the model is the caller's: it must still be able to learn
            for slot in self._slots.values():
                slot.data = self._bases[id(slot)] = _in_order(slot.data, order)
            self._keep()
            self._held = {position: self._placed(swaps) for position, swaps in self._held.items()}

    def _keep(self) -> None:
        """Hold them all, for good, if there is room; and have room for what is made of steps."""
        if self._room_bytes is None:
            self._waiting = [self._placed(swaps) for swaps in self._waiting]
        swaps = [swap for found in self._waiting for swap in found]
        stepping = [slot for slot, change in swaps if not isinstance(change, Tensor)]
        self._made = {id(slot): torch.empty_like(self._bases[id(slot)]) for slot in stepping}

    def _by_slot(self, changes: Mapping[str, Change]) -> _Swaps:
        """Of every tensor that differs; tied names share one slot."""
        found: dict[int, tuple[Tensor, Change]] = {}
        for name, change in changes.items():
            slot = self._slots[name]
            if tuple(slot.shape) != tuple(change.shape):
                raise ValueError(f"{name} is {list(change.shape)} in the counterpart, {list(slot.shape)} in the model")
            found[id(slot)] = (slot, change.detach() if isinstance(change, Tensor) else change)
        return list(found.values())

    def _bytes(self, position: int) -> int:
        return sum(
            slot.element_size()
            * (each.left.numel() + each.right.numel() if isinstance(each, LowRank) else slot.numel())
            for slot, each in self._waiting[position]
        )

    def _swaps(self, position: int) -> _Swaps:
        if self._room_bytes is None:
            return self._waiting[position]
        return self._held.get(position) or self._placed(self._waiting[position])

    def _placed(self, swaps: _Swaps) -> _Swaps:
        """On the base's device, as the base lies there; what is so already is not copied."""
        return [(slot, self._in_order(change.to(slot))) for slot, change in swaps]

    def _in_order(self, change: Change) -> Change:
        if isinstance(change, Added):
            return Added(_in_order(change.step, self._order))
        return change if isinstance(change, LowRank) else _in_order(change, self._order)

    def _changed(self, slot: Tensor, change: Change) -> Tensor:
        """What a slot holds under a counterpart; what is made of a step is written where the one before it stood."""
        if isinstance(change, Tensor):
            return change
        change.added_to(self._bases[id(slot)], self._made[id(slot)])
        return self._made[id(slot)]


def _in_order(tensor: Tensor, order: torch.memory_format | None) -> Tensor:
    """`contiguous` leaves one channel as it is."""
    return tensor if order is None or tensor.ndim != 4 else tensor.to(memory_format=order)
