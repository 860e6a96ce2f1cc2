"""Text as token ids, by the tokenizer that lies beside a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import InputError, SpecError, first_line
from ..importing import extra
from ..model_folder import TOKENIZER_FILES, local_copy, read_config

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
_SPACE = "\u2581"
"""What SentencePiece writes for a space."""
UNLIMITED = 1 << 24
"""What tokenizers say of a length that they do not know is beyond this."""


class Text:
    """A tokenizer and what the model's config says of tokens.

    Args:
        uri: Folder of the tokenizer; null where tokens come from the corpus and nothing is known of them.
        config_uri: Folder of the model's config; null for the tokenizer's.

    Raises:
        InputError: There is no such folder.
    """

    def __init__(self, uri: str | None, config_uri: str | None = None) -> None:
        self._uri, config_uri = uri, config_uri or uri
        self._config = read_config(config_uri) if config_uri is not None else {}

    @cached_property
    def _has_vocabulary(self) -> bool:
        """Without one, transformers makes an empty tokenizer."""
        if self._uri is None:
            return False
        names = os.listdir(local_copy(self._uri, TOKENIZER_FILES))
        return any(fnmatch(name, pattern) for name in names for pattern in _VOCABULARIES)

    @cached_property
    def _tokenizer(self) -> Any:
        with extra("hf", "task"):
            from transformers import AutoTokenizer

        assert self._uri is not None
        try:
            if not self._has_vocabulary:
                raise ValueError("there is no vocabulary in it, such as tokenizer.json")
            return AutoTokenizer.from_pretrained(local_copy(self._uri, TOKENIZER_FILES), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise InputError(
                f"no tokenizer can be read from {self._uri}: {first_line(error)}",
                "save one there with tokenizer.save_pretrained(...), or name another folder: task.tokenizer_uri",
            ) from error

    def require(self, template: bool = False) -> None:
        """See that there is a tokenizer, with a template for conversations if asked. Raises SpecError, InputError."""
        if self._uri is None:
            raise SpecError("task.tokenizer_uri: text needs a tokenizer", "name the folder of one, or use task.tokens")
        tokenizer = self._tokenizer
        if template and not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer in {self._uri} has no chat template", "use task.text with conversations as text"
            )

    @property
    def positions(self) -> int | None:
        """Places that the model's config has for tokens; null if it does not say."""
        return self._config.get("max_position_embeddings") or self._config.get("n_positions")

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for; null if nothing says."""
        said = self.positions
        if said is None and self._has_vocabulary:
            said = getattr(self._tokenizer, "model_max_length", None)
        return int(said) if said and said < UNLIMITED else None

    @property
    def end(self) -> int:
        """Id of the end-of-text token. Raises SpecError if the tokenizer has none."""
        if self._tokenizer.eos_token_id is None:
            raise SpecError(f"task.end: the tokenizer in {self._uri} has no end-of-text token")
        return int(self._tokenizer.eos_token_id)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Token ids as text, one each; numbers where there is no tokenizer."""
        if not self._has_vocabulary:
            return [f"{i} " for i in ids]
        return [self._piece(i) for i in ids]

    def _piece(self, i: int) -> str:
        """One token as text; of SentencePiece's the space before it too, which decoding leaves out at the beginning."""
        text, token = str(self._tokenizer.decode([i])), str(self._tokenizer.convert_ids_to_tokens(i))
        return f" {text}" if token.startswith(_SPACE) and not text.startswith(" ") else text

    def problem(self, ids: Sequence[int]) -> str:
        """Why a model cannot take these tokens; empty if it can."""
        size = self._config.get("vocab_size")
        outside = next((i for i in ids if i < 0 or (size is not None and i >= size)), None)
        if outside is None:
            return ""
        return f"token id {outside}" + (f", outside of the model's {size:,} tokens" if size else "")

    def texts(
        self, texts: np.ndarray, prompts: np.ndarray | None, special_tokens: bool
    ) -> Iterator[tuple[list[int], int]]:
        """Token ids of texts, each behind its prompt, and how many of the first are the prompt's.

        A token that reaches from the prompt into the text is the text's.
        """
        if not len(texts):
            return
        wholes = list(texts) if prompts is None else [a + b for a, b in zip(prompts, texts, strict=True)]
        fast = prompts is not None and self._tokenizer.is_fast
        out = self._tokenizer(wholes, add_special_tokens=special_tokens, return_offsets_mapping=fast, verbose=False)
        for i, ids in enumerate(out["input_ids"]):
            if prompts is None:
                yield ids, 0
            elif fast:
                inside = (stop <= len(prompts[i]) for _, stop in out["offset_mapping"][i])
                yield ids, next((at for at, of_prompt in enumerate(inside) if not of_prompt), len(ids))
            else:
                yield ids, len(self._tokenizer(prompts[i], add_special_tokens=special_tokens)["input_ids"])

    def targets(self, texts: np.ndarray) -> list[list[int]]:
        """Token ids of what a sequence-to-sequence model should answer."""
        return list(self._tokenizer(text_target=list(texts), verbose=False)["input_ids"]) if len(texts) else []

    def conversations(self, conversations: np.ndarray, answer_only: bool) -> Iterator[tuple[list[int], int, str]]:
        """Token ids of conversations by the tokenizer's template, how many of the first do not count, and why one is none."""
        from jinja2 import TemplateError

        for messages in conversations:
            try:
                whole = self._templated(messages)
                before = self._templated(messages[:-1], add_generation_prompt=True) if answer_only else ""
            except TemplateError as error:
                yield [], 0, f"a conversation that the tokenizer's template refuses: {first_line(error)}"
                continue
            if answer_only and not (before and whole.startswith(before)):
                yield [], 0, "a conversation whose last message is no answer as the tokenizer's template begins one"
                continue
            rest = np.array([whole[len(before) :]], object)
            for ids, count in self.texts(rest, np.array([before], object), special_tokens=False):
                yield ids, count, ""

    def _templated(self, messages: list[dict[str, str]], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options)) if messages else ""
