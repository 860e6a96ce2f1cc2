"""Which parameters of a model are tuned: those whose names match, or those of its last blocks and of what comes behind them.

A block is one of the modules that a model repeats: a decoder layer, a BasicBlock of a ResNet. No model needs to say so. Of the
classes of modules that stand in lists (nn.Sequential, nn.ModuleList, nn.ModuleDict) several times, not one in another, it is the
one that holds most parameters; or one that there is more of and that holds nearly as many (the blocks of a stage, not the
stage). If there is none in a list, any class will do. A model that repeats nothing has layers instead: modules without others
in them, with a matrix of weights or more.

What comes behind a block is what is called after it has begun, when the model does its task: in the order of definition an
output layer may stand first. A tensor that is used earlier as well (an output layer that is tied to the embedding) is not
behind.

Blocks that are no single layers are also what is compiled (`score.compile`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .batches import own_copy
from .compiled import Compiled
from .errors import MAX_NAMES_SHOWN, ContractError
from .tasks.base import Batch, Task

NEARLY = 0.9
"""Share of a stage's parameters that its blocks must hold; in Swin and ConvNeXt .94, the rest is between the stages."""
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_Calls = dict[nn.Module, int]
"""Module -> when it was first called, counted from 0."""


@dataclass(frozen=True)
class Choice:
    """Parameters that are tuned.

    Args:
        names: Theirs, in the model's order; of tied ones the first.
        details: For meta.json, unless all are tuned: how many numbers they are (`parameters`), and of which last `blocks`.
    """

    names: tuple[str, ...]
    details: dict[str, str]


def tunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that can be tuned: name -> floating-point or complex parameter that holds any numbers, tied ones once."""
    return {
        name: each
        for name, each in model.named_parameters()
        if each.numel() and (each.is_floating_point() or each.is_complex())
    }


def choose(model: nn.Module, task: Task, batch: Batch, pattern: str = "", last_blocks: int = 0) -> Choice:
    """The parameters that a spec asks for; all of them if it says nothing.

    Args:
        model: Base model in eval mode; not changed.
        task: Calls it.
        batch: One row at least; the first is used, and only for `last_blocks`.
        pattern: Regular expression searched in names; empty for all.
        last_blocks: Only those of so many last blocks and of what comes behind them; 0 for all.

    Raises:
        ContractError: Nothing is chosen, or there are not so many blocks.
    """
    named = tunable(model)
    names = [name for name in named if re.search(pattern, name)]
    if not names:
        raise ContractError(
            f"producer.parameters: {pattern!r} matches none of {len(named)} parameters: "
            + ", ".join(list(named)[:MAX_NAMES_SHOWN])
        )
    details: dict[str, str] = {}
    if last_blocks:
        late, details["blocks"] = _last(model, task, batch, last_blocks)
        names = [name for name in names if id(named[name]) in late]
        if not names:
            raise ContractError(
                f"producer.last_blocks: blocks {details['blocks']}, use no parameters but such as are used before them",
                "choose more blocks, or parameters by their names (producer.parameters)",
            )
    if len(names) < len(named):
        details["parameters"] = f"{_size(named[name] for name in names):,} of {_size(named.values()):,}"
    return Choice(tuple(names), details)


def _last(model: nn.Module, task: Task, batch: Batch, number: int) -> tuple[set[int], str]:
    """Ids of the tensors of the last blocks and of what comes behind, and which blocks these are. Raises ContractError."""
    calls = _calls(model, task, batch)
    blocks = blocks_in(model, calls)
    first, kind = len(blocks) - number, _kind(blocks)
    if first < 0:
        raise ContractError(
            f"producer.last_blocks: {number}, but {type(model).__name__} has {len(blocks)} blocks ({kind})",
            f"give at most {len(blocks)}, or 0 to tune all parameters",
        )
    which = str(len(blocks)) if number == 1 else f"{first + 1}-{len(blocks)}"
    return _called_from(model, calls, calls[blocks[first]]), f"{which} of {len(blocks)} {kind}"


def compiled(model: nn.Module, task: Task) -> Compiled:
    """A model's blocks, if it has any, to run as torch.compile makes them when it does a task."""
    blocks = [block for block in blocks_in(model, list(model.modules())) if _has_children(block)]
    return Compiled(blocks, of_any_shape=hasattr(task, "encode"))


def blocks_in(model: nn.Module, called: Collection[nn.Module]) -> list[nn.Module]:
    """A model's blocks, in the order of `called`, which says what takes part; without any, its layers."""
    kinds = _kinds(model, called)
    most = max(kinds, key=_size_of)
    finer = [found for found in kinds if len(found) > len(most) and _size_of(found) >= NEARLY * _size_of(most)]
    blocks = set(max(finer or [most], key=_size_of))
    return [module for module in called if module in blocks]


def repeated(model: nn.Module) -> set[str]:
    """Names of the parameters of all that a model repeats: of an encoder's blocks and of a decoder's, where it has both."""
    inside = {
        id(each) for kind in _kinds(model, list(model.modules())) for module in kind for each in module.parameters()
    }
    return {name for name, each in model.named_parameters() if id(each) in inside}


def _kinds(model: nn.Module, called: Collection[nn.Module]) -> list[list[nn.Module]]:
    """Modules of one class that a model repeats, for each such class; of a model without any, its layers."""
    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for module in model.modules():
        if module is not model and module in called and _has_children(module):
            by_class.setdefault(type(module), []).append(module)
    listed = {item for module in model.modules() if isinstance(module, _LISTS) for item in module.children()}
    several = [found for found in by_class.values() if len(found) > 1 and not _nested(found)]
    in_lists = [found for found in several if listed.issuperset(found)]
    layers = [module for module in model.modules() if not _has_children(module) and _has_matrix(module)]
    return in_lists or several or [layers]


def _calls(model: nn.Module, task: Task, batch: Batch) -> _Calls:
    """When a model's modules are first called for the first row of a batch."""
    calls: _Calls = {}

    def note(module: nn.Module, args: object) -> None:
        calls.setdefault(module, len(calls))

    device = next(model.parameters()).device
    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            task.loss_B(model, own_copy({name: value[:1].to(device) for name, value in batch.items()}))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _called_from(model: nn.Module, calls: _Calls, start: int) -> set[int]:
    """Ids of the tensors that only modules own which are not called before `start`.

    A module that is never called (the output projection of nn.MultiheadAttention) counts as called with the one that it is in.
    """
    early, late = set[int](), set[int]()
    places = [(model, calls.get(model, 0))]
    while places:
        module, above = places.pop()
        at = calls.get(module, above)
        (late if at >= start else early).update(map(id, module.parameters(recurse=False)))
        places += [(child, at) for child in module.children()]
    return late - early


def _kind(blocks: Sequence[nn.Module]) -> str:
    """What they are called together."""
    kinds = {type(block).__name__ for block in blocks}
    return kinds.pop() if len(kinds) == 1 and any(map(_has_children, blocks)) else "layers"


def _nested(modules: Sequence[nn.Module]) -> bool:
    among = set(modules)
    return any(module in among for outer in modules for module in outer.modules() if module is not outer)


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _has_matrix(module: nn.Module) -> bool:
    return any(each.ndim > 1 for each in module.parameters(recurse=False))


def _size_of(modules: Iterable[nn.Module]) -> int:
    """How many numbers modules hold together."""
    return _size({id(each): each for module in modules for each in module.parameters()}.values())


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.numel() for each in tensors)
