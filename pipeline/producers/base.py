"""The protocols of producers: of one that sees a query, and of two kinds that see a sample of the corpus too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..batches import own_copy
from ..changes import Added, LowRank
from ..curvatures.base import Parameters, Sample
from ..errors import NumericsError
from ..tasks.base import Batch, Task


@dataclass(frozen=True)
class Produced:
    """A counterpart as its producer leaves it.

    Args:
        model: The base model's copy, changed.
        steps: Optimizer steps taken.
        details: Anything worth a line in meta.json: numbers and short strings.
        added: Parameter name -> what was added to it, where that is known: saved instead of what it became.
        scale: What the scores are proportional to, above 0: the length of a step that was chosen for this model alone. Ensembles
            divide by it, so that their members count alike.
    """

    model: nn.Module
    steps: int
    details: dict[str, float | str] = field(default_factory=dict)
    added: Mapping[str, LowRank | Added] = field(default_factory=dict)
    scale: float = 1.0


class Producer(Protocol):
    """Makes counterparts. Its constructor takes the spec's fields as keyword arguments."""

    direction: int
    """+1 if the query's loss rises (ascent), -1 if it falls: score = direction * (counterpart_loss - base_loss)."""

    def produce(self, base: nn.Module, task: Task, query: Batch, seed: int) -> Produced:
        """One counterpart.

        Args:
            base: Base model in eval mode; must come back unchanged.
            task: Says what the query's loss is.
            query: All rows of the query as one batch [B, *shape].
            seed: Of this query alone; all randomness must derive from it.

        Raises:
            ContractError: The model or query does not fit the producer.
            NumericsError: A gradient or weight is not finite.
        """
        ...


@dataclass(frozen=True)
class Setting:
    """What a producer is shown of the base model and its corpus.

    Args:
        base: Base model in eval mode; must come back unchanged.
        task: Says what a loss is.
        probe: Some random examples, the same at every worker: batches [B, *shape], `Rows` where an example may have several.
        sample: All that were drawn, those of the probe among them, shared out over the workers.
        seed: All randomness must derive from it.
        first_order: Whether scores are derivatives along a step, so that its length changes their unit and nothing else.
    """

    base: nn.Module
    task: Task
    probe: Sequence[Batch]
    sample: Sample
    seed: int
    first_order: bool = False

    def losses(self) -> list[Tensor]:
        """Losses [B] of this worker's batches."""
        with torch.no_grad():
            return [self.task.loss_B(self.base, own_copy(batch)) for batch in self.sample.batches]

    def probe_losses(self) -> list[float]:
        """Losses of the probe's first batch, in nats."""
        with torch.no_grad():
            return self.task.loss_B(self.base, own_copy(self.probe[0])).double().tolist()

    def slope(self, parameters: Parameters, rows: Batch) -> Tensor:
        """Gradient [P] of the mean loss of some rows."""
        return parameters.gradient(lambda: self.task.loss_B(self.base, own_copy(rows)).mean())


@dataclass(frozen=True)
class Fitted:
    """What a producer found out about the corpus once, for all queries; saved with the run.

    Args:
        tensors: Name -> tensor.
        details: Numbers and short strings.
    """

    tensors: Mapping[str, Tensor]
    details: dict[str, float | str]


@dataclass(frozen=True)
class Ahead:
    """What a run has to do.

    Args:
        queries: Counterparts to make.
        rows: Of the corpus.
        actors: That score it; 1 where nobody knows.
    """

    queries: int
    rows: int
    actors: int


@dataclass(frozen=True)
class Chosen:
    """What a producer chose of what its spec leaves open.

    Args:
        fields: Name -> value.
        line: For a person; empty where all is as without a budget.
    """

    fields: Mapping[str, Any]
    line: str = ""


class CorpusProducer(Protocol):
    """Makes counterparts one by one, with a look at the corpus. Workers share out the queries; each has the whole sample.

    Its constructor takes the spec's fields as keyword arguments.
    """

    direction: int
    """As of Producer."""
    sample_rows: int
    """Rows of the corpus that it wants to see."""

    def prepare(self, base: nn.Module, task: Task, sample: Sequence[Batch], seed: int) -> Any:
        """What is found out before there is a query, once at every worker; nothing of it may depend on the worker.

        Args:
            base: Base model in eval mode; must come back unchanged.
            task: Says what a loss is.
            sample: All rows that were drawn: batches [B, *shape], at least one.
            seed: All randomness must derive from it.

        Raises:
            ContractError: The model or task does not fit the producer.
            NumericsError: Something is not finite.
        """
        ...

    def produce(self, base: nn.Module, task: Task, query: Batch, seed: int, prepared: Any) -> Produced:
        """One counterpart, as of Producer.

        Args:
            base: As of Producer.
            task: As of Producer.
            query: As of Producer.
            seed: As of Producer.
            prepared: What `prepare` returned.

        Raises:
            ContractError, NumericsError: As of Producer.
        """
        ...


class SampleProducer(Protocol):
    """Makes counterparts of many queries at once, with a look at the corpus. All workers do so together.

    Its constructor takes the spec's fields as keyword arguments.
    """

    direction: int
    """As of Producer."""
    sample_rows: int | None
    """Rows of the corpus that it wants to see; null for one that chooses. That one is a dataclass and has

    - `is_open`: whether anything is to be chosen;
    - `choose(setting, ahead) -> Chosen`: fields that take the place of its own, by what some rows take.
    """

    def fit(self, setting: Setting) -> Fitted:
        """What can be found out before there is a query: the same at every worker.

        Raises:
            ContractError: The model or task does not fit the producer.
            NumericsError: Something is not finite.
        """
        ...

    def produce_all(
        self, setting: Setting, queries: Mapping[str, Batch], fitted: Fitted
    ) -> Iterator[tuple[str, Produced | NumericsError]]:
        """Query id and counterpart, or what stands in the way of this one alone: the same, in the same order, at every worker.

        A counterpart's model may be one that the next counterpart changes: use it before the next is asked for.

        Args:
            setting: As `fit` saw it.
            queries: Query id -> all its rows.
            fitted: What `fit` found out, perhaps at an earlier start.

        Raises:
            ContractError: The model or task does not fit the producer.
        """
        ...
