"""How many tokens a model has positions for, from its config alone: the model is made without memory for its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..model_folder import TOKENIZER_FILES, local_copy

_TABLE = re.compile(r"(?:^|\.)(?:\w*position\w*|wpe)$")
_ROTARY = ("rope_parameters", "rope_scaling", "rope_theta")
"""Keys of configs whose models compute positions and have no table of them."""


def config_positions(config: Mapping[str, Any]) -> int | None:
    """Positions that a config says the model was made for; null if it does not say."""
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return int(found) if found else None


def is_scaled(config: Mapping[str, Any]) -> bool:
    """Whether rotary positions are scaled (linear, dynamic, YaRN, ...), which serves longer texts than the config's number."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    return any((kind.get("rope_type") or kind.get("type") or "default") != "default" for kind in kinds)


def table_sizes(config_uri: str, config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Tokens for which the tables of positions of an encoder and of a decoder have a row; null where there is no table.

    A table can be larger or smaller than the config's number: OPT and BART leave rows out at its beginning, RoBERTa begins
    behind the row of its padding. A model that is a decoder alone has the same number twice.

    Args:
        config_uri: Folder of the model's config.
        config: What is in it.

    Raises:
        InputError, StorageError: As `local_copy`.
    """
    if "model_type" not in config or any(key in config for key in _ROTARY):
        return None, None
    model = _without_weights(local_copy(config_uri, TOKENIZER_FILES))
    found: dict[str, list[int]] = {"encoder": [], "decoder": []} if model is not None else {}
    for name, module in model.named_modules() if model is not None else ():
        if isinstance(module, nn.Embedding) and _TABLE.search(name) and "relative" not in name:
            skipped = getattr(module, "offset", 0) + (0 if module.padding_idx is None else module.padding_idx + 1)
            for side, sizes in found.items():
                if side in name or not ({"encoder", "decoder"} & set(name.split("."))):
                    sizes.append(module.num_embeddings - skipped)
    source, target = (min(found.get(side) or [0]) or None for side in ("encoder", "decoder"))
    return source, target


def _without_weights(place: str) -> nn.Module | None:
    """A language model of a folder's config on torch's meta device; null where transformers makes none of it."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return kind.from_config(config, trust_remote_code=False)
    except Exception:  # noqa: BLE001  transformers raises anything of a config; the loader says what is wrong with it
        return None
