"""MLPs of two hidden layers for the tables of `faithful_tabular`."""

from __future__ import annotations

from torch import nn


def cancer() -> nn.Module:
    """30-32-16-2 with GELU, 1,554 numbers; [B, 30] -> logits [B, 2]."""
    return nn.Sequential(nn.Linear(30, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 2))


def made() -> nn.Module:
    """20-48-32-5 with tanh, 2,741 numbers; [B, 20] -> logits [B, 5]."""
    return nn.Sequential(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5))
