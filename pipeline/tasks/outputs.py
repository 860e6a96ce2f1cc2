"""What a model returns: its logits, wherever they are in it, and labels as they predict them.

Shapes: M predictions, C classes, L times that these are halved.
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


def halvings(classes: int) -> int:
    """How often so many classes are halved until one is left: the numbers that `drawn_classes` takes for each prediction."""
    return (classes - 1).bit_length()


def drawn_classes(chance_MC: Tensor, uniform_ML: Tensor) -> Tensor:
    """Classes [M], drawn with their chances: of two halves of the classes one is taken, of its two halves one, ...

    A number for each choice, and not one for all, since the inverse of a cumulative distribution moves with every class before
    the one that is drawn: between a model in bfloat16 and in float32 11 % of labels of 300 classes were others, by halves 1 %.

    Args:
        chance_MC: Chances, not negative; a row need not add up to 1.
        uniform_ML: Numbers in (0, 1), independent; L is `halvings(C)`.

    Raises:
        NumericsError: A chance is not finite.
    """
    halved = uniform_ML.shape[1]
    sums = [torch.nn.functional.pad(chance_MC.double(), (0, 2**halved - chance_MC.shape[1]))]
    for _ in range(halved):
        sums.append(sums[-1].unflatten(1, (-1, 2)).sum(dim=2))
    if not sums[-1].isfinite().all():
        raise NumericsError(
            "the model's predictions on rows of the corpus are not finite: no labels can be drawn",
            "check the weights, and the corpus's rows",
        )
    at_M1 = torch.zeros(len(chance_MC), 1, dtype=torch.int64, device=chance_MC.device)
    for each, uniform_M in zip(reversed(sums[:-1]), uniform_ML.unbind(dim=1), strict=True):
        left_M1, right_M1 = (each.gather(1, 2 * at_M1 + side) for side in (0, 1))
        at_M1 = 2 * at_M1 + (uniform_M[:, None] * (left_M1 + right_M1) >= left_M1)  # never a half without a chance
    return at_M1[:, 0]


def _described(out: Any) -> str:
    kind = type(out).__name__
    if isinstance(out, Mapping):
        return f"{kind} with the keys {', '.join(map(repr, out))}"
    if isinstance(out, tuple | list):
        return f"{kind} of {', '.join(type(item).__name__ for item in out)}"
    return kind
