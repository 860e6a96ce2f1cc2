"""The protocol of a loader: one method. And the check that weights fit, which all of them need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import MAX_NAMES_SHOWN, ContractError, NumericsError


class Loader(Protocol):
    """Makes the base model. Its constructor takes the spec's fields as keyword arguments."""

    def load(self, device: str, seed: int) -> nn.Module:
        """The model with its weights, in eval mode, on `device`, in the spec's dtype.

        Raises:
            InputError: The weights cannot be read.
            ContractError: They do not fit the model.
            NumericsError: They are not finite.
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


def require_finite(model: nn.Module, origin: str) -> None:
    """See that the weights of a model are numbers, before anything is computed from them.

    Buffers may hold infinities, as masks do.

    Raises:
        NumericsError: Some are NaN or infinite; the tensors are named.
    """
    problems = []
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if counts := _not_finite(tensor.detach(), infinite_too=kind == "parameter"):
                problems.append(f"{kind} {name} {list(tensor.shape)}: {counts}")
    if problems:
        raise NumericsError(
            f"weights {origin} are not finite:\n{_first_of(problems)}",
            "they were saved so, or overflow in model.dtype: check the training that made them",
        )


def _not_finite(tensor: Tensor, infinite_too: bool) -> str:
    """How many numbers of a tensor are NaN or infinite; empty if none is."""
    if not tensor.numel() or tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return ""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if numbers.dtype.itemsize < 2:  # float8 has no arithmetic
        numbers = numbers.float()
    extremes = torch.stack(torch.aminmax(numbers))  # NaN if any number is; no copy of a large tensor
    if extremes.isfinite().all():
        return ""
    counts = {"NaN": int(numbers.isnan().sum()), "infinite": int(numbers.isinf().sum()) if infinite_too else 0}
    return ", ".join(f"{count:,} of {numbers.numel():,} {what}" for what, count in counts.items() if count)


def _first_of(problems: Sequence[str]) -> str:
    """The first few, a line each, and how many more there are."""
    more = f"\n  and {len(problems) - MAX_NAMES_SHOWN} more" if len(problems) > MAX_NAMES_SHOWN else ""
    return "\n".join(f"  {problem}" for problem in problems[:MAX_NAMES_SHOWN]) + more


def require_fit(problems: Sequence[str], origin: str, model: str) -> None:
    """See that nothing stands between weights and a model. Raises ContractError, with the first of them."""
    if problems:
        raise ContractError(f"weights {origin} do not fit {model}:\n{_first_of(problems)}")


def in_own_memory(model: nn.Module) -> nn.Module:
    """The model, with no tensor in memory that is mapped from a file: what is written to the file must not change it."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model
