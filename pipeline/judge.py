"""What is judged and how: the spec of `mirrorscope evaluate`, a tree of its own beside that of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .choices import ModelSection
from .sections import Section, Uri
from .spec import ResourcesSection

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Name = Annotated[str, Field(min_length=1, max_length=60)]


class JudgeSection(Section):
    """Where judgements live."""

    uri: Uri
    """Folder of retrainings, tables and figures. Methods that are judged later find the retrainings there."""


class Training(Section):
    """How the model under question was trained, so that it can be trained again without some of its examples."""

    start: ModelSection | None = None
    """The model before training. Null: what the runs' `model.factory` returns, with weights drawn anew for each retraining."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer."""
    lr: _Positive = 0.05
    """Learning rate, constant."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of `sgd`."""
    weight_decay: _NotNegative = 0.0
    """Weight decay, as the optimizer means it."""
    epochs: _Count = 30
    """Times that every example is seen."""
    batch_rows: _Count = 64
    """Examples of a step; they are shuffled anew for each epoch."""


class LdsSection(Section):
    """Linear datamodelling score (Park et al. 2023): do scores add up to what training on part of the corpus does?"""

    subsets: Annotated[int, Field(ge=3)] = 100
    """Random parts of the corpus."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the examples that is in each."""
    retrainings: _Count = 5
    """Models trained on each part, from other first weights and in another order; their losses are averaged."""


class TruthSection(Section):
    """Which training examples are behind a query, where that is known: copies of it, sentences that state it."""

    uri: Uri
    """Table with columns `query_id` and `example_id`: Parquet, CSV or JSON lines."""
    k: _Count = 10
    """Depth of recall."""


class MislabelledSection(Section):
    """Which training examples carry a wrong label, where that is known."""

    uri: Uri
    """Table with column `example_id`: Parquet, CSV or JSON lines."""


class Judge(Section):
    """One judgement of several methods, on the same model, corpus and queries."""

    judge: JudgeSection
    """Where judgements live."""
    runs: Annotated[dict[_Name, Uri], Field(min_length=1)]
    """Name of a method -> its finished run. The first says what model, corpus and queries are; the others must agree."""
    scores: dict[_Name, Uri] = {}
    """Name of a method -> scores made elsewhere, a Parquet file with columns `query_id`, `example_id` and `score` (higher = more
    helpful), of all pairs."""
    training: Training = Training()
    """How to train again."""
    lds: LdsSection | None = None
    """Linear datamodelling score. Null: not asked."""
    truth: TruthSection | None = None
    """Retrieval of what is known to be behind the queries. Null: not asked."""
    mislabelled: MislabelledSection | None = None
    """Detection of wrong labels by opponents. Null: not asked."""
    resources: ResourcesSection = ResourcesSection()
    """What retrainings ask of Ray: workers as `resources.score` says."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Every random number derives from it."""

    @model_validator(mode="after")
    def _something_to_do(self) -> Judge:
        if not (self.lds or self.truth or self.mislabelled):
            raise ValueError("nothing is asked: give lds, truth or mislabelled")
        if both := sorted(self.runs.keys() & self.scores.keys()):
            raise ValueError(f"runs and scores both name {', '.join(both)}")
        return self
