"""Layers whose weights are a matrix applied at many positions: linear ones, convolutions. Their gradients, from both sides.

Shapes: B rows of a batch, T positions, I inputs (one more for a bias), O outputs, Q anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Parameters

_PADDED: Mapping[str, str] = {"zeros": "constant"}
"""torch's name for a convolution's padding -> the same for `pad`, where they differ."""


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
        weight = tensors[self.weight]
        matrix = weight.mT if _is_transposed(self.module) else weight.flatten(2)
        return torch.cat([matrix, tensors[self.bias][..., None]], dim=-1) if self.bias else matrix

    def parted(self, matrix_QOI: Tensor) -> dict[str, Tensor]:
        """What `joined` makes of it, back: name -> [Q, *shape]."""
        weight = matrix_QOI[..., :-1] if self.bias else matrix_QOI
        shape: Any = self.module.weight.shape
        turned = weight.mT if _is_transposed(self.module) else weight.reshape(len(weight), *shape)
        return {self.weight: turned, **({self.bias: matrix_QOI[..., -1]} if self.bias else {})}

    def inputs(self, given: Tensor) -> Tensor:
        """What it was called with as [B, T, I], float32 or better, with a 1 for the bias."""
        given = given if given.dtype.itemsize >= 4 else given.float()
        if isinstance(self.module, nn.Conv1d | nn.Conv2d):
            input_BTI = _patches(self.module, given)
        else:
            input_BTI = given.reshape(len(given), -1, given.shape[-1])
        return F.pad(input_BTI, (0, 1), value=1.0) if self.bias else input_BTI

    def slopes(self, given: Tensor) -> Tensor:
        """Gradients of what it returned as [B, T, O], float32 or better."""
        given = given if given.dtype.itemsize >= 4 else given.float()
        if isinstance(self.module, nn.Conv1d | nn.Conv2d):
            return given.flatten(2).mT
        return given.reshape(len(given), -1, given.shape[-1])


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__module__ == "transformers.pytorch_utils"


def _patches(module: nn.Conv1d | nn.Conv2d, given: Tensor) -> Tensor:
    """What the kernel sees at each of its places: [B, T, I]."""
    padding = module._reversed_padding_repeated_twice
    padded = F.pad(given, padding, mode=_PADDED.get(module.padding_mode, module.padding_mode))
    if isinstance(module, nn.Conv1d):
        kernel, dilation, stride = ((1, *each) for each in (module.kernel_size, module.dilation, module.stride))
        return F.unfold(padded[:, :, None], kernel, dilation=dilation, stride=stride).mT
    return F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride).mT


def layers_in(model: nn.Module, parameters: Parameters) -> dict[str, Layer]:
    """Layers of these kinds by the name of their weight; without grouped convolutions, and without weights of two layers."""
    names = {id(tensor): name for name, tensor in parameters.tensors.items()}
    found: dict[str, Layer] = {}
    several: set[str] = set()
    for module in model.modules():
        plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1)
        if not (plain or (_is_transposed(module) and type(module).__name__ == "Conv1D")):
            continue
        weight, bias = names.get(id(module.weight)), names.get(id(module.bias))
        if weight is not None:
            several |= {name for each in found.values() for name in each.names if name in (weight, bias)}
            found[weight] = Layer(module, weight, bias)
    return {weight: layer for weight, layer in found.items() if not several & set(layer.names)}


@dataclass
class Calls:
    """What a layer was called with and returned, while it was watched."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(layers: Mapping[str, Layer]) -> Iterator[dict[str, Calls]]:
    """Calls of layers that gradients flow through, in the block; by the name of the layer's weight."""
    calls = {name: Calls() for name in layers}
    handles = [layer.module.register_forward_hook(_keeping(calls[name])) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _keeping(calls: Calls) -> Any:
    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not (torch.is_grad_enabled() and output.requires_grad and args):
            return None
        calls.inputs.append(args[0].detach())
        calls.outputs.append(output)
        return output.clone()  # what is watched must not be changed in place

    return keep


def row_slices(rows: int, numbers_each: int, most_bytes: int) -> Sequence[slice]:
    """Pieces of a batch of so many rows, so that so many numbers of each row fit."""
    size = max(1, most_bytes // (4 * numbers_each))
    return [slice(start, start + size) for start in range(0, rows, size)]
