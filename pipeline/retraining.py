"""Training the model under question again on part of its corpus, without Ray: what a worker of the judge does.

Shapes: N examples of the corpus, Q queries.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from .artifacts import Run
from .choices import ModelSection, TaskSection, TorchModule
from .corpus import Corpus
from .errors import NumericsError, SpecError
from .extensions import load_model, load_task, prepared
from .importing import user_code
from .judge import Training
from .queries import query_inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .batches import Inputs
    from .tasks.base import Batch, Task


def untempered(task: TaskSection) -> TaskSection:
    """A task whose losses are what the model was trained on."""
    return task.model_copy(update={"temperature": 1.0}) if hasattr(task, "temperature") else task


def start_of(run: Run, training: Training) -> ModelSection:
    """The model before training. Raises SpecError if nothing says what it is."""
    if training.start is not None:
        return training.start
    if isinstance(run.spec.model, TorchModule) and run.spec.model.weights_uri is not None:
        return run.spec.model.model_copy(update={"weights_uri": None})
    raise SpecError(
        f"training.start: missing; the model of {run.uri()} does not say what it was before training",
        "name the model that training began with: start: {loader: ..., ...}",
    )


def seed_of(seed: int, *parts: int | str) -> int:
    """Seed of one thing, from the spec's seed and its name alone."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def read_examples(run: Run, task: Task) -> tuple[np.ndarray, Inputs]:
    """A run's corpus whole, in the manifest's order: ids [N], and the examples as the task's model takes them.

    Rows that cannot be scored are left out, as they are of the scores.

    Raises:
        InputError: A file changed or cannot be read.
        SpecError: An example is split into windows, which training would weigh like examples.
    """
    corpus = Corpus(run.spec.corpus)
    parts = [corpus.read(shard, run.columns) for shard in run.shards]
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    id_N = np.concatenate([np.asarray(part.example_id_N.to_pylist(), dtype=str) for part in parts])
    inputs = prepared(task, arrays)
    id_N = np.delete(id_N, sorted(inputs.bad))
    if inputs.items != len(id_N):
        raise SpecError(
            "task.overlong: windows: examples that are split cannot be trained on anew", "use cut or reject"
        )
    return id_N, inputs


class Retrainer:
    """Trains a run's model anew, and takes the queries' losses under it.

    Args:
        run: Says what model, task, corpus and queries are.
        training: The recipe.
        device: torch device.

    Raises:
        SpecError, InputError, ContractError: Model, task or rows cannot be made or read.
    """

    def __init__(self, run: Run, training: Training, device: str) -> None:
        self._start, self._training, self._device = start_of(run, training), training, device
        self._task = load_task(untempered(run.spec.task))
        self.id_N, self._examples = read_examples(run, self._task)
        queries = query_inputs(run.queries, run.columns, self._task)
        self._queries = {query_id: self._tensors(inputs.whole()) for query_id, inputs in queries.items()}
        self._implementation = f"training {run.spec.model.implementation} anew"

    def _tensors(self, arrays: Any) -> Batch:
        import torch

        return {name: torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for name, array in arrays.items()}

    def query_losses(self, inside_N: np.ndarray, seed: int) -> np.ndarray:
        """Losses [Q] of the queries, in nats, under a model trained on some of the examples.

        Args:
            inside_N: Which examples are trained on.
            seed: Draws first weights and the order of examples.

        Raises:
            NumericsError: Training diverged.
        """
        import torch

        model = self.trained(np.flatnonzero(inside_N), seed)
        with torch.no_grad(), user_code(self._implementation):
            losses = [self._mean_loss(model, batch).double().item() for batch in self._queries.values()]
        if not np.isfinite(losses).all():
            raise NumericsError("a query's loss after training anew is not finite", "lower training.lr")
        return np.asarray(losses)

    def trained(self, row_M: np.ndarray, seed: int) -> nn.Module:
        """A model trained on some rows, in eval mode."""
        import torch

        model = load_model(self._start, self._device, seed)
        generator = torch.Generator().manual_seed(seed)
        optimizer = self._optimizer(model)
        rows = torch.from_numpy(row_M)
        with user_code(self._implementation), torch.random.fork_rng():
            torch.manual_seed(seed)
            model.train()
            for _ in range(self._training.epochs):
                for some in rows[torch.randperm(len(rows), generator=generator)].split(self._training.batch_rows):
                    optimizer.zero_grad(set_to_none=True)
                    self._mean_loss(model, self._tensors(self._examples.rows(some.numpy()))).backward()
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

    def _mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._task.loss_B(model, batch).mean()
