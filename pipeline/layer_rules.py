"""How steps of one module's tensors change losses, from both sides of it: what it was given, and slopes of what it returned.

Linear and convolution layers, and norms, have rules of their own; any other module goes by its own forward derivative.

Shapes: Q counterparts, B rows of a batch (b of a piece of it), T positions, I inputs of a layer, O outputs, R rank of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map_only

from .changes import LowRank
from .layers import Layer, Lookup, Scale, row_slices, uses_in

PIECE_BYTES = 1 << 26
"""Gradients of single examples that are held at a time, of one layer."""
Step = Tensor | LowRank
Steps = Sequence[Mapping[str, Step]]
"""Per counterpart, parameter or buffer name -> what is added to the base's."""


class Rule(Protocol):
    """How steps of one module's tensors change losses."""

    @property
    def module(self) -> nn.Module:
        """The module."""
        ...

    reruns: ClassVar[bool]
    """Whether the module is called again, with what it was called with: it may be one that changes that in place."""

    def along(self, args: tuple[Any, ...], keywords: Mapping[str, Any], leaf: int, slope: Tensor) -> Tensor:
        """[B, Q], float32.

        Args:
            args: What the module was called with.
            keywords: The same, by name.
            leaf: Which of the tensors that it returned.
            slope: Gradients of the rows' losses in it, [B, ...].
        """
        ...


@dataclass(frozen=True)
class _LowRank:
    """Steps of a layer's weight that are products: the layer is never as large as its gradients."""

    layer: Layer
    left_OK: Tensor
    """Left factors of all counterparts side by side, K = Q R."""
    right_KI: Tensor
    bias_QO: Tensor | None
    queries: int

    reruns: ClassVar[bool] = False

    @property
    def module(self) -> nn.Module:
        return self.layer.module

    def along(self, args: tuple[Any, ...], keywords: Mapping[str, Any], leaf: int, slope: Tensor) -> Tensor:
        input_BTI, slope_BTO = self.layer.positions(_first(args, keywords)), self.layer.slopes(slope)
        made_BK = ((input_BTI @ self.right_KI.T).float() * (slope_BTO @ self.left_OK)).sum(dim=1)
        made_BQ = made_BK.view(len(made_BK), self.queries, -1).sum(dim=2)
        return made_BQ if self.bias_QO is None else made_BQ + slope_BTO.float().sum(dim=1) @ self.bias_QO.T


@dataclass(frozen=True)
class _Dense:
    """Steps of a layer with a matrix of weights."""

    layer: Layer
    weight_QOI: Tensor
    bias_QO: Tensor | None

    reruns: ClassVar[bool] = False

    @property
    def module(self) -> nn.Module:
        return self.layer.module

    def along(self, args: tuple[Any, ...], keywords: Mapping[str, Any], leaf: int, slope: Tensor) -> Tensor:
        input_BTI, slope_BTO = self.layer.positions(_first(args, keywords)), self.layer.slopes(slope)
        queries, outputs, inputs = self.weight_QOI.shape
        rows, positions, _ = input_BTI.shape
        if positions == 1 or queries == 1:  # a gradient of a single example is larger than what each step makes
            made = [((input_BTI @ weight_OI.T).float() * slope_BTO).sum(dim=(1, 2)) for weight_OI in self.weight_QOI]
            made_BQ = torch.stack(made, dim=1)
        else:
            pieces = row_slices(rows, outputs * inputs, PIECE_BYTES)
            weight_XQ = self.weight_QOI.flatten(1).T
            made = [(slope_BTO[piece].mT @ input_BTI[piece]).flatten(1) @ weight_XQ for piece in pieces]
            made_BQ = torch.cat(made).float()
        return made_BQ if self.bias_QO is None else made_BQ + slope_BTO.float().sum(dim=1) @ self.bias_QO.T


@dataclass(frozen=True)
class _Scale:
    """Steps of a norm's weight and bias."""

    use: Scale
    steps: Mapping[str, Tensor]
    """Name -> [Q, *shape]."""

    reruns: ClassVar[bool] = False

    @property
    def module(self) -> nn.Module:
        return self.use.module

    def along(self, args: tuple[Any, ...], keywords: Mapping[str, Any], leaf: int, slope: Tensor) -> Tensor:
        gradients = self.use.gradients(_first(args, keywords), slope)
        products = [
            gradients[name].flatten(1) @ step.flatten(1).to(gradients[name]).T for name, step in self.steps.items()
        ]
        return torch.stack(products).sum(dim=0).float()


