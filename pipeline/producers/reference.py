"""An existing checkpoint as the counterpart: nothing is tuned, two given models are compared.

With this CoLoR-Filter compares a prior with a conditional model (2406.10670), RHO-LOSS and Rho-1 a model with its reference
(2206.07137, 2404.07965), Moore-Lewis a general with an in-domain one (ACL 2010); DavIR does so relative to the base (2310.13008).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ContractError
from ..loaders.base import load_weights, require_finite
from ..loaders.hf_transformers import HfTransformers, merged
from ..loaders.torch_module import read_weights
from ..model_folder import is_folder
from ..tasks.base import Batch, Task
from .base import Produced


class Reference:
    """See Producer.

    Args:
        weights_uri: The counterpart's weights: a state dict, or a folder in Hugging Face format; null for the base's own.
        adapter_uri: A PEFT adapter on top; null for none.
        direction: -1 if examples that the counterpart finds easier than the base score high.
    """

    needs_query = False

    def __init__(self, weights_uri: str | None, adapter_uri: str | None, direction: int) -> None:
        self._weights_uri, self._adapter_uri = weights_uri, adapter_uri
        self.direction = direction

    def produce(self, base: nn.Module, task: Task, query: Batch, seed: int) -> Produced:
        """See Producer.

        Raises:
            InputError: The weights cannot be read.
            ContractError: They are of another architecture.
            NumericsError: They are not finite.
        """
        model = self._model(base)
        if self._adapter_uri is not None:
            model = merged(model, self._adapter_uri)
        origin = str(self._adapter_uri or self._weights_uri)
        _require_alike(base.state_dict(), model.state_dict(), origin)
        require_finite(model, origin)
        return Produced(model.eval(), steps=0)

    def _model(self, base: nn.Module) -> nn.Module:
        if self._weights_uri is None:
            return copy.deepcopy(base)
        if not is_folder(self._weights_uri):
            model = copy.deepcopy(base)
            load_weights(model, read_weights(self._weights_uri), self._weights_uri)
            return model
        floats = (parameter for parameter in base.parameters() if parameter.is_floating_point())
        first = next(floats, torch.empty(0))
        dtype, attention = str(first.dtype).removeprefix("torch."), getattr(base, "config", None)
        attention = getattr(attention, "_attn_implementation", None)  # another kernel rounds in another way
        return HfTransformers(self._weights_uri, dtype, attention=attention).load(first.device.type, 0)


def _require_alike(base: Mapping[str, Tensor], other: Mapping[str, Tensor], origin: str) -> None:
    """See that a counterpart is of the base's architecture. Raises ContractError."""
    for name in sorted(base.keys() | other.keys()):
        shapes: list[Any] = [list(side[name].shape) if name in side else "not there" for side in (other, base)]
        if shapes[0] != shapes[1]:
            raise ContractError(
                f"{origin} is no counterpart of the base model: {name} is {shapes[0]} in it, {shapes[1]} in the base",
                "both must be checkpoints of one architecture",
            )
