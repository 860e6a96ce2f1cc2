"""Optimizer steps on a query: what `unlearn`, `finetune` and `retain` share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batches import own_copy
from ..blocks import Choice, choose, tunable
from ..errors import NumericsError
from ..tasks.base import Batch, Task
from . import adapters, sharding
from .base import Produced

_NO_LOSS = "the base model has no finite loss on it: in classification a label is one of its classes, counted from 0"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What of a copy is tuned; the spec's fields of the same names say what each means."""

    parameters: str
    last_blocks: int
    lora_rank: int
    lora_alpha: float
    lora_targets: str
    mode: str = "eval"

    def choice(self, base: nn.Module, task: Task, query: Batch) -> Choice:
        """The parameters that the steps move; of adapters, those that get one. Raises ContractError: there are none."""
        found = choose(base, task, query, self.parameters, self.last_blocks)
        if self.lora_rank:  # not these move, but adapters of some of them
            found.details.pop("parameters", None)
        return found

    def tunable_copy(self, base: nn.Module, names: Sequence[str], seed: int) -> tuple[nn.Module, list[nn.Parameter]]:
        """A copy of the base in the recipe's mode, and those of its parameters that the steps move.

        Args:
            base: Base model.
            names: Of the parameters that are chosen.
            seed: Draws adapters.

        Raises:
            ContractError: No layer is to get an adapter.
        """
        model, chosen = self._copy(base, names, seed)
        if sharding.is_shared():
            sharding.share(model)
            chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, chosen

    def _copy(self, base: nn.Module, names: Sequence[str], seed: int) -> tuple[nn.Module, list[nn.Parameter]]:
        """A tunable copy that is whole."""
        model = copy.deepcopy(base).requires_grad_(False)
        model.train(self.mode == "train")
        named = tunable(model)
        chosen = [named[name] for name in names]
        if self.last_blocks:
            _hold_statistics(model, chosen)
        if self.lora_rank:
            return model, adapters.add(model, chosen, self.lora_targets, self.lora_rank, self.lora_alpha, seed)
        for parameter in chosen:
            parameter.requires_grad_(True)
        return model, chosen

    def produced(
        self, base: nn.Module, model: nn.Module, steps: int, seed: int, choice: Choice, **details: float | str
    ) -> Produced:
        """What became of a tunable copy, whole; adapters become products. Of a shared one, at the first worker alone."""
        if sharding.is_shared():
            state = sharding.whole_state(model)
            if not sharding.is_first():
                return Produced(base, steps)
            model, _ = self._copy(base, choice.names, seed)
            model.load_state_dict(state)
        factors = adapters.fold(model) if self.lora_rank else {}
        return Produced(model, steps, {**choice.details, **details}, factors)


@dataclass(frozen=True, kw_only=True)
class Steps(Tuning):
    """Recipe of the steps; the spec's fields of the same names say what each means."""

    optimizer: str
    lr: float
    momentum: float
    steps: int
    weight_decay: float
    normalize: bool
    max_loss_change: float

    def take(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        task: Task,
        query: Batch,
        sign: int,
        after_step: Callable[[int], bool] | None = None,
    ) -> int:
        """Move the parameters along `sign` times the gradient of the query's mean loss, in place; steps taken, at least one.

        Args:
            model: Tunable copy.
            parameters: Those of it that move.
            task: Says what a loss is.
            query: Rows to take steps on.
            sign: 1 to climb, -1 to descend.
            after_step: Called with the number of steps taken so far; whether that was the last one. Null: all steps.

        Raises:
            NumericsError: The loss is not finite at some step, or the gradient vanishes.
        """
        optimizer = self._optimizer(parameters)
        first = 0.0
        for step in range(self.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = query_loss(model, task, query)
            now = finite_loss(loss, step, self.steps)
            first = first if step else now
            if self.max_loss_change and abs(now - first) >= self.max_loss_change:
                return step
            (-sign * loss).backward()
            if self.normalize:
                scale_gradients(parameters)
            optimizer.step()
            if after_step is not None and after_step(step + 1):
                return step + 1
        return self.steps

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def _hold_statistics(model: nn.Module, chosen: list[nn.Parameter]) -> None:
    """Batch norms that are not tuned stay in eval mode, in place: what comes before the last blocks is to be the base's."""
    ids = set(map(id, chosen))
    for module in model.modules():
        own = set(map(id, module.parameters(recurse=False)))
        module.training &= not own or not own.isdisjoint(ids)


def finite_loss(loss: Tensor, step: int, steps: int) -> float:
    """The query's loss before a step, counted from 0. Raises NumericsError if it is not finite."""
    now = sharding.of_first(loss.item())
    if not math.isfinite(now):
        hint = "lower producer.lr" if step else _NO_LOSS
        raise NumericsError(f"the query's loss is {now} before step {step + 1} of {steps}", hint)
    return now


def scale_gradients(parameters: list[nn.Parameter], length: float = 1.0) -> None:
    """Scale the gradients of all parameters together to an L2 norm, in place. Raises NumericsError if they vanish."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    before = torch.linalg.vector_norm(torch.stack([sharding.norm(gradient) for gradient in gradients]))
    if not 0 < before.item() < math.inf:
        raise NumericsError(
            f"the query's gradient has length {before.item()}",
            "the model is certain of it; `preset: paper` of unlearn adds noise to such queries",
        )
    for gradient in gradients:
        gradient /= (before / length).to(gradient.dtype)


def query_loss(model: nn.Module, task: Task, query: Batch) -> Tensor:
    """Mean loss of a query's rows, in nats: what the steps climb or descend."""
    return task.loss_B(model, own_copy(query)).mean()
