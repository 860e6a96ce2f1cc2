"""What a model returns: its logits, wherever they are in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ContractError


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


def _described(out: Any) -> str:
    kind = type(out).__name__
    if isinstance(out, Mapping):
        return f"{kind} with the keys {', '.join(map(repr, out))}"
    if isinstance(out, tuple | list):
        return f"{kind} of {', '.join(type(item).__name__ for item in out)}"
    return kind
