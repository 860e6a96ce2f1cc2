"""What a model returns: its logits, wherever they are in it, and labels as they predict them.

Shapes: M predictions, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ContractError, NumericsError


def logits_of(model: nn.Module, out: Any) -> Tensor:
    """The logits in what a model returned: a tensor, an output with the attribute `logits`, or a dict with that key.

    Raises:
        ContractError: There are none.
    """
    found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    found = out if isinstance(out, Tensor) else found
    if isinstance(found, Tensor):
        return found
    name = type(getattr(model, "stands_for", model)).__name__
    raise ContractError(
        f"{name} returned {_described(out)}, expected a tensor of logits, or an output with `logits`",
        "let model.factory return a module that calls it and returns the logits alone; or write a task of your own, "
        "package.module:Class",
    )


def drawn_classes(chance_MC: Tensor, uniform_M: Tensor) -> Tensor:
    """Classes [M], each that in which a uniform number lies, of a line on which every class has its chance.

    Args:
        chance_MC: Chances, not negative; a row need not add up to 1.
        uniform_M: Numbers in (0, 1).

    Raises:
        NumericsError: A chance is not finite.
    """
    ends_MC = chance_MC.double().cumsum(dim=1)
    if not ends_MC[:, -1].isfinite().all():
        raise NumericsError(
            "the model's predictions on rows of the corpus are not finite: no labels can be drawn",
            "check the weights, and the corpus's rows",
        )
    at_M1 = (uniform_M * ends_MC[:, -1])[:, None]
    # a class without a chance ends where the one before it does, and is passed over
    return torch.searchsorted(ends_MC, at_M1, right=True)[:, 0].clamp(max=chance_MC.shape[1] - 1)


def _described(out: Any) -> str:
    kind = type(out).__name__
    if isinstance(out, Mapping):
        return f"{kind} with the keys {', '.join(map(repr, out))}"
    if isinstance(out, tuple | list):
        return f"{kind} of {', '.join(type(item).__name__ for item in out)}"
    return kind
