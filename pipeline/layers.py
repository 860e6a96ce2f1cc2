"""Layers, and gradients of single rows from both sides of them: what they were given, and gradients of what they returned.

Shapes: B rows of a batch, T positions, I inputs (one more for a bias), O outputs, Q anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .changes import LowRank
from .numerics import to_loss_dtype

_PADDED: Mapping[str, str] = {"zeros": "constant"}
"""torch's name for a convolution's padding -> the same for `pad`, where they differ."""


_entry_rows: ContextVar[Tensor | None] = ContextVar("entry_rows", default=None)


@contextmanager
def entries_of(row_M: Tensor) -> Iterator[None]:
    """In the block layers are called with entries of some rows of a batch, one behind the other, instead of with rows.

    Args:
        row_M: Which row each is of, ascending.
    """
    token = _entry_rows.set(row_M)
    try:
        yield
    finally:
        _entry_rows.reset(token)


def entry_rows() -> Tensor | None:
    """What `entries_of` said; null outside of it."""
    return _entry_rows.get()


class Use(Protocol):
    """A layer that uses chosen parameters."""

    @property
    def module(self) -> nn.Module:
        """The layer."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Of the parameters."""
        ...

    def gradients(self, given: Tensor, slope: Tensor) -> dict[str, Tensor]:
        """Parameter name -> gradient of every row's loss, [B, *shape], float32 or better.

        Args:
            given: What the layer was called with, [B, ...].
            slope: Gradients of the rows' losses in what it returned, [B, ...].
        """
        ...


@dataclass(frozen=True)
class Layer:
    """A layer: output = weight matrix [O, I] times input, plus bias, at every position.

    Args:
        module: nn.Linear, nn.Conv1d, nn.Conv2d, or the Conv1D of transformers (a linear layer with its weight transposed).
        weight: Name of its weight among the chosen parameters.
        bias: Name of its bias; null if it has none, or it is not chosen.
    """

    module: nn.Module
    weight: str
    bias: str | None

    @property
    def names(self) -> list[str]:
        """Its parameters."""
        return [self.weight, *([self.bias] if self.bias else [])]

    def joined(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Something of its parameters' shapes, [Q, *shape] each, as one matrix: [Q, O, I]."""
        matrix = self.joined_weight(tensors[self.weight])
        return torch.cat([matrix, tensors[self.bias][..., None]], dim=-1) if self.bias else matrix

    def parted(self, matrix_QOI: Tensor) -> dict[str, Tensor]:
        """What `joined` makes of it, back: name -> [Q, *shape]."""
        weight = matrix_QOI[..., :-1] if self.bias else matrix_QOI
        shape: Any = self.module.weight.shape
        turned = weight.mT if _is_transposed(self.module) else weight.reshape(len(weight), *shape)
        return {self.weight: turned, **({self.bias: matrix_QOI[..., -1]} if self.bias else {})}

    def joined_weight(self, weight: Tensor) -> Tensor:
        """Something of its weight's shape, [Q, *shape], as one matrix: [Q, O, I]."""
        return weight.mT if _is_transposed(self.module) else weight.flatten(2)

    def turned(self, change: LowRank) -> LowRank:
        """A change of its weight as one of the matrix [O, I]."""
        return LowRank(change.right.mT, change.left.mT) if _is_transposed(self.module) else change

    def gradients(self, given: Tensor, slope: Tensor) -> dict[str, Tensor]:
        """See Use."""
        return self.parted(self.slopes(to_loss_dtype(slope)).mT @ self.inputs(given))

    def inputs(self, given: Tensor) -> Tensor:
        """What it was called with as [B, T, I], float32 or better, with a 1 for the bias."""
        input_BTI = self.positions(to_loss_dtype(given))
        return F.pad(input_BTI, (0, 1), value=1.0) if self.bias else input_BTI

    def positions(self, given: Tensor) -> Tensor:
        """What it was called with as [B, T, I], as it is."""
        if isinstance(self.module, nn.Conv1d | nn.Conv2d):
            return _patches(self.module, given)
        return given.reshape(len(given), -1, given.shape[-1])

    def slopes(self, given: Tensor) -> Tensor:
        """Gradients of what it returned as [B, T, O], as they are."""
        if isinstance(self.module, nn.Conv1d | nn.Conv2d):
            return given.flatten(2).mT
        return given.reshape(len(given), -1, given.shape[-1])


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D"


def _patches(module: nn.Conv1d | nn.Conv2d, given: Tensor) -> Tensor:
    """What the kernel sees at each of its places: [B, T, I]."""
    padding = module._reversed_padding_repeated_twice
    padded = F.pad(given, padding, mode=_PADDED.get(module.padding_mode, module.padding_mode))
    if isinstance(module, nn.Conv1d):
        kernel, dilation, stride = ((1, *each) for each in (module.kernel_size, module.dilation, module.stride))
        return F.unfold(padded[:, :, None], kernel, dilation=dilation, stride=stride).mT
    return F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride).mT


