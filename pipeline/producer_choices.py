"""The sections of a spec that say how a counterpart is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from .sections import Custom, Extension, Uri

_Optimizer = Literal["sgd", "adam"]
_Mode = Literal["eval", "train"]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=1)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Blocks = Annotated[int, Field(ge=0)]


def _regular_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from error
    return value


def _names_or_place(parameters: str, last_blocks: int) -> None:
    if parameters and last_blocks:
        raise ValueError("parameters chooses by name, last_blocks by place in the model: give one of them")


class Tuning(Extension):
    """What producers that tune a copy share: which of its parameters."""

    parameters: str = ""
    """Regular expression searched in parameter names: only those that match are tuned. Empty: all."""
    last_blocks: _Blocks = 0
    """Tune only so many last blocks of the model, and what comes behind them (final norm, output layer). A block is what the
    model repeats (a decoder layer, a BasicBlock of a ResNet), else a layer. With `lora_rank`: only they get adapters.
    Scoring computes all before them once. On three small models `unlearn` lost no LDS, but found fewer own copies. 0: all."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Tune adapters of this rank (LoRA, by peft) instead of weights: the counterpart of a large model is then a few megabytes,
    and any number of them fit beside the base. 0: weights themselves."""
    lora_alpha: _Positive = 16.0
    """Strength of the adapters: their product is scaled by `lora_alpha / lora_rank`."""
    lora_targets: str = ""
    """Regular expression searched in names of linear layers: those that match get an adapter. Empty: all but the last, which
    makes the logits."""

    @model_validator(mode="after")
    def _weights_or_adapters(self) -> Self:
        if self.lora_rank and self.parameters:
            raise ValueError(
                "parameters chooses among weights, lora_targets among layers for adapters: give one of them"
            )
        _names_or_place(self.parameters, self.last_blocks)
        return self

    _check_patterns = field_validator("parameters", "lora_targets")(_regular_expression)


class Steps(Tuning):
    """What gradient producers share."""

    optimizer: _Optimizer = "sgd"
    """`sgd` keeps the step linear in the gradient, as the symmetry argument wants; Adam's first step is its sign."""
    lr: _Positive = 0.01
    """Learning rate; with `normalize` the length of a step in weight space."""
    momentum: _Momentum = 0.0
    """Momentum of `sgd`."""
    steps: _Count = 100
    """Optimizer steps on the query at most; a query of several rows is one batch."""
    weight_decay: _NotNegative = 0.0
    """Weight decay, as the optimizer means it."""
    normalize: bool = True
    """Scale every gradient to length 1, so that `lr` is the length of a step and even a query of near-zero loss moves the
    model. Without, ascent runs away: on digits, SGD with lr .1 for 20 steps ended in NaN for half of the queries."""
    max_loss_change: _NotNegative = 0.5
    """No further step once the query's mean loss has moved by so much, in nats. 0: all steps. Small enough to stay near the
    base model; on digits the query's own copy is found best between .2 and .5."""
    mode: _Mode = "eval"
    """`eval` keeps batch norm statistics and switches dropout off; `train` moves and applies them."""


PAPER: Mapping[str, Any] = {
    "optimizer": "adam", "lr": 5e-3, "momentum": 0.0, "steps": 1, "weight_decay": 0.0, "normalize": False,
    "max_loss_change": 0.0, "parameters": "", "mode": "train",
    "repeat": 2, "noise_radius": 3.0, "noise_growth": 1.1, "noise_below": 5e-3, "noise_until": 1e-2, "noise_tries": 100,
}  # fmt: skip
"""The released recipe of Ko et al. (CVPR 2024): METHOD in pipeline/README.md says where each number comes from."""


