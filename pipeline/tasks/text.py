"""Text as token ids, by the tokenizer that lies beside a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

import numpy as np

from ..errors import InputError, SpecError, first_line
from ..importing import extra
from ..model_folder import TOKENIZER_FILES, load_error, local_copy, read_config
from .positions import config_positions, is_scaled, table_sizes

_VOCABULARIES = (
    "tokenizer.json", "*.model", "vocab.*", "vocab-*.json", "*_vocab.json", "dict.txt", "*.tiktoken", "*.spm", "*.codes",
    "*.tokenizer",
)  # fmt: skip
_NO_TOKENIZER = "save one there with tokenizer.save_pretrained(...), or name another folder: task.tokenizer_uri"
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
        self._uri, self._config_uri = uri, config_uri or uri
        self._config = read_config(self._config_uri) if self._config_uri is not None else {}

    @cached_property
    def _has_vocabulary(self) -> bool:
        """Whether the folder has a tokenizer; of a folder without one nothing is loaded."""
        if self._uri is None:
            return False
        names = os.listdir(local_copy(self._uri, TOKENIZER_FILES))
        if any(fnmatch(name, pattern) for name in names for pattern in _VOCABULARIES):
            return True
        # Bytes and characters need no vocabulary: ByT5, CANINE. Of other classes transformers makes an empty tokenizer.
        return "tokenizer_config.json" in names and not type(self._load()).vocab_files_names

    def _load(self) -> Any:
        with extra("hf", "task"):
            from transformers import AutoTokenizer

        assert self._uri is not None
        place = local_copy(self._uri, TOKENIZER_FILES)
        try:
            return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
            raise load_error(self._uri, f"no tokenizer can be read from {self._uri}", error, _NO_TOKENIZER) from error

    @cached_property
    def _tokenizer(self) -> Any:
        if not self._has_vocabulary:
            raise InputError(
                f"no tokenizer can be read from {self._uri}: there is no vocabulary in it, such as tokenizer.json",
                _NO_TOKENIZER,
            )
        return self._load()

    def require(self, template: bool = False) -> None:
        """See that there is a tokenizer, with a template for conversations if asked. Raises SpecError, InputError."""
        if self._uri is None:
            raise SpecError("task.tokenizer_uri: text needs a tokenizer", "name the folder of one, or use task.tokens")
        tokenizer = self._tokenizer
        if template and not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer in {self._uri} has no chat template", "use task.text with conversations as text"
            )

    @cached_property
    def tables(self) -> tuple[int | None, int | None]:
        """Tokens for which an encoder's and a decoder's table of positions have a row; null where there is none."""
        return table_sizes(self._config_uri, self._config) if self._config_uri is not None else (None, None)

    def longest(self, field: str, asked: int | None, side: Literal["encoder", "decoder"] | None = None) -> int | None:
        """Tokens that a sequence may have: as many as are asked for, else as the model was made for; null if nothing says.

        Args:
            field: Of the spec, for messages.
            asked: What is in it.
            side: Of a sequence-to-sequence model; null for another.

        Raises:
            SpecError: More are asked for than the model has positions for.
        """
        table = self.tables[0 if side == "encoder" else 1]
        if asked is None:
            known = [size for size in (table, self._context) if size is not None]
            return min(known, default=None)
        said = None if side is not None or is_scaled(self._config) else config_positions(self._config)
        limit = said if table is None else table
        if limit is not None and asked > limit:
            raise SpecError(
                f"{field}: got {asked:,}, the model has places for {limit:,}",
                "lower it; a table of positions ends there, and positions that are computed serve more only where the "
                "model's config scales them (rope_parameters)",
            )
        return asked

    @property
    def _context(self) -> int | None:
        """Tokens that the model was made for by its config or tokenizer."""
        said = config_positions(self._config)
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
                alone = self._tokenizer(prompts[i], add_special_tokens=special_tokens)["input_ids"]
                alike = takewhile(lambda pair: pair[0] == pair[1], zip(alone, ids, strict=False))
                yield ids, len(list(alike))  # alone, a prompt may end with a special token

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
