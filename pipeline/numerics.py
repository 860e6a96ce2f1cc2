"""Precision: in what losses and gradients are kept."""

from __future__ import annotations

from torch import Tensor


def to_loss_dtype(values: Tensor) -> Tensor:
    """Upcast half-precision outputs to float32, so that the loss is computed in float32 or better."""
    return values if values.dtype.itemsize >= 4 else values.float()