class Unlearn(Steps):
    """Gradient ascent on the query: examples whose loss rises with it helped the query."""

    name: Literal["unlearn"] = "unlearn"
    """This producer; the default of tasks of your own, since ascent traces single queries."""
    preset: Literal["paper"] | None = None
    """`paper`: the released recipe of Ko et al. 2024. Fields given beside it override it."""
    repeat: _Count = 1
    """Copies of the query in its batch (the paper's 2 gives batch norm in train mode a batch)."""
    noise_radius: _NotNegative = 0.0
    """Radius of the sphere around the input from which a point replaces a query of near-zero loss. 0: never."""
    noise_growth: Annotated[float, Field(ge=1)] = 1.1
    """Factor on the radius at every retry."""
    noise_below: _NotNegative = 5e-3
    """Noise is added when half the query's loss is under this, in nats: its gradient is then rounding noise."""
    noise_until: _NotNegative = 1e-2
    """Noise has grown enough when half the query's loss reaches this, in nats."""
    noise_tries: _Count = 100
    """Retries before giving up with an error (the released loop has no bound)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") == "paper":
            return {**PAPER, **data}
        return data


class Finetune(Steps):
    """Gradient descent on the query: examples whose loss falls with it are like the query."""

    name: Literal["finetune"] = "finetune"
    """This producer; for queries that are many clean rows."""
    lr: _Positive = 0.05
    """Learning rate. With momentum .9 and 30 steps it finds flipped labels that the model has memorised (AUC .93 on digits,
    against .86 for the base loss alone)."""
    momentum: _Momentum = 0.9
    """Momentum of `sgd`."""
    steps: _Count = 30
    """Optimizer steps on the query at most; a query of several rows is one batch."""
    normalize: bool = False
    """Scale every gradient to length 1. Descent cannot run away below zero loss."""
    max_loss_change: _NotNegative = 0.0
    """No further step once the query's mean loss has moved by so much, in nats. 0: all steps."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a query's rows on which no step is taken, drawn by seed, at least one: the counterpart is the model after the step
    at which their mean loss is lowest. Every query then needs 2 rows or more. 0: none; the model after the last step."""
    patience: _Count = 10
    """With `validation_fraction`: end after so many steps without a lower held-out loss."""


class Retain(Tuning):
    """Gradient ascent on the query that holds the model's outputs on the corpus: examples whose loss rises helped the query."""

    name: Literal["retain"] = "retain"
    """This producer; it sees a sample of the corpus."""
    strength: _Share = 0.01
    """How hard a step pushes the query's loss up, against the divergence KL(base || copy) of the outputs on the corpus (of losses
    other than cross-entropy, their Bregman divergence), which pulls back. The query's gradient is scaled to this length, in units
    of weights in which the divergence bends by at most 1 nat: no model needs its own."""
    lr: _Share = 0.04
    """Learning rate, in the same units. With `steps` it says how far the copy goes where the corpus holds it least: with few of
    both scores are those of `unlearn`, with many they trust the sample too much. On a digits MLP twice as much was better, on
    tables and texts half as much."""
    momentum: _Momentum = 0.9
    """Momentum of the steps."""
    steps: _Count = 100
    """Steps, each on the query and on one batch of the sample."""
    max_loss_change: _NotNegative = 1.0
    """The query's loss is not pushed on while it has risen by so much, in nats; the corpus still pulls. It keeps the copy near
    the base, whatever `strength` is. 0: no limit."""
    sample_rows: _Count = 4096
    """Rows of the corpus that are held, drawn at random; all of a smaller corpus. A batch is `score.batch_rows` rows; of texts,
    a quarter of `score.batch_tokens`."""


