"""The sections of a spec that name an implementation: model, task, producer.

A built-in word has typed fields; anything else is `package.module:Class` with free options.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from .observe import has_credentials


def unknown_word(word: str, known: Iterable[str]) -> str:
    """Say that a word is not known, with the nearest one that is."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{word!r} is not known; {guess}known: {', '.join(known)}"


def without_password(uri: str) -> str:
    """Refuse a URI that carries a secret: it would stand in run.yaml, in messages and in logs."""
    if has_credentials(uri):
        raise ValueError("a URI with a password; credentials belong in the environment")
    return uri


Uri = Annotated[str, Field(min_length=1), AfterValidator(without_password)]


class Section(BaseModel):
    """Part of the tree: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _is_importable(name: str) -> bool:
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


class Extension(Section):
    """A section that names an implementation: a built-in word, or `package.module:Class`."""

    selector: ClassVar[str] = "name"

    @property
    def implementation(self) -> str:
        """The built-in word or `package.module:Class`."""
        return str(getattr(self, self.selector))

    @property
    def keywords(self) -> dict[str, Any]:
        """What the implementation's constructor is called with."""
        return self.model_dump(exclude={self.selector, "preset"})


class Custom(Extension):
    """Your own implementation, in a file outside this repository."""

    builtin: ClassVar[tuple[str, ...]] = ()

    options: dict[str, Any] = {}
    """Keyword arguments of the class."""

    @field_validator("name", "loader", check_fields=False)
    @classmethod
    def _importable_name(cls, value: str) -> str:
        if _is_importable(value):
            return value
        raise ValueError(f"{unknown_word(value, cls.builtin)}; or your own: package.module:Class")

    @property
    def keywords(self) -> dict[str, Any]:
        """The options as given, with what else the section holds."""
        return {**self.options, **self.model_dump(exclude={self.selector, "options"})}


class TorchModule(Extension):
    """A torch module made by your own function, with weights from a file."""

    selector: ClassVar[str] = "loader"

    loader: Literal["torch_module"] = "torch_module"
    """This loader."""
    factory: str
    """`package.module:function` that returns the module; its weights are then replaced by `weights_uri`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    weights_uri: Uri | None = None
    """State dict as safetensors, or as .pt of tensors only. Null: the factory returns the trained model itself."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Compute dtype. Losses are float32 or better whatever it is; float32 keeps small differences visible."""

    @field_validator("factory")
    @classmethod
    def _importable_factory(cls, value: str) -> str:
        if not _is_importable(value):
            raise ValueError(f"got {value!r}, expected package.module:function")
        return value


class CustomModel(Custom):
    """Your own loader."""

    selector: ClassVar[str] = "loader"
    builtin: ClassVar[tuple[str, ...]] = ("torch_module",)

    loader: str
    """`package.module:Class`, importable where the pipeline runs."""
    weights_uri: Uri | None = None
    """File whose digest ties the run to these weights; handed to the loader."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Compute dtype, handed to the loader."""


class ClassificationTask(Extension):
    """Cross-entropy of an integer label given features of one shape."""

    name: Literal["classification"] = "classification"
    """This task."""
    features: str | list[str] = "features"
    """Column of the input: numbers, (nested) lists, or image bytes; or several numeric columns, stacked."""
    label: str = "label"
    """Column of the class, an integer from 0."""
    shape: list[Annotated[int, Field(gt=0)]]
    """Shape of one input as the model takes it, without the batch: [1, 8, 8], [3, 224, 224], [20]."""
    mean: list[float] = []
    """Per-channel mean that is subtracted before the model; empty for none."""
    std: list[Annotated[float, Field(gt=0)]] = []
    """Per-channel standard deviation to divide by; empty for none."""

    @model_validator(mode="after")
    def _fits_shape(self) -> ClassificationTask:
        size, columns = math.prod(self.shape), self.features if isinstance(self.features, list) else []
        if len(columns) > 1 and len(columns) != size:
            raise ValueError(f"features names {len(columns)} columns, but shape {self.shape} holds {size} numbers")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, 1, self.shape[0] if self.shape else 1):
                raise ValueError(
                    f"{name} has {len(values)} values, but shape {self.shape} has {self.shape[0]} channels"
                )
        return self


