"""The protocol of a loader: one method. And the check that weights fit, which all of them need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from ..errors import MAX_NAMES_SHOWN, ContractError


class Loader(Protocol):
    """Makes the base model. Its constructor takes the spec's fields as keyword arguments."""

    def load(self, device: str, seed: int) -> nn.Module:
        """The model with its weights, in eval mode, on `device`, in the spec's dtype.

        Raises:
            InputError: The weights cannot be read.
            ContractError: They do not fit the model.
        """
        ...


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Copy a state dict into a model, all of it or none.

    Raises:
        ContractError: Names or shapes differ; they are listed.
    """
    own = model.state_dict()
    problems = [f"missing {name} {list(own[name].shape)}" for name in own if name not in weights]
    problems += [f"unexpected {name} {list(weights[name].shape)}" for name in weights if name not in own]
    problems += [
        f"{name} is {list(weights[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    ]
    require_fit(problems, origin, type(model).__name__)
    model.load_state_dict(dict(weights))


def require_fit(problems: Sequence[str], origin: str, model: str) -> None:
    """See that nothing stands between weights and a model. Raises ContractError, with the first of them."""
    if problems:
        more = f"\n  and {len(problems) - MAX_NAMES_SHOWN} more" if len(problems) > MAX_NAMES_SHOWN else ""
        shown = "\n".join(f"  {problem}" for problem in problems[:MAX_NAMES_SHOWN])
        raise ContractError(f"weights {origin} do not fit {model}:\n{shown}{more}")


def in_own_memory(model: nn.Module) -> nn.Module:
    """The model, with no tensor in memory that is mapped from a file: what is written to the file must not change it."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model
