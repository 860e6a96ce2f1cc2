"""Derivatives of losses along the way from a model to each of its counterparts, for all of them at once. Knows torch only.

A counterpart that is one small step away changes a loss by the gradient's product with that step. A gradient is the same for all
counterparts, so one pass forwards and one backwards serve any number of them: where the backward pass comes by a layer, the
examples' gradients of its parameters are made of both its sides (what it was given, the slope of what it returned), multiplied
with all steps, and forgotten. What stands before the first changed layer has no part in the backward pass.

Shapes: Q counterparts, B rows of a batch, T positions, I inputs of a layer, O outputs, R rank of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .changes import LowRank
from .layer_rules import Rule, Step, Steps, rules_of, slots_of, whole
from .layers import entry_rows

Derivative = Literal["gradient", "jvp"]
"""How it is computed: backwards for all counterparts at once, or forwards for each."""
_EXPERTS = "_experts_implementation"
TOLERANCE, COARSE_TOLERANCE = 1e-2, 0.1
"""By how much derivatives layer by layer may be off from autograd's, relative to them; the second in half precision."""


class Derivatives:
    """Derivatives of a model's losses along steps, by one backward pass for all.

    Args:
        model: Base model in eval mode; not changed.
        steps: Of every counterpart.
    """

    def __init__(self, model: nn.Module, steps: Steps) -> None:
        self._model, self._steps = model, steps
        self._names = sorted({name for step in steps for name in step})
        self._rules = rules_of(model, self._names, steps)
        self._device = next(iter(model.state_dict().values())).device

    def along(self, loss: Callable[[], Tensor], rows: int) -> tuple[Tensor, Tensor]:
        """Losses [B] and their derivatives [B, Q], float32 or better.

        Args:
            rows: B.
            loss: Gives the losses of a batch under the model, each a function of its own row alone.

        Raises:
            ValueError: A layer was called with something that has not one entry for each row.
        """
        anchor = torch.zeros((), device=self._device, requires_grad=True)
        found: list[tuple[Tensor | None, Tensor]] = []
        with torch.enable_grad(), _weights_alone(self._model):
            with _tapped(self._rules, rows, anchor, found):
                loss_B = loss()
            if loss_B.requires_grad:
                torch.autograd.backward(loss_B.sum(), inputs=[anchor])
        total_BQ = torch.zeros(len(loss_B), len(self._steps), device=self._device)
        for row_B, each_BQ in found:
            if row_B is not None:
                total_BQ.index_add_(0, row_B, each_BQ.to(total_BQ.dtype))
            elif len(each_BQ) and len(each_BQ) % len(loss_B) == 0:  # rows one after the other, or all positions of each
                total_BQ += each_BQ.view(len(loss_B), -1, len(self._steps)).sum(dim=1)
            else:
                raise ValueError(f"a layer was called with {len(each_BQ)} entries for {len(loss_B)} rows")
        return loss_B.detach(), total_BQ

    def require_right(self, loss: Callable[[], Tensor], rows: int) -> None:
        """See on a few rows that layers are what they were taken for: weighted differently, against autograd.

        The first and the last step are compared.

        Raises:
            ValueError: They are not, or the model does not bear to be looked at.
        """
        try:
            loss_B, found_BQ = self.along(loss, rows)
        except (RuntimeError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        weight_B = torch.arange(len(loss_B), device=self._device).cos()
        slots = slots_of(self._model)
        names = [name for name in self._names if isinstance(slots[name], nn.Parameter)]
        if not names:
            return
        with torch.enable_grad(), _weights_alone(self._model, [slots[name] for name in names]):
            total = (loss() * weight_B).sum()
            slopes = torch.autograd.grad(
                total, [slots[name] for name in names], allow_unused=True, materialize_grads=True
            )
        ends = sorted({0, len(self._steps) - 1})
        wanted_Q = torch.stack([_product(dict(zip(names, slopes, strict=True)), self._steps[q]) for q in ends])
        off = float((weight_B @ found_BQ[:, ends] - wanted_Q).norm() / wanted_Q.norm().clamp_min(1e-30))
        if not off <= (TOLERANCE if slopes[0].dtype.itemsize >= 4 else COARSE_TOLERANCE):
            raise ValueError(f"derivatives layer by layer are off by {off:.1%} from autograd's")


def _product(slopes: Mapping[str, Tensor], step: Mapping[str, Step]) -> Tensor:
    """A gradient times a step, float32."""
    found = [
        ((slopes[name].float() @ each.right.float().T) * each.left.float()).sum()
        if isinstance(each, LowRank)
        else (_as_real(slopes[name]).float() * _as_real(each).float()).sum()
        for name, each in step.items()
        if name in slopes
    ]
    return torch.stack(found).sum()


def _as_real(values: Tensor) -> Tensor:
    """Complex numbers as pairs; autograd's gradient of one has the slopes in both."""
    return torch.view_as_real(values) if values.is_complex() else values


def forward_along(model: nn.Module, step: Mapping[str, Step], loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Losses [B] and their derivatives [B] along one step, by one pass forwards on dual numbers.

    Raises:
        NotImplementedError: An operation of the model has no forward derivative.
    """
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has none
        slots = slots_of(model)
        duals = {
            id(slots[name]): forward_ad.make_dual(slots[name].detach(), whole(each).to(slots[name]))
            for name, each in step.items()
        }
        with _standing_in(model, duals):
            loss_B, derivative_B = forward_ad.unpack_dual(loss())
        return loss_B, torch.zeros_like(loss_B) if derivative_B is None else derivative_B


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """In the block, experts of Hugging Face models are called one by one: kernels for all of them have no forward derivative."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [(config, getattr(config, _EXPERTS, None)) for config in configs.values()]
    try:
        for config, name in before:
            if name is not None:
                setattr(config, _EXPERTS, "eager")
        yield
    finally:
        for config, name in before:
            if name is not None:
                setattr(config, _EXPERTS, name)


@contextmanager
def _standing_in(model: nn.Module, others: Mapping[int, Tensor]) -> Iterator[None]:
    """Tensors in the place of parameters and buffers, by their ids, for the time of the block."""
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    before = [(table, name, slot) for table in tables for name, slot in table.items() if id(slot) in others]
    try:
        for table, name, slot in before:
            table[name] = others[id(slot)]  # type: ignore[assignment]
        yield
    finally:
        for table, name, slot in before:
            table[name] = slot  # type: ignore[assignment]


@contextmanager
def _weights_alone(model: nn.Module, wanted: Sequence[Tensor] = ()) -> Iterator[None]:
    """No parameter but these requires gradients in the block."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    ids = {id(each) for each in wanted}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in ids)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


class _Tap(torch.autograd.Function):
    """Hands on what it is given, and shows its gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, show: Callable[[Tensor], None]) -> Tensor:
        """A copy: whoever gets it may change it in place."""
        ctx.show = show
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """The same gradient."""
        ctx.show(slopes[0])
        ctx.show = None  # with what the layer was given
        return slopes[0], None, None


@contextmanager
def _tapped(
    rules: Sequence[Rule], rows: int, anchor: Tensor, found: list[tuple[Tensor | None, Tensor]]
) -> Iterator[None]:
    """Look at what modules are given in the block, and later at the gradients of what they return.

    What a module returns once for all rows, as an embedding of positions does, is repeated, so that each row has a gradient of
    its own. Products [B, Q] of each call go to `found`, with the rows that they are of unless they are of all.
    """
    before: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        before[module] = tree_map_only(Tensor, lambda each: each.detach().clone(), (args, keywords))

    def hook_of(rule: Rule) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            args, keywords = before.pop(module, None) or tree_map_only(Tensor, Tensor.detach, (args, keywords))
            leaves, spec = tree_flatten(output)
            row_M = entry_rows()

            def show(leaf: int, slope: Tensor) -> None:
                with torch.no_grad():
                    if row_M is None:
                        found.append((None, rule.along(args, keywords, leaf, slope)))
                    else:
                        row_b, gather = _by_rows(row_M)
                        found.append((row_b, rule.along((gather(args[0]),), keywords, leaf, gather(slope))))

            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    own = leaf.expand(rows, *leaf.shape[1:]) if leaf.ndim and len(leaf) == 1 else leaf
                    leaves[i] = _Tap.apply(own, anchor, lambda slope, i=i: show(i, slope))
            return tree_unflatten(leaves, spec)

        return hook

    handles = [rule.module.register_forward_hook(hook_of(rule), with_kwargs=True) for rule in rules]
    handles += [rule.module.register_forward_pre_hook(keep, with_kwargs=True) for rule in rules if rule.reruns]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_rows(row_M: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows [b] of entries, and what brings something of theirs [M, ...] into the shape [b, T, ...], with zeros behind."""
    row_b, own_M, count_b = row_M.unique_consecutive(return_inverse=True, return_counts=True)
    first_b = count_b.cumsum(0) - count_b
    position_M = torch.arange(len(row_M), device=row_M.device) - first_b[own_M]

    def gathered(each: Tensor) -> Tensor:
        out = each.new_zeros(len(row_b), int(count_b.max()), *each.shape[1:])
        out[own_M, position_M] = each
        return out

    return row_b, gathered
