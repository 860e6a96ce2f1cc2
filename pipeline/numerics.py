"""Precision: in what a model computes, and in what losses and gradients are kept. Knows torch only."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

_CASTS = {
    torch.float16: nn.Module.half,
    torch.bfloat16: nn.Module.bfloat16,
    torch.float32: nn.Module.float,
    torch.float64: nn.Module.double,
}


def to_loss_dtype(values: Tensor) -> Tensor:
    """Upcast half-precision outputs to float32, so that the loss is computed in float32 or better."""
    return values if values.dtype.itemsize >= 4 else values.float()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model's real floating-point tensors, in place. Complex ones keep their type: `model.to(dtype)` makes them real."""
    return _CASTS[dtype](model)


def dtype_of(model: nn.Module) -> torch.dtype:
    """In which a model computes: of its first real floating-point parameter or buffer; float32 if it has none."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