class Natural(Extension):
    """One small step along the query's gradient, solved against the curvature of the corpus's loss: scores are influences."""

    name: Literal["natural"] = "natural"
    """This producer; it sees a sample of the corpus, and solves for several queries at once."""
    curvature: Literal["gauss_newton", "ekfac", "gfim", "diagonal"] | None = None
    """How the corpus's loss bends. `gauss_newton`: as it does; inverted directly where the sample's rows and the model's numbers
    leave room (about 2 GiB), else by conjugate gradients, which take many passes for every query. The others are fitted in two
    or three passes, with labels that the model draws, saved with the run, and cost next to nothing for a query: `ekfac`, layer
    by layer in an eigenbasis (EK-FAC); `gfim`, one matrix for all columns of a weight (HyperINF); `diagonal`, each number by
    itself (Attribution by Unlearning). Null: `gauss_newton` if 512 rows of the sample, or all, can be inverted directly, else
    `ekfac`."""
    damping: _Positive | None = None
    """Added to the curvature's diagonal, in nats. Null: `damping_share`, else chosen so that the sample's rows support .45 of
    gradients' influence norms (.57 of a curvature that is fitted): within .02 of the best LDS on seven worlds."""
    damping_share: _Positive | None = None
    """The same as a share of each layer's own mean eigenvalue, for curvatures that are fitted. Layers of language models are bent
    so differently that no damping in nats suits them all."""
    budget_s: _Positive | None = None
    """Seconds that stage tune may take, about. Where `sample_rows` is not given, the first start measures what a pass through a
    few rows takes, and takes so many that it ends in time: 4,096 or all, if it can. What it chose is frozen with the run, in
    choice.json and run.yaml. Null: 60, or as long as scoring the corpus takes, if that is more."""
    curvatures: Uri | None = None
    """Folder in which what is fitted to the corpus, curvature and damping, is kept for other runs of the same model and corpus
    with the same fields here: they ask other questions and fit nothing. It moves no score. Null: kept with the run alone."""
    iterations: _Count = 20
    """Conjugate-gradient iterations of `gauss_newton` at most; each goes through the sample once."""
    tolerance: _Positive = 1e-3
    """They end when no query's residual is longer than this share of its gradient."""
    sample_rows: _Count | None = None
    """Rows of the corpus that the curvature is measured on, drawn at random; all of a smaller corpus. More is better; where
    `curvature` is not given, no more are used than can be inverted directly. Null: 4,096, or as many as `budget_s` allows, 16 at
    least. With a number here nothing is measured: the same spec does the same on any machine."""
    step: _Positive | None = None
    """Length of the step, as the rise of the query's loss in nats to first order. Null: for each query that at which the
    loss differences of some rows of the corpus are nearest to their exact derivatives."""
    steps: _Count = 1
    """Steps that this length is walked in (the K of Attribution by Unlearning): each along the query's gradient where the one
    before ended, by the same curvature. More than one wants a longer `step`, at which losses bend, costs a solve each, and runs
    away where that is long."""
    parameters: str = ""
    """Regular expression searched in parameter names: only those that match are moved. Empty: all."""
    last_blocks: _Blocks = 0
    """Move only so many last blocks of the model, and what comes behind them; the curvature is that of these alone. What a block
    is: see `unlearn`. It cost an MLP .09 of its LDS of .56, a CNN nothing down to its last layer; own copies are found
    less often. 0: all."""

    _check_parameters = field_validator("parameters")(_regular_expression)

    @property
    def keywords(self) -> dict[str, Any]:
        """See Extension; where a fit is kept is none of the producer's business."""
        return {name: value for name, value in super().keywords.items() if name != "curvatures"}

    @model_validator(mode="after")
    def _one_choice(self) -> Natural:
        if self.damping_share is not None:
            if self.damping is not None:
                raise ValueError("damping is in nats, damping_share in each layer's mean eigenvalue: give one of them")
            if self.curvature == "gauss_newton":
                raise ValueError("damping_share goes with a curvature of layers: ekfac, gfim or diagonal")
        _names_or_place(self.parameters, self.last_blocks)
        return self


class Reference(Extension):
    """A checkpoint that exists already, compared with the base: nothing is tuned. Needs no queries."""

    name: Literal["reference"] = "reference"
    """This producer; with `rank.transform: relative` it is DavIR, else CoLoR-Filter, RHO-LOSS, Rho-1 or Moore-Lewis."""
    weights_uri: Uri | None = None
    """The counterpart's weights, of the base's architecture: a file as for torch_module, or a folder as for hf_transformers.
    Null: the base's own, with `adapter_uri`."""
    adapter_uri: Uri | None = None
    """Folder of a PEFT adapter, merged into these weights."""
    direction: Literal[-1, 1] = -1
    """-1: examples that the counterpart finds easier than the base score high (it was trained on what is wanted). 1: harder."""

    @model_validator(mode="after")
    def _something(self) -> Reference:
        if self.weights_uri is None and self.adapter_uri is None:
            raise ValueError("give weights_uri, adapter_uri or both")
        return self


class MaskHeads(Extension):
    """The base with its retrieval heads masked (AttentionInfluence). Needs no queries."""

    name: Literal["mask_heads"] = "mask_heads"
    """This producer; use it with `rank.transform: relative` and `rank.fraction`."""
    share: _Share = 0.05
    """Share of all heads that is masked, those of highest copy score; at least one."""
    samples: _Count = 100
    """Generated sequences of keys and values on which heads are looked at (the paper: 800)."""
    sample_tokens: Annotated[int, Field(ge=64)] = 512
    """Tokens of each (the paper: near 4,096); attention of all heads on one sequence is held at a time."""


class CustomProducer(Custom):
    """Your own producer."""

    builtin: ClassVar[tuple[str, ...]] = ("unlearn", "finetune", "retain", "natural", "reference", "mask_heads")

    name: str
    """`package.module:Class`, importable where the pipeline runs."""
