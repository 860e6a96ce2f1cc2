"""Whether a loss is a function of its own example, seen before anything is tuned or scored. Knows torch only.

A few rows go through the model three times: as they are, in another order with other neighbours, and as they are again. What
differs by more than rounding is refused: no score of such a model would mean anything.

- State: buffers and attributes that a pass changes are reset after every pass, so that each begins as the first one did.
- Padding: where a text's loss depends on the longest one of its batch (rotary embeddings that switch at a length, means over
  padding), only texts of one length go through the model together.

Shapes: B rows of a batch, S items, C columns of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batch, Inputs
from .errors import MAX_NAMES_SHOWN, ContractError
from .numerics import dtype_of
from .observe import say
from .passes import LossFunction

CHECKED_ROWS, SHARE_OF_BATCH = 4, 3
"""Rows that are looked at: at least so many, and of a larger batch a third, so that three passes cost as much as the batch."""
TOLERANCE, TOLERANCE_IN_HALF = 1e-5, 1e-2
"""Nats, and relative, by which rounding may move a loss. On CPUs it does not move in another place of a batch of the same shape
(Llama, GPT-2, Mixtral, LSTM, attention; float32 and bfloat16); padded otherwise it moves by 3e-7, in half precision by 7e-3, of
losses of 9. The first is what layouts are promised to agree to. Where padding moves losses by more, batches are only smaller."""
_PLAIN = (bool, int, float, str, type(None), Tensor)
_Key = tuple[str, str]
"""Path of a module, and name of a buffer or attribute of it."""
_Lengths = tuple[int, ...]
"""Of a text's columns."""


class _Absent:
    """In the place of an attribute that is not there; a class, since copies of it are itself."""


