"""A model's outputs on a batch as a linear function of its parameters, and how the loss bends in these outputs.

Shapes: Q vectors, P numbers of the chosen parameters, B rows of a batch.

A task says no more than the loss of a batch. What the model itself returned in between is found by handing the task a
stand-in: first one that calls the model and remembers, then one that gives back what it is told to. Losses of any task that
calls its model as `model(...)` fall apart into outputs and their loss this way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..batches import own_copy
from ..errors import ContractError
from ..tasks.base import Batch, Task
from .base import Parameters
from .rows import weights


class StandIn:
    """In the place of a model, for a task to call. All else that is asked of it is asked of the model.

    Args:
        model: The model.
        tensors: Parameter name -> what stands in its place.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.stands_for = model
        self._tensors = dict(tensors)
        self._calls: list[tuple[list[Any], Any]] = []
        self._given: Iterator[Tensor] | None = None
        self._call = 0

    def __getattr__(self, name: str) -> Any:
        """Anything but the last layer, which a task could take out: outputs are to be whole."""
        if name in ("get_output_embeddings", "stands_for"):
            raise AttributeError(name)
        return getattr(self.stands_for, name)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """The model's outputs, remembered; or what `giving` said, in their place."""
        if self._given is None:
            out = functional_call(self.stands_for, self._tensors, args, keywords)
            self._calls.append(tree_flatten(out))
            return out
        found, spec = self._calls[self._call]
        self._call += 1
        return tree_unflatten([next(self._given) if _moves(leaf) else leaf for leaf in found], spec)

    @property
    def outputs(self) -> list[Tensor]:
        """What the model returned that depends on parameters."""
        return [leaf for found, _ in self._calls for leaf in found if _moves(leaf)]

    @contextmanager
    def giving(self, outputs: list[Tensor]) -> Iterator[None]:
        """Give these back instead of calling the model, for the time of the block."""
        self._given, self._call = iter(outputs), 0
        try:
            yield
        finally:
            self._given = None


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def loss_of_outputs(stand_in: StandIn, task: Task, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """What the model returned on a batch as leaves of a new graph, and the losses [B] as a function of these alone.

    Raises:
        ContractError: The task does not call the model, or nothing that it returns depends on the parameters.
    """
    task.loss_B(stand_in, own_copy(batch))  # type: ignore[arg-type]
    if not stand_in.outputs:
        raise ContractError(
            f"{type(task).__name__}: no output of {type(stand_in.stands_for).__name__} that depends on the parameters was seen",
            "the task must call its model as model(...), and not under no_grad",
        )
    points = [output.detach().requires_grad_() for output in stand_in.outputs]
    with stand_in.giving(points):
        return points, task.loss_B(stand_in, own_copy(batch))  # type: ignore[arg-type]


class Linearised:
    """A model and its loss around the base, on one batch.

    Args:
        model: Base model in eval mode; not changed.
        task: Says what the loss is.
        parameters: Those that count as variables.
        batch: Rows; the curvature is that of their losses times their weights.

    Raises:
        ContractError: The task does not call the model, or nothing that it returns depends on the parameters.
    """

    def __init__(self, model: nn.Module, task: Task, parameters: Parameters, batch: Batch) -> None:
        self._parameters = parameters
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.tensors.items()}
            self._leaves = list(leaves.values())
            stand_in = StandIn(model, leaves)
            self._points, self.loss_B = loss_of_outputs(stand_in, task, batch)
            self.outputs = stand_in.outputs
            weighted_B = self.loss_B * weights(batch, self.loss_B)
            self._slopes = torch.autograd.grad(
                weighted_B.sum(), self._points, create_graph=True, allow_unused=True, materialize_grads=True
            )

    def along(self, vector_QP: Tensor) -> Iterator[list[Tensor]]:
        """Change of the outputs along every vector: Q times, a tensor per output (a Jacobian-vector product each).

        By two passes backwards: the first makes the transposed product, which is linear in what it is given, the second
        differentiates it by that. Any operation that can be differentiated twice will do.
        """
        with torch.enable_grad():
            given = [torch.zeros_like(output, requires_grad=True) for output in self.outputs]
            transposed = self._backwards(given, create_graph=True)
        split = self._parameters.split(vector_QP)
        for q in range(len(vector_QP)):
            vector = [tensor_Q[q] for tensor_Q in split.values()]
            used = [(each, of) for each, of in zip(transposed, vector, strict=True) if each.requires_grad]
            yield list(
                torch.autograd.grad(
                    [each for each, _ in used], given, [of for _, of in used],
                    retain_graph=True, allow_unused=True, materialize_grads=True,
                )
            )  # fmt: skip

    def bent(self, change: list[Tensor]) -> list[Tensor]:
        """The weighted losses' Hessian in the outputs times a change of them; zeros where the loss does not bend."""
        bending = [(slope, by) for slope, by in zip(self._slopes, change, strict=True) if slope.requires_grad]
        if not bending:
            return [torch.zeros_like(each) for each in change]
        return list(
            torch.autograd.grad(
                [slope for slope, _ in bending], self._points, [by for _, by in bending],
                retain_graph=True, allow_unused=True, materialize_grads=True,
            )
        )  # fmt: skip

    def back(self, slopes: list[Tensor]) -> Tensor:
        """The transposed Jacobian times something of the outputs' shapes: [P]."""
        return self._parameters.flat(self._backwards(slopes, create_graph=False))

    def _backwards(self, slopes: list[Tensor], create_graph: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            self.outputs, self._leaves, slopes,
            create_graph=create_graph, retain_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return list(found)

    def gauss_newton(self, vector_QP: Tensor) -> Tensor:
        """Weighted sum over the rows of J' H J times every vector: [Q, P] (Schraudolph, 2002)."""
        return torch.stack([self.back(self.bent(change)) for change in self.along(vector_QP)])

    def loss_along(self, vector_QP: Tensor) -> Tensor:
        """Derivative of every row's own loss along every vector: [Q, B], float32 or better."""
        with torch.enable_grad():
            weight_B = torch.zeros_like(self.loss_B, requires_grad=True)
            slopes = torch.autograd.grad(
                self.loss_B, self._points, weight_B,
                create_graph=True, retain_graph=True, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
        rows = []
        for change in self.along(vector_QP):
            used = [(slope, by) for slope, by in zip(slopes, change, strict=True) if slope.requires_grad]
            rows.append(
                torch.autograd.grad([slope for slope, _ in used], weight_B, [by for _, by in used], retain_graph=True)[
                    0
                ]
            )
        return torch.stack(rows)