@dataclass(frozen=True)
class Scale:
    """A layer that multiplies by a weight and adds a bias, number by number, in the end: norms of all sorts.

    Args:
        module: The layer.
        weight: Name of its weight.
        bias: Name of its bias; null if it has none, or it is not chosen.
    """

    module: nn.Module
    weight: str
    bias: str | None

    @property
    def names(self) -> list[str]:
        """Its parameters."""
        return [self.weight, *([self.bias] if self.bias else [])]

    def gradients(self, given: Tensor, slope: Tensor) -> dict[str, Tensor]:
        """See Use. What the weight multiplies is the difference between weights of one and of none."""
        with torch.no_grad():
            ones = {name: torch.ones_like(each) for name, each in self.module.named_parameters()}
            zeros = {name: torch.zeros_like(each) for name, each in ones.items()}
            factor = functional_call(self.module, ones | {"bias": zeros["bias"]} if "bias" in ones else ones, (given,))
            factor = to_loss_dtype(factor) - to_loss_dtype(functional_call(self.module, zeros, (given,)))
        found = {self.weight: self._summed(to_loss_dtype(slope) * factor)}
        return found | ({self.bias: self._summed(to_loss_dtype(slope))} if self.bias else {})

    def _summed(self, each: Tensor) -> Tensor:
        """Over positions: of [B, ...] the sums [B, *shape]."""
        shape: Any = self.module.weight.shape
        if isinstance(self.module, nn.GroupNorm | nn.modules.batchnorm._NormBase):
            each = each.movedim(1, -1)
        return each.reshape(len(each), -1, *shape).sum(dim=1)


@dataclass(frozen=True)
class Lookup:
    """A table of vectors: nn.Embedding.

    Args:
        module: The layer.
        weight: Name of its weight [words, width].
    """

    module: nn.Embedding
    weight: str

    @property
    def names(self) -> list[str]:
        """Its parameter."""
        return [self.weight]

    def gradients(self, given: Tensor, slope: Tensor) -> dict[str, Tensor]:
        """See Use."""
        rows, (words, width) = len(given), self.module.weight.shape
        place_BT = given.flatten(1) + words * torch.arange(rows, device=given.device)[:, None]
        total = to_loss_dtype(slope).new_zeros(rows * words, width)
        total.index_add_(0, place_BT.flatten(), to_loss_dtype(slope).reshape(-1, width))
        return {self.weight: total.view(rows, words, width)}


def uses_in(model: nn.Module, chosen: Mapping[str, Tensor]) -> list[Use]:
    """Layers of these kinds that use chosen parameters. What they are taken for is a guess, to be checked."""
    names = {id(tensor): name for name, tensor in chosen.items()}
    found: list[Use] = []
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        weight, bias = (names.get(id(own.get(each))) for each in ("weight", "bias"))
        if weight is None or not own.keys() <= {"weight", "bias"} or any(each.is_complex() for each in own.values()):
            continue
        if isinstance(module, nn.Embedding):
            found.append(Lookup(module, weight))
        elif isinstance(module, nn.Linear) or _is_transposed(module):
            found.append(Layer(module, weight, bias))
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            found += [Layer(module, weight, bias)] if module.groups == 1 else []
        elif _may_scale(module, own):
            found.append(Scale(module, weight, bias))
    return found


def _may_scale(module: nn.Module, own: Mapping[str, Tensor]) -> bool:
    """Whether a module may be a norm: of a matrix, as a router of experts has, only torch's own are."""
    shapes = {each.shape for each in own.values()}
    flat = all(len(shape) < 2 for shape in shapes) or isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return len(shapes) == 1 and flat and not list(module.children())


def layers_in(model: nn.Module, chosen: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Layers with a matrix of weights, by the name of their weight."""
    return {use.weight: use for use in uses_in(model, chosen) if isinstance(use, Layer)}


@dataclass
class Calls:
    """What a layer was called with and returned, while it was watched."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(uses: Sequence[Use]) -> Iterator[list[Calls]]:
    """Calls of layers that gradients flow through, in the block; one for each use."""
    calls = [Calls() for _ in uses]
    handles = [use.module.register_forward_hook(_keeping(each)) for use, each in zip(uses, calls, strict=True)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _keeping(calls: Calls) -> Any:
    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        seen = torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad
        if not (seen and args and isinstance(args[0], Tensor)):
            return None
        calls.inputs.append(args[0].detach())
        calls.outputs.append(output)
        return output.clone()  # what is watched must not be changed in place

    return keep


def row_slices(rows: int, numbers_each: int, most_bytes: int) -> Sequence[slice]:
    """Pieces of a batch of so many rows, so that so many numbers of each row fit."""
    size = max(1, most_bytes // (4 * numbers_each))
    return [slice(start, start + size) for start in range(0, rows, size)]
