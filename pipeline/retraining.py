"""Training the model under question again on part of its corpus, without Ray: what a worker of the judge does.

Shapes: N examples of the corpus, Q queries, M rows that go through the model.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .artifacts import Run
from .batches import own_copy
from .choices import ModelSection, TaskSection, TorchModule
from .corpus import Corpus
from .digests import as_frozen, files_of_model
from .errors import NumericsError, SpecError
from .extensions import load_model, load_task, prepared
from .frozen_files import FrozenFiles, loaded_as_frozen
from .importing import user_code
from .judge import Training
from .lessons import Lesson, Step, Whole
from .queries import decoded_queries

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .batches import Inputs
    from .tasks.base import Batch, Task

ROWS_AT_ONCE = 256
"""Examples that go through the model at once where only their losses are wanted."""
LBFGS_ITERATIONS, LBFGS_HISTORY = 2000, 100


def untempered(task: TaskSection) -> TaskSection:
    """A task whose losses are what the model was trained on."""
    return task.model_copy(update={"temperature": 1.0}) if hasattr(task, "temperature") else task


def known_start(run: Run, training: Training) -> ModelSection | None:
    """The model before training, if anything says what it is."""
    if training.start is None and isinstance(run.spec.model, TorchModule) and run.spec.model.weights_uri is not None:
        return run.spec.model.model_copy(update={"weights_uri": None})
    return training.start


def start_of(run: Run, training: Training) -> ModelSection:
    """The model before training. Raises SpecError if nothing says what it is."""
    start = known_start(run, training)
    if start is not None:
        return start
    raise SpecError(
        f"training.start: missing; the model of {run.uri()} does not say what it was before training",
        "name the model that training began with: start: {loader: ..., ...}",
    )


def start_files(run: Run, training: Training) -> list[FrozenFiles]:
    """Files of the model before training, as they are now; none if nothing says what it is. Raises InputError, StorageError."""
    start = known_start(run, training)
    return files_of_model("training.start", start) if start is not None else []


@dataclass(frozen=True)
class Examples:
    """What is trained on: a run's corpus whole, in the manifest's order, and its queries' rows behind it.

    Args:
        id_N: Ids of the corpus's examples; rows that cannot be scored are left out, as they are of the scores.
        inputs: Examples and query rows as the task's model takes them.
        rows_of: Query -> its rows among them.
    """

    id_N: np.ndarray
    inputs: Inputs
    rows_of: Mapping[str, np.ndarray]

    @cached_property
    def digest(self) -> str:
        """sha256 of all that is trained on and asked, by contents."""
        asked = {query_id: len(row_M) for query_id, row_M in self.rows_of.items()}
        found = hashlib.sha256(json.dumps([self.id_N.tolist(), asked]).encode())
        for start in range(0, self.inputs.items, ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, self.inputs.items))
            for name, array in sorted(self.inputs.rows(rows).items()):
                found.update(f"{name} {array.dtype} {array.shape}".encode())
                found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    @classmethod
    def read(cls, run: Run, task: Task) -> Examples:
        """Those of a run.

        Raises:
            InputError: A file changed or cannot be read.
            SpecError: An example is split into windows, which training would weigh like examples.
        """
        corpus = Corpus(run.spec.corpus)
        parts = [corpus.read(shard, run.columns) for shard in run.shards]
        asked = decoded_queries(run.queries, run.columns)
        id_N = np.concatenate([np.asarray(part.example_id_N.to_pylist(), dtype=str) for part in parts])
        pieces = [*(part.arrays for part in parts), *asked.values()]
        inputs = prepared(task, {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]})
        rows_each = [len(next(iter(arrays.values()))) for arrays in asked.values()]
        if inputs.items + len(inputs.bad) != len(id_N) + sum(rows_each):
            raise SpecError(
                "task.overlong: windows: examples that are split cannot be trained on anew", "use cut or reject"
            )
        id_N = np.delete(id_N, sorted(inputs.bad))
        starts = len(id_N) + np.cumsum([0, *rows_each])
        rows_of = {query_id: np.arange(starts[q], starts[q + 1]) for q, query_id in enumerate(asked)}
        return cls(id_N, inputs, rows_of)


class Retrainer:
    """Trains a run's model anew, and takes losses under it.

    Args:
        run: Says what model, task, corpus and queries are.
        training: The recipe.
        device: torch device.

    Raises:
        SpecError, InputError, ContractError: Model, task or rows cannot be made or read.
    """

    def __init__(self, run: Run, training: Training, device: str) -> None:
        self._run, self._training, self._device = run, training, device
        with as_frozen(run):
            self._task = load_task(untempered(run.spec.task))
        self.start_files = start_files(run, training)
        self.examples = Examples.read(run, self._task)
        self._implementation = f"training {run.spec.model.implementation} anew"

    def learned(self, lesson: Lesson, seed: int) -> nn.Module:
        """The model of a lesson, in eval mode.

        Args:
            lesson: What it is trained on.
            seed: The judge's.

        Raises:
            SpecError: Nothing says what the model was before training.
            NumericsError: `lbfgs` does not get to its tolerance.
            ContractError: Model or task failed.
        """
        with user_code(self._implementation):
            if isinstance(lesson, Step):
                return self._stepped(lesson)
            row_M = np.flatnonzero(lesson.inside_N(seed, len(self.examples.id_N)))
            if isinstance(lesson, Whole) and lesson.query_id is not None:
                row_M = np.concatenate([row_M, self.examples.rows_of[lesson.query_id]])
            if self._training.optimizer == "lbfgs":
                return self._converged(copy.deepcopy(self._whole), row_M)
            return self._trained(row_M, lesson.seed(seed))

    def query_losses(self, model: nn.Module) -> np.ndarray:
        """Mean loss [Q] of every query's rows, in nats. Raises NumericsError if one is not finite."""
        rows_of = self.examples.rows_of.values()
        return _finite(np.array([self._losses(model, row_M).mean() for row_M in rows_of]), "a query's loss")

    def example_losses(self, model: nn.Module) -> np.ndarray:
        """Losses [N] of the corpus's examples, in nats. Raises NumericsError if one is not finite."""
        row_N = np.arange(len(self.examples.id_N))
        pieces = [row_N[start : start + ROWS_AT_ONCE] for start in range(0, len(row_N), ROWS_AT_ONCE)]
        return _finite(np.concatenate([self._losses(model, row_M) for row_M in pieces]), "an example's loss")

    def _losses(self, model: nn.Module, row_M: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad(), user_code(self._implementation):
            return self._task.loss_B(model, self._batch(model, row_M)).double().cpu().numpy()

    def _batch(self, model: nn.Module, row_M: np.ndarray) -> Batch:
        import torch

        from .numerics import dtype_of

        dtype = dtype_of(model)
        batch = {}
        for name, array in self.examples.inputs.rows(row_M).items():
            tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
            batch[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return batch

    def _trained(self, row_M: np.ndarray, seed: int) -> nn.Module:
        """Trained in small batches from first weights on."""
        import torch

        model = self._started(seed)
        generator = torch.Generator().manual_seed(seed)
        optimizer = self._optimizer(model)
        rows = torch.from_numpy(row_M)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.train()
            for _ in range(self._training.epochs):
                for some in rows[torch.randperm(len(rows), generator=generator)].split(self._training.batch_rows):
                    optimizer.zero_grad(set_to_none=True)
                    self._task.loss_B(model, self._batch(model, some.numpy())).mean().backward()
                    optimizer.step()
        return model.eval()

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        import torch

        recipe = self._training
        if recipe.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        return torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )

    @cached_property
    def _start(self) -> ModelSection:
        return start_of(self._run, self._training)

    def _started(self, seed: int) -> nn.Module:
        """The model before training."""
        with loaded_as_frozen(self.start_files):
            return load_model(self._start, self._device, seed)

    def _stepped(self, step: Step) -> nn.Module:
        """The run's own model after one plain gradient step."""
        import torch

        with as_frozen(self._run):
            model = load_model(self._run.spec.model, self._device, self._run.spec.seed)
        self._task.loss_B(model, self._batch(model, np.array([step.row]))).mean().backward()
        torch.optim.SGD(model.parameters(), lr=step.lr).step()
        return model

    @cached_property
    def _whole(self) -> nn.Module:
        """The minimum over the whole corpus, where searches for other minima begin."""
        model = self._started(0).double()
        return self._converged(model, np.arange(len(self.examples.id_N)))

    def _converged(self, model: nn.Module, row_M: np.ndarray) -> nn.Module:
        """A model taken to the minimum of the mean loss and the weight decay.

        Near a minimum full steps get further than a line search, which compares losses that differ by less than rounding; far
        from it they may fail, and then a line search leads the way.
        """
        import torch

        batch = self._batch(model, row_M)
        tensors = [tensor for tensor in model.parameters() if tensor.requires_grad]
        start = [tensor.detach().clone() for tensor in tensors]

        def loss() -> Tensor:
            for tensor in tensors:
                tensor.grad = None
            total = sum(self._training.weight_decay / 2 * tensor.square().sum() for tensor in tensors)
            total = total + self._task.loss_B(model, own_copy(batch)).mean()
            total.backward()
            return total

        steepest = float("inf")
        for search in (None, "strong_wolfe", None):
            torch.optim.LBFGS(
                tensors, lr=1.0, max_iter=LBFGS_ITERATIONS, history_size=LBFGS_HISTORY, line_search_fn=search,
                tolerance_grad=self._training.tolerance, tolerance_change=0.0,
            ).step(loss)  # fmt: skip
            loss()
            steepest = max(float(tensor.grad.abs().max()) for tensor in tensors if tensor.grad is not None)
            if steepest <= self._training.tolerance:
                return model
            if not np.isfinite(steepest):
                with torch.no_grad():
                    for tensor, first in zip(tensors, start, strict=True):
                        tensor.copy_(first)
        raise NumericsError(
            f"training anew does not converge: the gradient's largest entry is {steepest:g}, expected "
            f"training.tolerance {self._training.tolerance:g}",
            "is the loss convex, with some weight_decay? Else use sgd or adam",
        )


def _finite(loss_M: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(loss_M).all():
        raise NumericsError(f"{what} after training anew is not finite", "lower training.lr")
    return loss_M
