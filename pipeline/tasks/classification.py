"""Classification: cross-entropy of an integer label.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ContractError
from ..numerics import to_loss_dtype
from ..records import Column
from .base import Batch, Uniforms
from .outputs import drawn_classes, halvings, logits_of

FEW_CLASSES = 32
"""Up to here torch's cross-entropy is slower on a CPU than its definition: .14 us a row of 10 classes, against .035."""


class Classification:
    """Cross-entropy, in nats, of `label` under `model(features) / temperature`.

    The model returns logits [B, C], or an output that has them as `logits`.

    Args:
        features: Corpus column(s) of the input.
        label: Corpus column of the class, from 0.
        shape: Shape of one input.
        mean: Per-channel mean to subtract; empty for none.
        std: Per-channel standard deviation to divide by; empty for none.
        temperature: Logits are divided by it; null for 1.
    """

    def __init__(
        self,
        features: str | Sequence[str],
        label: str,
        shape: Sequence[int],
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        temperature: float | None = None,
    ) -> None:
        self._features = (features,) if isinstance(features, str) else tuple(features)
        self._label = label
        self._shape = tuple(shape)
        self._mean, self._std, self._temperature = tuple(mean), tuple(std), temperature or 1.0

    def columns(self) -> list[Column]:
        """See Task."""
        return [Column("features", self._features, "float32", self._shape), Column("label", (self._label,), "int64")]

    def loss_B(self, model: nn.Module, batch: Batch) -> Tensor:
        """See Task. A label outside the model's classes has no loss: NaN."""
        label_B, tempered_BC = batch["label"], self._tempered(model, batch)
        outside_B = (label_B < 0) | (label_B >= tempered_BC.shape[1])
        loss_B = cross_entropy(tempered_BC, label_B.masked_fill(outside_B, 0))
        return loss_B.masked_fill(outside_B, torch.nan)

    def sampled(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Batch:
        """See Samples: labels drawn at the temperature."""
        with torch.no_grad():
            chance_BC = self._tempered(model, batch).softmax(dim=1)
        return {**batch, "label": drawn_classes(chance_BC, uniforms(halvings(chance_BC.shape[1])))}

    def _tempered(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, C] over the temperature, float32 or better. Raises ContractError if the model returns anything else."""
        logits_BC, rows = logits_of(model, model(self._normalised(batch["features"]))), len(batch["label"])
        if logits_BC.ndim != 2 or len(logits_BC) != rows or logits_BC.shape[1] < 2:
            raise ContractError(
                f"the model returned logits of shape {list(logits_BC.shape)}, expected [{rows}, classes] of 2 classes or more",
                "a classifier returns a logit for each class; of one logit z, for the second of two classes, return "
                "torch.stack([torch.zeros_like(z), z], dim=1)",
            )
        return to_loss_dtype(logits_BC) / self._temperature

    def _normalised(self, features: Tensor) -> Tensor:
        channels = (-1, *[1] * (len(self._shape) - 1))
        if self._mean:
            features = features - torch.tensor(self._mean, dtype=features.dtype, device=features.device).view(channels)
        if self._std:
            features = features / torch.tensor(self._std, dtype=features.dtype, device=features.device).view(channels)
        return features


def cross_entropy(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """Losses [B], in nats: minus the logarithm of a label's share in the exponentials."""
    if logits_BC.shape[1] > FEW_CLASSES or logits_BC.device.type != "cpu":
        return F.cross_entropy(logits_BC, label_B, reduction="none")
    below_BC = logits_BC - logits_BC.detach().amax(dim=1, keepdim=True)
    return below_BC.exp().sum(dim=1).log() - below_BC.gather(1, label_B[:, None])[:, 0]
