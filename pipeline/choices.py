"""The sections of a spec that name an implementation: model, task, producer.

A built-in word has typed fields; anything else is `package.module:Class` with free options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from .producer_choices import CustomProducer, Finetune, MaskHeads, Natural, Reference, Retain, Unlearn
from .sections import Custom, Extension, Uri, is_importable


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
        if not is_importable(value):
            raise ValueError(f"got {value!r}, expected package.module:function")
        return value


class HfTransformers(Extension):
    """A causal or sequence-to-sequence language model in Hugging Face format."""

    selector: ClassVar[str] = "loader"

    loader: Literal["hf_transformers"] = "hf_transformers"
    """This loader."""
    weights_uri: Uri
    """Folder with config.json, *.safetensors and the tokenizer's files, as save_pretrained writes it: local, s3://...,
    or hf://owner/name, which downloads it from the Hugging Face hub; nothing else ever does."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Compute dtype. bfloat16 is several times faster on accelerators and on CPUs with AMX, but rounds by as much as a score of a
    short tuning: SmolLM2's ranks under both correlate by .8 with adapters, by 0 with whole weights in small steps. Losses are
    float32 or better whatever it is."""
    adapter_uri: Uri | None = None
    """Folder of a PEFT adapter that belongs to the base model; it is merged into the weights."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """How accelerate spreads a model that is larger than one GPU over those of a worker (`resources.score.gpus: 2`)."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Transformers' attention implementation. Null: its own choice, sdpa where it has one for the model, else eager."""


class CustomModel(Custom):
    """Your own loader."""

    selector: ClassVar[str] = "loader"
    builtin: ClassVar[tuple[str, ...]] = ("torch_module", "hf_transformers")

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
    """Shape of one input as the model takes it, without the batch: [1, 8, 8], [3, 224, 224], [20]. A picture of another
    size is rejected by its header, undecoded, however large it says it is."""
    mean: list[float] = []
    """Per-channel mean that is subtracted before the model; empty for none."""
    std: list[Annotated[float, Field(gt=0)]] = []
    """Per-channel standard deviation to divide by; empty for none."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Logits are divided by it before any loss. Above 1 the model counts as less certain than it says: examples that it has
    fitted to zero loss have one again, and gradients that tell them apart. Null: 2, which gives far truer scores on digits; 1
    with `preset: paper`, and whenever models are trained anew."""

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


_Tokens = Annotated[int, Field(ge=2)]


class LanguageTask(Extension):
    """What tasks of language models share."""

    tokenizer_uri: Uri | None = None
    """Folder of the tokenizer. Null: the model's, if the loader is hf_transformers."""
    config_uri: Uri | None = None
    """Folder of the config that says how long a sequence may be and how many tokens there are. Null: the model's, if the loader
    is hf_transformers, else the tokenizer's."""
    max_tokens: _Tokens | None = None
    """Longest sequence, in tokens. Null: as many as the model's config says it was made for, and as it has positions for. More
    are refused, but where the config scales rotary positions (rope_parameters)."""
    reduction: Literal["mean", "sum"] = "mean"
    """Loss of an example: `mean` per token, so that texts of all lengths compare, or `sum`. The columns are then called
    base_loss_per_token and counterpart_loss_per_token, or base_loss and counterpart_loss."""


class CausalLMTask(LanguageTask):
    """Next-token cross-entropy of texts, conversations or token ids."""

    name: Literal["causal_lm"] = "causal_lm"
    """This task."""
    text: str | None = None
    """Column of the text. Null: `text`, unless `messages` or `tokens` is given."""
    messages: str | None = None
    """Column of conversations instead, lists of {role, content}: they become text by the tokenizer's chat template."""
    tokens: str | None = None
    """Column of token ids instead: no tokenizer is needed."""
    prompt: str | None = None
    """Column of what stands before the text (or the tokens): read by the model, but its own loss does not count. Null or empty:
    nothing."""
    answer_only: bool = False
    """Conversations: only the last message counts, as an answer to all before it."""
    special_tokens: bool = True
    """Whether the tokenizer adds its own special tokens to a text, as it was made to."""
    end: bool = False
    """Whether the end-of-text token stands, and counts, behind every text."""
    overlong: Literal["cut", "windows", "reject"] = "cut"
    """An example of more than `max_tokens`: its first tokens only; or all of it in windows, each with the one token before it
    as its context; or rejected. How many there were stands in the commits. A query is never split: `windows` refuses one."""

    @model_validator(mode="after")
    def _one_input(self) -> CausalLMTask:
        if sum(each is not None for each in (self.text, self.messages, self.tokens)) > 1:
            raise ValueError("give one of text, messages and tokens")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("prompt goes with text or tokens; of conversations, answer_only leaves the prompt out")
        if self.answer_only and self.messages is None:
            raise ValueError("answer_only goes with messages")
        return self


class Seq2SeqTask(LanguageTask):
    """Cross-entropy of a target text given a source text."""

    name: Literal["seq2seq"] = "seq2seq"
    """This task."""
    text: str = "text"
    """Column of the source."""
    target: str = "target"
    """Column of the target, whose loss counts."""
    max_target_tokens: _Tokens | None = None
    """Longest target, in tokens. Null: as `max_tokens`."""
    overlong: Literal["cut", "reject"] = "cut"
    """A source or target of more tokens: its first ones only, or rejected. How many there were stands in the commits."""


class CustomTask(Custom):
    """Your own task."""

    builtin: ClassVar[tuple[str, ...]] = ("classification", "causal_lm", "seq2seq")

    name: str
    """`package.module:Class`, importable where the pipeline runs."""


def _tagger(key: str, builtin: Sequence[str]) -> Discriminator:
    def tag(value: Any) -> str:
        word = value.get(key, builtin[0]) if isinstance(value, Mapping) else getattr(value, key, None)
        return str(word) if word in builtin else "custom"

    return Discriminator(tag)


ModelSection = Annotated[
    Annotated[TorchModule, Tag("torch_module")]
    | Annotated[HfTransformers, Tag("hf_transformers")]
    | Annotated[CustomModel, Tag("custom")],
    _tagger("loader", CustomModel.builtin),
]
TaskSection = Annotated[
    Annotated[ClassificationTask, Tag("classification")]
    | Annotated[CausalLMTask, Tag("causal_lm")]
    | Annotated[Seq2SeqTask, Tag("seq2seq")]
    | Annotated[CustomTask, Tag("custom")],
    _tagger("name", CustomTask.builtin),
]
ProducerSection = Annotated[
    Annotated[Unlearn, Tag("unlearn")]
    | Annotated[Finetune, Tag("finetune")]
    | Annotated[Retain, Tag("retain")]
    | Annotated[Natural, Tag("natural")]
    | Annotated[Reference, Tag("reference")]
    | Annotated[MaskHeads, Tag("mask_heads")]
    | Annotated[CustomProducer, Tag("custom")],
    _tagger("name", CustomProducer.builtin),
]
