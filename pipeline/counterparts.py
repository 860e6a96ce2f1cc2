"""One model, and its counterparts put in its place: tensors by pointer, without a copy.

A counterpart is the tensors in which it differs from the base. The one module is pointed at them and back again (a
pointer per tensor), so memory is the base plus the differences and any `nn.Module` works as it is. Of a tensor that
differs by a low-rank product only the factors are held; it is made of them when its counterpart's turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .changes import Change, LowRank
from .layer_rules import slots_of
from .numerics import to_loss_dtype

_Swap = tuple[Tensor, Tensor, Change]
"""Slot of the model, what it holds in the base, and what becomes of that."""


class Counterparts:
    """A base model and what its counterparts have otherwise.

    Args:
        model: Base model, on its device; parameters and buffers may be changed only through this.
        changes: Per counterpart, parameter or buffer name -> the tensor that differs, or what is added to the base's. They are
            moved to the base tensor's device, tensors to its dtype.

    Raises:
        KeyError: A counterpart names a tensor that the model does not have.
        ValueError: A tensor has another shape than the model's.
    """

    def __init__(self, model: nn.Module, changes: Sequence[Mapping[str, Change]]) -> None:
        self.model, self._slots = model, slots_of(model)
        self._swaps = [self._aligned(each) for each in changes]
        self._names = {id(slot): name for name, slot in self._slots.items()}
        self._made = self._room_for_products()

    def __len__(self) -> int:
        return len(self._swaps)

    @property
    def device(self) -> torch.device:
        """Of the base model."""
        return next(iter(self._slots.values())).device if self._slots else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """In which the base model computes."""
        floats = [slot for slot in self._slots.values() if slot.is_floating_point()]
        return floats[0].dtype if floats else torch.float32

    @property
    def changed(self) -> list[Tensor]:
        """Slots that any counterpart has otherwise."""
        return list({id(slot): slot for swaps in self._swaps for slot, *_ in swaps}.values())

    @property
    def steps_bytes(self) -> int:
        """Memory of all counterparts' steps, as tensors of the model's precision or products."""
        swaps = [swap for found in self._swaps for swap in found]
        return sum(
            base.element_size()
            * (each.left.numel() + each.right.numel() if isinstance(each, LowRank) else base.numel())
            for _, base, each in swaps
        )

    def changes(self, position: int) -> dict[str, Change]:
        """What a counterpart was given as; of tied tensors under one name."""
        return {self._names[id(slot)]: change for slot, _, change in self._swaps[position]}

    def step(self, position: int) -> dict[str, Change]:
        """What a counterpart adds to the base."""
        return {
            self._names[id(slot)]: change
            if isinstance(change, LowRank)
            else to_loss_dtype(change) - to_loss_dtype(base)
            for slot, base, change in self._swaps[position]
        }

    @contextmanager
    def in_place(self, position: int | None) -> Iterator[nn.Module]:
        """The model with one counterpart's tensors in place, for the time of the block; null for the base as it is."""
        swaps = self._swaps[position] if position is not None else []
        try:
            for slot, base, change in swaps:
                slot.data = self._changed(slot, base, change)
            yield self.model
        finally:
            for slot, base, _ in swaps:
                slot.data = base

    def lay_out(self, order: torch.memory_format) -> None:
        """Put the numbers of kernels over images into another order in memory, under the base and all counterparts."""
        with torch.inference_mode(False):  # the model is the caller's: it must still be able to learn
            for slot in self._slots.values():
                slot.data = _in_order(slot.data, order)
            self._swaps = [
                [
                    (slot, slot.data, change if isinstance(change, LowRank) else _in_order(change, order))
                    for slot, _, change in swaps
                ]
                for swaps in self._swaps
            ]
            self._made = self._room_for_products()

    def _aligned(self, changes: Mapping[str, Change]) -> list[_Swap]:
        """Of every tensor that differs; tied names share one slot."""
        found: dict[int, _Swap] = {}
        for name, change in changes.items():
            slot = self._slots[name]
            if tuple(slot.shape) != tuple(change.shape):
                raise ValueError(f"{name} is {list(change.shape)} in the counterpart, {list(slot.shape)} in the model")
            if isinstance(change, LowRank):
                found[id(slot)] = (slot, slot.data, change.to(slot))
            else:
                found[id(slot)] = (slot, slot.data, change.detach().to(slot.device, slot.dtype))
        return list(found.values())

    def _room_for_products(self) -> dict[int, Tensor]:
        """Where tensors are made that differ by a product, by slot."""
        swaps = [swap for found in self._swaps for swap in found]
        return {id(slot): torch.empty_like(base) for slot, base, change in swaps if isinstance(change, LowRank)}

    def _changed(self, slot: Tensor, base: Tensor, change: Change) -> Tensor:
        """What a slot holds under a counterpart; a product is written where the one before it stood."""
        if isinstance(change, LowRank):
            change.added_to(base, self._made[id(slot)])
            return self._made[id(slot)]
        return change


def _in_order(tensor: Tensor, order: torch.memory_format) -> Tensor:
    return tensor.to(memory_format=order) if tensor.ndim == 4 else tensor  # `contiguous` leaves one channel as it is