class CustomTask(Custom):
    """Your own task."""

    builtin: ClassVar[tuple[str, ...]] = ("classification",)

    name: str
    """`package.module:Class`, importable where the pipeline runs."""


_Optimizer = Literal["sgd", "adam"]
_Mode = Literal["eval", "train"]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=1)]


class _Steps(Extension):
    """What gradient producers share."""

    optimizer: _Optimizer = "sgd"
    """`sgd` keeps the step linear in the gradient, as the symmetry argument wants; Adam's first step is its sign."""
    lr: _Positive = 0.01
    """Learning rate; with `normalize` the length of a step in weight space."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
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
    parameters: str = ""
    """Regular expression searched in parameter names: only those that match are tuned. Empty: all."""
    mode: _Mode = "eval"
    """`eval` keeps batch norm statistics and switches dropout off; `train` moves and applies them."""

    @field_validator("parameters")
    @classmethod
    def _regular_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from error
        return value


PAPER: Mapping[str, Any] = {
    "optimizer": "adam", "lr": 5e-3, "momentum": 0.0, "steps": 1, "weight_decay": 0.0, "normalize": False,
    "max_loss_change": 0.0, "parameters": "", "mode": "train",
    "repeat": 2, "noise_radius": 3.0, "noise_growth": 1.1, "noise_below": 5e-3, "noise_until": 1e-2, "noise_tries": 100,
}  # fmt: skip
"""The released recipe of Ko et al. (CVPR 2024): METHOD in pipeline/README.md says where each number comes from."""


class Unlearn(_Steps):
    """Gradient ascent on the query: examples whose loss rises with it helped the query."""

    name: Literal["unlearn"] = "unlearn"
    """This producer; the default, since ascent traces single queries."""
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


class Finetune(_Steps):
    """Gradient descent on the query: examples whose loss falls with it are like the query."""

    name: Literal["finetune"] = "finetune"
    """This producer; for queries that are many clean rows."""
    lr: _Positive = 0.05
    """Learning rate. With momentum .9 and 30 steps it finds flipped labels that the model has memorised (AUC .93 on digits,
    against .86 for the base loss alone)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of `sgd`."""
    steps: _Count = 30
    """Optimizer steps on the query at most; a query of several rows is one batch."""
    normalize: bool = False
    """Scale every gradient to length 1. Descent cannot run away below zero loss."""
    max_loss_change: _NotNegative = 0.0
    """No further step once the query's mean loss has moved by so much, in nats. 0: all steps."""


class CustomProducer(Custom):
    """Your own producer."""

    builtin: ClassVar[tuple[str, ...]] = ("unlearn", "finetune")

    name: str
    """`package.module:Class`, importable where the pipeline runs."""


def _tagger(key: str, builtin: Sequence[str]) -> Discriminator:
    def tag(value: Any) -> str:
        word = value.get(key, builtin[0]) if isinstance(value, Mapping) else getattr(value, key, None)
        return str(word) if word in builtin else "custom"

    return Discriminator(tag)


ModelSection = Annotated[
    Annotated[TorchModule, Tag("torch_module")] | Annotated[CustomModel, Tag("custom")],
    _tagger("loader", CustomModel.builtin),
]
TaskSection = Annotated[
    Annotated[ClassificationTask, Tag("classification")] | Annotated[CustomTask, Tag("custom")],
    _tagger("name", CustomTask.builtin),
]
ProducerSection = Annotated[
    Annotated[Unlearn, Tag("unlearn")]
    | Annotated[Finetune, Tag("finetune")]
    | Annotated[CustomProducer, Tag("custom")],
    _tagger("name", CustomProducer.builtin),
]