class ModelCheck:
    """Looks at a model before it is used, and says which rows may go through it together.

    Args:
        model: Base model in eval mode, on its device. A hook that resets its state may be added.
        task: Says what the loss of one example is.
    """

    def __init__(self, model: nn.Module, task: LossFunction) -> None:
        self._model, self._task, self._kind = model, task, type(model).__name__
        self._device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
        self._saved = {key: _copied(value) for key, value in _state(model).items()}
        self._reset = _Reset()
        self._is_checked = self._has_said = False
        self._longest_C: np.ndarray | None = None
        self._may_pad: dict[tuple[_Lengths, _Lengths], bool] = {}

    def require_independent(self, inputs: Inputs, batch_rows: int, batch_tokens: int) -> None:
        """See on some rows that losses are those of the rows alone; the first call with any does it.

        Args:
            inputs: Rows of the corpus, or of queries.
            batch_rows: As they are scored.
            batch_tokens: As they are scored.

        Raises:
            ContractError: They are not, or a pass changes parameters.
        """
        if self._is_checked or not inputs.items:
            return
        batches = (batch.item_B for batch in inputs.batches(batch_rows, batch_tokens))
        rows = next(batches)
        if len(rows) == 1:  # a text that fills a batch: others have neighbours
            rows = next((item_B for item_B in batches if len(item_B) > 1), rows)
        arrays = inputs.rows(rows[: max(CHECKED_ROWS, len(rows) // SHARE_OF_BATCH)])
        first_B = self._losses(arrays)  # what a model sets up when it is first called is there from here on
        weights = _versions(self._model)
        length_SC = inputs.length_SC
        has_room = batch_rows > 1 if length_SC is None else len(rows) > 1 or 2 * length_SC[rows].max() <= batch_tokens
        others_B = self._beside_others(arrays) if has_room else first_B
        drawn = _generators(self._device)
        self._require_repeatable(first_B, self._losses(arrays), drawn != _generators(self._device))
        self._require_apart(first_B[: len(others_B)], others_B)
        if changed := [name for name, version in _versions(self._model).items() if weights.get(name) != version]:
            raise ContractError(
                f"{self._kind} changes its own parameters when it is called in eval mode: {_some(changed)}",
                "change them when the model is made: base and counterparts are compared as they are",
            )
        self._is_checked = True

    def batches(self, inputs: Inputs, batch_rows: int, batch_tokens: int, full: bool = False) -> Iterator[Batch]:
        """All of some inputs in batches, split to texts of one length where losses depend on padding.

        Raises:
            ContractError: See `require_independent`, which is done first.
        """
        self.require_independent(inputs, batch_rows, batch_tokens)
        batches = inputs.batches(batch_rows, batch_tokens, full)
        return batches if self.may_pad(inputs, np.arange(inputs.items)) else self._split(inputs, batches)

    def may_pad(self, inputs: Inputs, item_B: np.ndarray) -> bool:
        """Whether losses of some items are their own in one batch: the shortest and the last but one are seen beside the longest.

        What was seen of texts holds for all that are no shorter and no longer.
        """
        length_SC = inputs.length_SC
        if length_SC is None or not len(item_B):
            return True
        length_BC = length_SC[item_B]
        least, most = tuple(length_BC.min(axis=0).tolist()), tuple(length_BC.max(axis=0).tolist())
        self._see_longest(inputs, item_B, length_BC)
        if least == most or self._is_known_to_pad(least, most):
            return True
        if (least, most) not in self._may_pad:
            longest = item_B[length_BC.argmax(axis=0)]
            longer_BC = np.where(
                length_BC < length_BC.max(axis=0), length_BC, -1
            )  # padding moves a long text's loss more
            padded = np.unique(item_B[np.concatenate([length_BC.argmin(axis=0), longer_BC.argmax(axis=0)])])
            self._may_pad[least, most] = all(self._is_own_beside(inputs, item, longest) for item in padded)
            if not self._may_pad[least, most]:
                self._say_that_padding_matters(max(least), max(most))
        return self._may_pad[least, most]

    def _see_longest(self, inputs: Inputs, item_B: np.ndarray, length_BC: np.ndarray) -> None:
        """Have texts longer than any before go through once by themselves: what a model keeps of them is reset from there on."""
        most_C = length_BC.max(axis=0)
        if self._longest_C is None or (most_C > self._longest_C).any():
            for item in np.unique(item_B[length_BC.argmax(axis=0)]):
                self._losses(inputs.rows(np.array([item])))
            self._longest_C = most_C if self._longest_C is None else np.maximum(most_C, self._longest_C)

    def _say_that_padding_matters(self, shortest: int, longest: int) -> None:
        if not self._has_said:
            say(
                f"warning: {self._kind} gives a text of {shortest} tokens another loss beside one of {longest}: only texts of "
                "one length go through it together"
            )
        self._has_said = True

    def _is_known_to_pad(self, least: _Lengths, most: _Lengths) -> bool:
        return any(
            may and all(np.less_equal(low, least)) and all(np.less_equal(most, high))
            for (low, high), may in self._may_pad.items()
        )

    def _is_own_beside(self, inputs: Inputs, item: int, others: np.ndarray) -> bool:
        """Whether an item has the same loss alone and padded as it is beside others: by itself, in the memory of the longest."""
        alone = inputs.rows(np.array([item]))
        padded = {name: array[:1] for name, array in inputs.rows(np.array([item, *others])).items()}
        return self._are_same(self._losses(alone), self._losses(padded))

    def _split(self, inputs: Inputs, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches; texts of one length by themselves, where those of a batch must not go together."""
        length_SC = inputs.length_SC
        assert length_SC is not None
        for batch in batches:
            if self.may_pad(inputs, batch.item_B):
                yield batch
                continue
            _, group_B = np.unique(length_SC[batch.item_B], axis=0, return_inverse=True)
            for group in range(group_B.max(), -1, -1):  # longest first
                item_B = batch.item_B[group_B.reshape(-1) == group]
                yield Batch(item_B, inputs.rows(item_B))

    def _losses(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        """Losses [B] of rows, float64, of tensors that are copies; notes what else the pass changed."""
        dtype = dtype_of(self._model)
        with torch.inference_mode(False), torch.no_grad():
            tensors = {name: torch.tensor(array, device=self._device) for name, array in arrays.items()}
            tensors = {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}
            loss_B = self._task.loss_B(self._model, tensors).double().cpu()
        self._reset_what_changed()
        return loss_B

    def _reset_what_changed(self) -> None:
        now = _state(self._model)
        changed = [key for key in now | self._saved if not _equal(self._saved.get(key, _Absent), now.get(key, _Absent))]
        if new := [key for key in changed if key not in self._reset.saved]:
            if not self._reset.saved:
                self._model.register_forward_hook(self._reset)
            self._reset.saved |= {key: self._saved.get(key, _Absent) for key in new}
            self._reset(self._model)  # from here on the hook does it, unless a task calls but a part of the model

    def _beside_others(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        """Losses of the first half of some rows, in other places beside other rows; of one row, behind itself turned round."""
        rows = len(next(iter(arrays.values())))
        if rows > 1:
            half = (rows + 1) // 2
            row_B = np.concatenate([np.zeros(rows - half, np.int64), np.arange(half)[::-1]])
            return self._losses({name: array[row_B] for name, array in arrays.items()}).flip(0)[:half]
        turned = {name: array[..., ::-1] if array.ndim > 1 else array for name, array in arrays.items()}
        try:
            return self._losses({name: np.concatenate([turned[name], array]) for name, array in arrays.items()})[1:]
        except Exception:  # noqa: BLE001 - whatever a model says of a row that nobody gave
            return self._losses(arrays)

    def _require_repeatable(self, first_B: Tensor, again_B: Tensor, draws: bool) -> None:
        if torch.equal(first_B.nan_to_num(), again_B.nan_to_num()) or (not draws and self._are_same(first_B, again_B)):
            return
        said = f"{self._kind} gives the same rows other losses from pass to pass, up to {_distance(first_B, again_B)}"
        if draws:
            training = [name or self._kind for name, module in self._model.named_modules() if module.training]
            where = f"; in train mode: {_some(training)}" if training else ""
            raise ContractError(
                f"{said}: it draws random numbers in eval mode{where}",
                "dropout and noise must end in eval mode: `F.dropout(x, p, self.training)`",
            )
        raise ContractError(
            said, "a loss must depend on its own row and the weights alone: does the model keep anything?"
        )

    def _require_apart(self, first_B: Tensor, others_B: Tensor) -> None:
        if self._are_same(first_B, others_B):
            return
        norms = [
            name
            for name, module in self._model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            and (module.training or getattr(module, "running_mean", None) is None)
        ]
        hint = f"batch norms without statistics of their own: {_some(norms)}" if norms else "what mixes rows must not"
        raise ContractError(
            f"{self._kind} gives a row another loss beside other rows or in another place of its batch, up to "
            f"{_distance(first_B, others_B)}",
            f"a loss must depend on its own row alone: {hint}; or score rows one by one with score.batch_rows: 1",
        )

    def _are_same(self, left_B: Tensor, right_B: Tensor) -> bool:
        by = TOLERANCE if dtype_of(self._model).itemsize >= 4 else TOLERANCE_IN_HALF
        return torch.allclose(left_B, right_B, rtol=by, atol=by, equal_nan=True)


class _Reset:
    """A forward hook: what a pass changed of a model's state is again what it was. It serves copies of the model too."""

    def __init__(self) -> None:
        self.saved: dict[_Key, Any] = {}

    def __call__(self, model: nn.Module, *_: Any) -> None:
        for (path, name), value in self.saved.items():
            module = model.get_submodule(path)
            current = getattr(module, name, _Absent)
            if value is _Absent:
                if current is not _Absent:
                    delattr(module, name)
            else:  # a tensor of its own: what the pass used may be needed for its gradients
                device = current.device if isinstance(current, Tensor) else None
                with torch.inference_mode(False):
                    setattr(module, name, value.to(device, copy=True) if isinstance(value, Tensor) else value)


def _state(model: nn.Module) -> dict[_Key, Any]:
    """Buffers, and attributes of modules that are numbers, words or tensors."""
    found: dict[_Key, Any] = {}
    for path, module in model.named_modules():
        plain = {
            name: value for name, value in vars(module).items() if isinstance(value, _PLAIN) and name != "training"
        }
        found |= {(path, name): value for name, value in (plain | dict(module._buffers.items())).items()}
    return found


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _equal(before: Any, now: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        now = now.detach().to(before.device)
        is_alike = (before.dtype, before.shape) == (now.dtype, now.shape)
        return is_alike and bool(((before == now) | (before.isnan() & now.isnan())).all())
    return before is now or (type(before) is type(now) and bool(before == now))


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Of every parameter: where it lies, and how often it was changed in place."""
    return {name: (each.data_ptr(), each._version) for name, each in model.named_parameters()}


def _generators(device: torch.device) -> list[bytes]:
    """States of torch's generators of random numbers."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [state.numpy().tobytes() for state in states]


def _distance(left_B: Tensor, right_B: Tensor) -> str:
    return f"{float((left_B - right_B).abs().nan_to_num().max()):.2g} nats"


def _some(names: list[str]) -> str:
    more = len(names) - MAX_NAMES_SHOWN
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
