"""Language models: causal and sequence-to-sequence. Text becomes token sequences here; losses are those of their tokens.

Shapes: B batch, T tokens, S sequences.

Batches are padded on the right. A causal model never looks to the right, so it needs no mask, and the fastest attention kernels
take none; an encoder gets one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import Ragged, Sequences
from ..errors import ContractError
from ..records import Column
from .base import Batch, Uniforms
from .text import Text
from .tokens import IGNORED, drawn_tokens, require_causal, token_losses

_Ids = list[int]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class _Encoded:
    """One example: tokens, how many of the first do not count, and why it is none."""

    ids: _Ids
    prompt: int = 0
    problem: str = ""


@dataclass(kw_only=True, eq=False)
class CausalLM:
    """Next-token cross-entropy of a text, in nats: the mean over its tokens, or their sum. See Task and SequenceTask.

    The spec's fields of the same names say what each means.
    """

    text: str | None = None
    messages: str | None = None
    tokens: str | None = None
    prompt: str | None = None
    answer_only: bool = False
    tokenizer_uri: str | None = None
    config_uri: str | None = None
    special_tokens: bool = True
    end: bool = False
    max_tokens: int | None = None
    overlong: Literal["cut", "windows", "reject"] = "cut"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Raises SpecError, InputError: no tokenizer where one is needed, more tokens than the model has places for."""
        self._kind, self._column = next(
            (kind, name)
            for kind, name in (("tokens", self.tokens), ("messages", self.messages), ("text", self.text or "text"))
            if name is not None
        )
        self._text, self.per_token = Text(self.tokenizer_uri, self.config_uri), self.reduction == "mean"
        self.max_tokens = self._text.longest("task.max_tokens", self.max_tokens)
        if self._kind != "tokens":
            self._text.require(template=self._kind == "messages")

    def columns(self) -> list[Column]:
        """See Task."""
        found = [Column(self._kind, (self._column,), self._kind)]
        return found + (
            [Column("prompt", (self.prompt,), self._kind, optional=True)] if self.prompt is not None else []
        )

    def encode(self, raw: Mapping[str, np.ndarray]) -> Sequences:
        """See SequenceTask."""
        ids: list[_Ids] = []
        labels: list[_Ids] = []
        example_S: list[int] = []
        bad: dict[int, str] = {}
        overlong = 0
        for row, encoded in enumerate(self._encoded(raw)):
            if problem := encoded.problem or self._text.problem(encoded.ids):
                bad[row] = problem
                continue
            long = self.max_tokens is not None and len(encoded.ids) > self.max_tokens
            if long and self.overlong == "reject":
                bad[row] = f"{len(encoded.ids):,} tokens, more than {self.max_tokens:,}"
                continue
            counted = [window for window in self._windows(encoded) if any(each != IGNORED for each in window[1][1:])]
            if not counted:
                bad[row] = f"{len(encoded.ids)} tokens, none with a loss: a first token has none, nor has a prompt"
                continue
            overlong += long
            example_S += [row - len(bad)] * len(counted)
            for window, label in counted:
                ids.append(window)
                labels.append(label)
        label_rows = Ragged.of(labels, IGNORED)
        tokens_S = np.fromiter((sum(each != IGNORED for each in label[1:]) for label in labels), np.int64, len(labels))
        columns = {"input_ids": Ragged.of(ids, 0), "labels": label_rows}
        return Sequences(columns, np.asarray(example_S, np.int64), tokens_S, self.per_token, bad, overlong)

    def _encoded(self, raw: Mapping[str, np.ndarray]) -> Iterator[_Encoded]:
        prompts = raw.get("prompt")
        if self._kind == "tokens":
            for i, row in enumerate(raw["tokens"]):
                before = [] if prompts is None else list(prompts[i])
                yield _Encoded([*before, *row], len(before))
        elif self._kind == "messages":
            yield from (_Encoded(*each) for each in self._text.conversations(raw["messages"], self.answer_only))
        else:
            end = [self._text.end] if self.end else []
            pairs = self._text.texts(raw["text"], prompts, self.special_tokens)
            yield from (_Encoded([*ids, *end], prompt) for ids, prompt in pairs)

    def _windows(self, encoded: _Encoded) -> Iterator[tuple[_Ids, _Ids]]:
        """Tokens and labels of each sequence. A window begins with the last token before it, so none goes uncounted."""
        ids, size = encoded.ids, self.max_tokens or len(encoded.ids)
        labels = [IGNORED] * min(encoded.prompt, len(ids)) + ids[encoded.prompt :]
        if len(ids) <= size or self.overlong == "cut":
            yield ids[:size], labels[:size]
            return
        for start in range(0, len(ids) - 1, size - 1):
            yield ids[start : start + size], labels[start : start + size]

    def loss_B(self, model: nn.Module, batch: Batch) -> Tensor:
        """See Task: float64, from losses of tokens in float32 or better."""
        return _reduced(self.token_losses_BT(model, batch), batch["labels"][:, 1:], self.per_token)

    def sampled(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Batch:
        """See Samples: every token that counts drawn given the text's own tokens before it."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        label_BT = batch["labels"]
        ahead_BT = torch.nn.functional.pad(label_BT[:, 1:], (0, 1), value=IGNORED)
        drawn_BT = drawn_tokens(model, inputs, ahead_BT, uniforms)
        return {**batch, "labels": torch.cat([label_BT[:, :1], drawn_BT[:, :-1]], dim=1)}

    def token_losses_BT(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses of tokens 1 to T - 1 in nats: [B, T - 1]; 0 for those that do not count."""
        label_BT = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        require_causal(model, inputs)
        return token_losses(model, inputs, label_BT)[:, :-1]

    def token_ids_BT(self, batch: Batch) -> Tensor:
        """See SequenceTask."""
        return batch["labels"][:, 1:]

    def token_texts(self, ids: _Ids) -> list[str]:
        """See SequenceTask."""
        return self._text.pieces(ids)


@dataclass(kw_only=True, eq=False)
class Seq2Seq:
    """Cross-entropy of a target text given a source text, in nats: mean over the target's tokens, or sum. See Task, SequenceTask.

    The spec's fields of the same names say what each means.
    """

    text: str = "text"
    target: str = "target"
    tokenizer_uri: str | None = None
    config_uri: str | None = None
    max_tokens: int | None = None
    max_target_tokens: int | None = None
    overlong: Literal["cut", "reject"] = "cut"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Raises SpecError, InputError: there is no tokenizer, or more tokens than the model has places for."""
        self._text, self.per_token = Text(self.tokenizer_uri, self.config_uri), self.reduction == "mean"
        self._text.require()
        longest = self._text.longest
        self.max_tokens = longest("task.max_tokens", self.max_tokens, "encoder")
        if self.max_target_tokens is not None:
            longest("task.max_target_tokens", self.max_target_tokens, "decoder")
        targets = (self.max_target_tokens or self.max_tokens, self._text.tables[1])
        self._sizes = (self.max_tokens, min((size for size in targets if size is not None), default=None))

    def columns(self) -> list[Column]:
        """See Task."""
        return [Column(name, (column,), "text") for name, column in (("text", self.text), ("target", self.target))]

    def encode(self, raw: Mapping[str, np.ndarray]) -> Sequences:
        """See SequenceTask."""
        sources = [ids for ids, _ in self._text.texts(raw["text"], None, True)]
        targets = self._text.targets(raw["target"])
        kept: list[tuple[_Ids, _Ids]] = []
        bad: dict[int, str] = {}
        overlong = 0
        for row, pair in enumerate(zip(sources, targets, strict=True)):
            long = [size is not None and len(ids) > size for ids, size in zip(pair, self._sizes, strict=True)]
            problem = next(filter(None, map(self._text.problem, pair)), "")
            if any(long) and self.overlong == "reject":
                problem = (
                    f"{len(pair[0]):,} and {len(pair[1]):,} tokens, more than {self._sizes[0]} and {self._sizes[1]}"
                )
            if problem:
                bad[row] = problem
                continue
            overlong += any(long)
            kept.append((pair[0][: self._sizes[0]], pair[1][: self._sizes[1]]))
        columns = {
            "input_ids": Ragged.of([source for source, _ in kept], 0),
            "attention_mask": Ragged.of([[1] * len(source) for source, _ in kept], 0),
            "labels": Ragged.of([target for _, target in kept], IGNORED),
        }
        tokens_S = columns["labels"].length_S
        return Sequences(columns, np.arange(len(kept)), tokens_S, self.per_token, bad, overlong)

    def loss_B(self, model: nn.Module, batch: Batch) -> Tensor:
        """See Task: float64, from losses of tokens in float32 or better."""
        return _reduced(self.token_losses_BT(model, batch), batch["labels"], self.per_token)

    def token_losses_BT(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses of the target's tokens in nats: [B, T]; 0 behind its end."""
        return token_losses(model, _decoder_inputs(model, batch), batch["labels"])

    def sampled(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Batch:
        """See Samples: every token drawn given the target's own tokens before it, which stay what the decoder is given."""
        inputs = _decoder_inputs(model, batch)
        return {**inputs, "labels": drawn_tokens(model, inputs, batch["labels"], uniforms)}

    def token_ids_BT(self, batch: Batch) -> Tensor:
        """See SequenceTask."""
        return batch["labels"]

    def token_texts(self, ids: _Ids) -> list[str]:
        """See SequenceTask."""
        return self._text.pieces(ids)


def _decoder_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What the model is called with: the decoder gets the labels one behind, unless the batch says what it gets."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "decoder_input_ids" in inputs:  # the labels are no longer those of the text
        return inputs
    first_B1 = torch.full_like(batch["labels"][:, :1], _first_token(model))
    before_BT = torch.cat([first_B1, batch["labels"][:, :-1]], dim=1)
    return {**inputs, "decoder_input_ids": before_BT.masked_fill(before_BT == IGNORED, 0)}


def _first_token(model: nn.Module) -> int:
    """What a decoder's first token is given to say the first of the target. Raises ContractError if the config does not say."""
    found = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    if found is None:
        raise ContractError(
            f"{type(model).__name__}: its config has no decoder_start_token_id",
            "task seq2seq wants an encoder and a decoder, task causal_lm any other language model",
        )
    return int(found)


def _reduced(loss_BT: Tensor, label_BT: Tensor, per_token: bool) -> Tensor:
    total_B = loss_BT.double().sum(dim=1)
    return total_B / (label_BT != IGNORED).sum(dim=1) if per_token else total_B
