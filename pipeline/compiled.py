"""Blocks of a model as torch.compile makes them. Knows torch only.

The model is not compiled as a whole, but its blocks are, each for itself: those that are alike are compiled once, what tasks and
the shared trunk do between them stays as it is, and a model's own code around them needs nothing that a compiler can follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from .forwards import Forward, replaced

KINDS = 256
"""Of blocks, that differ in structure or in shapes, and are then compiled each for itself; torch stops at 8."""


class Compiled:
    """Blocks of a model, which run compiled while `is_on`, else as they are.

    Args:
        blocks: Modules of the model, none in another.
        of_any_shape: Whether batches differ in shape: what is compiled then serves all of them but those of one row, so that an
            example's loss does not depend on the batches before its own.
    """

    def __init__(self, blocks: Sequence[nn.Module], of_any_shape: bool) -> None:
        self.blocks, self.is_on, self._of_any_shape = tuple(blocks), False, of_any_shape
        self._forwards = {block: self._either(block.forward) for block in blocks}

    @property
    def told(self) -> str:
        """What the blocks are, for people: `30 LlamaDecoderLayer`."""
        names = sorted({type(block).__name__ for block in self.blocks})
        return f"{len(self.blocks)} {', '.join(names)}"

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The blocks can run compiled within. Raises as `replaced`."""
        of_any_kind = torch._dynamo.config.patch(recompile_limit=KINDS)
        apart = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        with of_any_kind, apart, replaced(self._forwards):
            yield

    def is_blamed(self, error: RuntimeError) -> bool:
        """Whether it is the compiler that failed, not what it compiled or what runs beside it."""
        return self.is_on and isinstance(error, torch._dynamo.exc.TorchDynamoException)

    def _either(self, forward: Forward) -> Forward:
        @cache  # not before it is wanted: the compiler takes seconds to load
        def fast() -> Forward:
            return torch.compile(forward, fullgraph=True, dynamic=self._of_any_shape)  # whole, or an error

        def either(*args: Any, **keywords: Any) -> Any:
            return (fast() if self.is_on else forward)(*args, **keywords)

        return either
