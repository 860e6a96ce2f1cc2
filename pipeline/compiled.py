"""Parts of a model as torch.compile makes them. Knows torch only.

The model is not compiled as a whole, but its blocks are, each for itself: those that are alike are compiled once, what tasks and
the shared trunk do between them stays as it is, and a model's own code around them needs nothing that a compiler can follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from .forwards import Forward, replaced

KINDS = 256
"""Of parts, that differ in structure or in shapes, and are then compiled each for itself; torch stops at 8."""


class Compiled:
    """Parts of a model that run as they are, until they are turned on: then compiled.

    Args:
        parts: Modules of the model, none in another; or the model.
        of_any_shape: Whether batches differ in shape: what is compiled then serves all, so that an example's loss does not
            depend on those before its own.
    """

    def __init__(self, parts: Sequence[nn.Module], of_any_shape: bool) -> None:
        self.parts, self.is_on, self._during = tuple(parts), False, ExitStack()
        self._forwards = {part: self._either(part.forward, of_any_shape) for part in parts}

    @property
    def told(self) -> str:
        """What the parts are, for people: `30 LlamaDecoderLayer`."""
        names = sorted({type(part).__name__ for part in self.parts})
        return f"{len(self.parts)} {', '.join(names)}"

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The parts can run compiled in the block. Raises as `replaced`."""
        with torch._dynamo.config.patch(recompile_limit=KINDS), replaced(self._forwards), ExitStack() as self._during:
            if self.is_on:
                self.keep_on()
            yield

    def keep_on(self) -> None:
        """What cannot be compiled from now on, for another shape or because a disk is full, runs as it is: torch logs why."""
        self._during.enter_context(torch._dynamo.config.patch(suppress_errors=True))

    def _either(self, forward: Forward, of_any_shape: bool) -> Forward:
        @cache  # not before it is wanted: the compiler takes seconds to load
        def fast() -> Forward:
            return torch.compile(forward, dynamic=of_any_shape)

        def either(*args: Any, **keywords: Any) -> Any:
            return (fast() if self.is_on else forward)(*args, **keywords)

        return either
