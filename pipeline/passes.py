"""Passes forward over one batch, under a base model and its counterparts, the fastest that the model bears. Knows torch only.

What may be done otherwise than plainly is tried on the first batch, and given up where losses are not what they were:

- On a CPU convolutions and pooling over images are 1.6 to 3.5 times as fast where channels stand last in memory; that takes no
  more than kernels that are laid out so.
- What counterparts have in common with the base, up to the first module that they change, is computed once (`trunk.py`).
- Blocks of the model run as torch.compile makes them (`compiled.py`), if that is asked for (`score.compile`, decision 15).

Shapes: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from .batches import own_copy
from .compiled import Compiled
from .counterparts import Counterparts
from .errors import ContractError, first_line
from .observe import say
from .trunk import Trunk

SAME = 1e-3
"""By how much losses may differ between two orders of adding up, in nats and relative."""
SAME_IN_HALF = 3e-2
"""In half precision, where one rounding is 4e-3 of what is rounded."""


class LossFunction(Protocol):
    """The one method of a task that the engine calls."""

    def loss_B(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses [B] of a batch, float32 or better."""
        ...


class Passes:
    """Losses of a batch under a model and its counterparts.

    Args:
        counterparts: The model and they.
        task: Says what the loss of one example is.
        compiled: Blocks of the model that may run compiled; null for none.
    """

    def __init__(self, counterparts: Counterparts, task: LossFunction, compiled: Compiled | None = None) -> None:
        self._counterparts, self._model, self._task = counterparts, counterparts.model, task
        self._kind = type(self._model).__name__
        self._compiled = compiled
        self._trunk: Trunk | None = Trunk(self._model, counterparts.changed, compiled.blocks if compiled else ())
        self._is_trunk_tried = self._is_compiled_tried = False
        self._changes_inputs: bool | None = None
        sees_images = any(isinstance(module, nn.Conv2d) for module in self._model.modules())
        self._rounds_finely = counterparts.dtype.itemsize >= 4  # else the first batch's luck would decide, by SAME
        self._is_laid_out = not (sees_images and self._rounds_finely and counterparts.device.type == "cpu")

    @property
    def compiled(self) -> Compiled | None:
        """Blocks that run compiled, from the first batch on; null if that is not asked for, or failed."""
        return self._compiled

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Around all calls of `losses`."""
        with (
            self._compiled.installed() if self._compiled else nullcontext(),
            self._trunk.installed() if self._trunk else nullcontext(),
        ):
            yield

    def losses(self, tensors: Mapping[str, Tensor], positions: Sequence[int | None]) -> list[Tensor]:
        """Losses [B] under the base (null) and counterparts; what they have in common is computed for the first of them."""
        self.lay_out(tensors)
        if len(positions) > 1 and self._trunk is not None and not self._is_trunk_tried:
            if not self._bears_trunk(self._trunk, tensors, [positions[0], *{positions[1], positions[-1]}]):
                self._trunk = None
            self._is_trunk_tried = True
        if positions and self._compiled is not None and not self._is_compiled_tried:
            self._try_compiled(self._compiled, tensors, positions[0])
            self._is_compiled_tried = True
        if len(positions) < 2 or self._trunk is None:
            return [self._pass(tensors, position) for position in positions]
        return self._shared_passes(self._trunk, tensors, positions)

    def loss_B(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Losses [B] under the model as it is now; the tensors stay what they are, whatever model and task do to theirs.

        Raises:
            ValueError: The task returned losses of another shape than [B], or in half precision.
            ContractError: Inputs were changed in place, and those of the first batch were not.
        """
        rows = len(next(iter(tensors.values())))
        loss_B = self._own_pass(tensors)
        if loss_B.shape != (rows,) or loss_B.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{type(self._task).__name__}.loss_B returned {loss_B.dtype} of shape {list(loss_B.shape)}, "
                f"expected [{rows}] in float32 or float64"
            )
        return loss_B

    def _own_pass(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the task returns. Where the first batch was not changed in place, others are not copied for every pass."""
        if self._changes_inputs is False:
            before = [tensor._version for tensor in tensors.values()]
            loss_B = self._task.loss_B(self._model, tensors)
            if before != [tensor._version for tensor in tensors.values()]:
                raise ContractError(
                    f"{self._kind} or its task changes some batches in place, but not the first one",
                    "change a copy: `x = x - mean` instead of `x -= mean`",
                )
            return loss_B
        own = own_copy(tensors)
        loss_B = self._task.loss_B(self._model, own)
        if self._changes_inputs is None:
            self._changes_inputs = not all(map(torch.equal, tensors.values(), own.values()))
        return loss_B

    def lay_out(self, tensors: Mapping[str, Tensor]) -> None:
        """On the first batch lay kernels out with channels last, for good if the model's losses stay what they were.

        A model may ask for the order of numbers in memory, as `view` behind a convolution does: then it fails, or says else.
        """
        if self._is_laid_out:
            return
        before_B = self.loss_B(tensors)
        self._counterparts.lay_out(torch.channels_last)
        try:
            after_B = self.loss_B(tensors)
        except RuntimeError:
            after_B = None
        if after_B is None or not self._are_same(before_B, after_B):
            self._counterparts.lay_out(torch.contiguous_format)
        self._is_laid_out = True  # last: a batch that fails decides nothing for those after it

    def _pass(self, tensors: Mapping[str, Tensor], position: int | None) -> Tensor:
        with self._counterparts.in_place(position):
            return self.loss_B(tensors)

    def _shared_passes(
        self, trunk: Trunk, tensors: Mapping[str, Tensor], positions: Sequence[int | None]
    ) -> list[Tensor]:
        with trunk.recording():
            found = [self._pass(tensors, positions[0])]
        for position in positions[1:]:
            with trunk.replaying():
                found.append(self._pass(tensors, position))
        return found

    def _bears_trunk(self, trunk: Trunk, tensors: Mapping[str, Tensor], positions: Sequence[int | None]) -> bool:
        """Whether there is something in the trunk, and losses with it are those of whole passes to the bit."""
        with trunk.tracing():  # first of all: tasks may look at their model when it first comes
            whole = [self._pass(tensors, positions[0])]
        with trunk.recording():
            self._pass(tensors, positions[0])
        if trunk.is_empty:
            return False
        whole += [self._pass(tensors, position) for position in positions[1:]]
        try:
            shared = self._shared_passes(trunk, tensors, positions)
            if all(torch.allclose(*pair, rtol=0, atol=0, equal_nan=True) for pair in zip(whole, shared, strict=True)):
                return True
        except Exception:  # noqa: BLE001 - whatever a model says whose modules do not run
            pass
        say(
            f"warning: {self._kind} uses parameters before the module that owns them is called, or changes what "
            "modules returned: it is computed from its beginning for every counterpart"
        )
        return False

    def _try_compiled(self, compiled: Compiled, tensors: Mapping[str, Tensor], position: int | None) -> None:
        """On the first batch switch to compiled blocks, for good if losses stay what they were."""
        reason = "" if compiled.blocks else "it has no blocks"
        before_B = self._pass(tensors, position)
        try:
            compiled.is_on = not reason
            if not self._are_same(before_B, self._pass(tensors, position)):
                reason = "its losses would be others"
        except Exception as error:  # noqa: BLE001 - whatever compilers say
            reason = first_line(error)
        if reason:
            self._leave_uncompiled(compiled, reason)
        else:
            say(f"compiled {compiled.told}")

    def gives_up_compiling(self, error: RuntimeError) -> bool:
        """Whether the compiler failed, as for a shape that is new, or a full disk; it is off then, which is said."""
        if self._compiled is None or not self._compiled.is_blamed(error):
            return False
        self._leave_uncompiled(self._compiled, first_line(error))
        return True

    def _leave_uncompiled(self, compiled: Compiled, reason: str) -> None:
        compiled.is_on, self._compiled = False, None
        say(f"warning: score.compile: {self._kind} is scored as it is, not compiled: {reason}")

    def _are_same(self, before_B: Tensor, after_B: Tensor) -> bool:
        by = SAME if self._rounds_finely else SAME_IN_HALF
        return torch.allclose(before_B, after_B, rtol=by, atol=by, equal_nan=True)