@dataclass(frozen=True)
class _Lookup:
    """Steps of an embedding's table: what it returns changes by rows of theirs."""

    use: Lookup
    table_QVI: Tensor

    reruns: ClassVar[bool] = False

    @property
    def module(self) -> nn.Module:
        return self.use.module

    def along(self, args: tuple[Any, ...], keywords: Mapping[str, Any], leaf: int, slope: Tensor) -> Tensor:
        rows = (functional_call(self.use.module, {"weight": table}, args, dict(keywords)) for table in self.table_QVI)
        return torch.stack([(each.float() * slope).flatten(1).sum(dim=1) for each in rows], dim=1)


@dataclass(frozen=True)
class _Any:
    """Steps of any other module: what it returns changes along each, by forward derivatives of itself alone."""

    module: nn.Module
    steps: Sequence[Mapping[str, Tensor]]
    """Name in the module -> step."""
    reruns: ClassVar[bool] = True

    def along(self, args: tuple[Any, ...], keywords: Mapping[str, Any], leaf: int, slope: Tensor) -> Tensor:
        own = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        base = {name: own[name].detach() for name in self.steps[0]}

        def returned(tensors: Mapping[str, Tensor]) -> Tensor:
            own = tree_map_only(Tensor, Tensor.clone, (args, dict(keywords)))
            found: Tensor = tree_flatten(functional_call(self.module, dict(tensors), *own))[0][leaf]
            return found

        made = []
        with sdpa_kernel(SDPBackend.MATH):
            for step in self.steps:
                change = jvp(returned, (base,), (dict(step),))[1]
                made.append((change.float() * slope).flatten(1).sum(dim=1))
        return torch.stack(made, dim=1)


def _first(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """What a layer of one input was called with."""
    given = args[0] if args else next(iter(keywords.values()))
    assert isinstance(given, Tensor)
    return given


def rules_of(model: nn.Module, names: Sequence[str], steps: Steps) -> list[Rule]:
    """Of every module that owns a tensor which changes; what layers are taken for is a guess, to be checked."""
    slots = slots_of(model)
    name_of = {id(slots[name]): name for name in names}
    uses = {use.module: use for use in uses_in(model, {name: slots[name] for name in names})}
    found: list[Rule] = []
    for module in model.modules():
        own = {name: name_of[id(slot)] for name, slot in _own(module).items() if id(slot) in name_of}
        use = uses.get(module)
        if not own:
            continue
        if isinstance(use, Layer) and set(own.values()) == set(use.names):
            found.append(_layer_rule(use, slots, steps))
        elif isinstance(use, Lookup):
            found.append(_Lookup(use, _stacked(use.weight, slots, steps)))
        elif isinstance(use, Scale) and set(own.values()) == set(use.names):
            found.append(_Scale(use, {name: _stacked(name, slots, steps) for name in use.names}))
        else:
            whole = {name: _stacked(each, slots, steps) for name, each in own.items()}
            found.append(_Any(module, [{name: each[q] for name, each in whole.items()} for q in range(len(steps))]))
    return found


def slots_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones under each."""
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return {**dict(parameters), **dict(buffers)}


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _layer_rule(layer: Layer, slots: Mapping[str, Tensor], steps: Steps) -> Rule:
    slot = slots[layer.weight]
    bias_QO = None if layer.bias is None else _stacked(layer.bias, slots, steps).float()
    factors = [step.get(layer.weight) for step in steps]
    products = [each for each in factors if isinstance(each, LowRank)]
    if len(products) < len(factors) or slot.ndim != 2:
        weight_QOI = layer.joined_weight(_stacked(layer.weight, slots, steps))
        return _Dense(layer, weight_QOI.contiguous(), bias_QO)
    rank = max(each.left.shape[1] for each in products)
    turned = [layer.turned(each) for each in products]
    left_OK = torch.cat([_filled(each.left, rank) for each in turned], dim=1)
    right_KI = torch.cat([_filled(each.right.T, rank).T for each in turned])
    return _LowRank(layer, left_OK.to(slot.dtype), right_KI.to(slot.dtype), bias_QO, len(steps))


def _filled(matrix: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]))


def _stacked(name: str, slots: Mapping[str, Tensor], steps: Steps) -> Tensor:
    """A tensor's steps, [Q, *shape] in its precision; zeros where a counterpart leaves it as it is."""
    slot = slots[name]
    zero = torch.zeros_like(slot)
    return torch.stack([whole(step[name]).to(slot) if name in step else zero for step in steps])


def whole(step: Step) -> Tensor:
    """A step as one tensor."""
    return step.left @ step.right if isinstance(step, LowRank) else step
