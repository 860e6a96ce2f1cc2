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
    optimizer: Literal["sgd", "adam", "lbfgs"] = "sgd"
    """Optimizer. `lbfgs` is for convex losses: all examples at once in float64, from the model of the whole corpus, until no
    entry of the gradient is above `tolerance`; of the other fields it heeds `weight_decay` alone."""
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
    tolerance: _Positive = 1e-10
    """Largest entry of the gradient that `lbfgs` ends with. At 1e-4 the noise of the solver is above the effect of an example."""

    @model_validator(mode="after")
    def _has_a_minimum(self) -> Training:
        if self.optimizer == "lbfgs" and not self.weight_decay:
            raise ValueError(
                "optimizer: lbfgs wants weight_decay above 0: without it examples that can be told apart have no minimum, and "
                "where the search ends depends on where it began"
            )
        return self


class LdsSection(Section):
    """Linear datamodelling score (Park et al. 2023): do scores add up to what training on part of the corpus does?"""

    subsets: Annotated[int, Field(ge=3)] = 100
    """Random parts of the corpus."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the examples that is in each."""
    retrainings: _Count = 5
    """Models trained on each part, from other first weights and in another order; their losses are averaged."""


class MirrorSection(Section):
    """The hypothesis itself (Ko et al. 2024): does training with a query tell what training without some examples would do?"""

    groups: Annotated[int, Field(ge=3)] = 100
    """Groups of examples that are left out in turn. Groups of one example are all different ones."""
    rows: _Count = 1
    """Examples of a group. One by one only where training has no noise (`training.optimizer: lbfgs`), else a tenth of the
    corpus or more."""
    by_wrong_labels: bool = False
    """Whether the share of wrong labels (`mislabelled`) runs from 0 in the first group to 1 in the last, as in the paper's
    notebook. Else groups are random."""
    retrainings: _Count = 1
    """Models trained for each group and query, whose losses are averaged: 1 for `lbfgs`, else 5."""


class LeaveOutSection(Section):
    """Leave-top-k-out (Ilyas et al. 2022): does a query's loss rise when its strongest proponents are not trained on?"""

    k: _Count = 50
    """Proponents that are left out, by what the method ranks by."""
    draws: Annotated[int, Field(ge=2)] = 10
    """Times that so many random examples are left out instead."""
    retrainings: _Count = 3
    """Models trained without them, whose losses are averaged. A method costs so many for each query."""


class TailPatchSection(Section):
    """Tail patch (Chang et al. 2024): does one step more on a proponent help the query? Trains nothing anew."""

    k: _Count = 10
    """Proponents of each query that the model takes a step on, one at a time."""
    draws: Annotated[int, Field(ge=2)] = 100
    """Random examples that it takes a step on instead."""
    lr: _Positive | None = None
    """Learning rate of the step, a plain gradient step. Null: `training.lr`."""


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
    mirror: MirrorSection | None = None
    """The mirrored influence hypothesis on this corpus, with methods beside it. Null: not asked."""
    leave_out: LeaveOutSection | None = None
    """Leave-top-k-out. Null: not asked."""
    tail_patch: TailPatchSection | None = None
    """Tail patch. Null: not asked."""
    truth: TruthSection | None = None
    """Retrieval of what is known to be behind the queries. Null: not asked."""
    mislabelled: MislabelledSection | None = None
    """Detection of wrong labels by opponents, beside detection by the runs' base losses. Null: not asked."""
    resources: ResourcesSection = ResourcesSection()
    """What retrainings ask of Ray: workers as `resources.score` says."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Every random number derives from it."""

    @model_validator(mode="after")
    def _something_to_do(self) -> Judge:
        asked = (self.lds, self.mirror, self.leave_out, self.tail_patch, self.truth, self.mislabelled)
        if not any(asked):
            raise ValueError("nothing is asked: give lds, mirror, leave_out, tail_patch, truth or mislabelled")
        if self.mirror and self.mirror.by_wrong_labels and not self.mislabelled:
            raise ValueError("mirror.by_wrong_labels: give mislabelled, which says what labels are wrong")
        if both := sorted(self.runs.keys() & self.scores.keys()):
            raise ValueError(f"runs and scores both name {', '.join(both)}")
        return self
