"""What a model and its changed copies have in common: everything up to the first module that a change touches. Knows torch only.

Given the same batch, a model and its copy with other tensors do the same until the first module that owns such a tensor is
called. What the modules before it returned is recorded in the base's pass and given back, not computed, in those of its copies.
This asks nothing of the model but that tensors are used in calls of the modules that own them, and it is not trusted: who uses
it compares losses with those of whole passes once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .forwards import Forward, replaced


class Trunk:
    """Records what modules return before the first change, and gives it back.

    Only the outermost modules that ended before the first change are recorded: of a transformer whose last block changes, the
    embedding and every other block; of that block, what stands before the changed layer.

    Args:
        model: The model; its `forward` is never replaced, those of the modules in it are, within `installed`.
        changed: Tensors of it that copies have otherwise.
        wholes: Modules into which one cannot look: what is in them is shared with all of them or not at all.
    """

    def __init__(self, model: nn.Module, changed: Collection[Tensor], wholes: Collection[nn.Module] = ()) -> None:
        slots = {id(tensor) for tensor in changed}
        inside = {module for whole in wholes for module in whole.modules() if module is not whole}
        self._modules = [module for module in model.modules() if module is not model and module not in inside]
        self._owners = {module for module in model.modules() if not slots.isdisjoint(map(id, _own(module)))}
        self._model = model
        self._returned: list[tuple[nn.Module, Any]] = []
        self._called: set[nn.Module] = set()
        self._is_tracing = self._is_recording = self._is_replaying = False
        self._given = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was recorded: the first module of all is changed."""
        return not self._returned

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Modules can be recorded and replayed in the block.

        Raises:
            AttributeError, RuntimeError: A module does not let its `forward` be replaced, as compiled ones do not.
        """
        try:
            with replaced({module: self._watched(module, module.forward) for module in self._modules}):
                yield
        finally:
            self._returned.clear()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """See in the block which modules are called; a tensor whose owner is not counts as its container's.

        Some containers use what is in them by other means than a call, as torch's own transformer layers do.
        """
        self._called, self._is_tracing = {self._model}, True
        try:
            yield
        finally:
            self._is_tracing = False
        parent = {child: module for module in self._model.modules() for child in module.children()}
        owners = set()
        for owner in self._owners:
            while owner not in self._called:
                owner = parent[owner]
            owners.add(owner)
        self._owners = owners

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what modules return in the block, until one is called that is changed."""
        self._returned.clear()
        self._is_recording = self._model not in self._owners
        try:
            yield
        finally:
            self._is_recording = False

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Give back in the block what was recorded."""
        self._is_replaying, self._given = True, 0
        try:
            yield
        finally:
            self._is_replaying = False

    def _watched(self, module: nn.Module, forward: Forward) -> Forward:
        def watched(*args: Any, **keywords: Any) -> Any:
            if self._is_replaying:
                if self._given < len(self._returned) and self._returned[self._given][0] is module:
                    self._given += 1
                    return self._returned[self._given - 1][1]
            elif self._is_recording:
                return self._recorded(module, forward, args, keywords)
            elif self._is_tracing:
                self._called.add(module)
            return forward(*args, **keywords)

        return watched

    def _recorded(self, module: nn.Module, forward: Forward, args: Any, keywords: Any) -> Any:
        if module in self._owners:
            self._is_recording = False
            return forward(*args, **keywords)
        first = len(self._returned)
        returned = forward(*args, **keywords)
        if self._is_recording:
            self._returned[first:] = [(module, returned)]  # with what it called in it
        return returned


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
