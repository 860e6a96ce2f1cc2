"""A language model out of a folder in Hugging Face format, with safetensors weights, and perhaps a PEFT adapter in them."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import ContractError, InputError, SpecError, first_line
from ..importing import extra
from ..model_folder import load_error, local_copy
from .base import in_own_memory, require_finite, require_fit


class HfTransformers:
    """See Loader.

    Args:
        weights_uri: The folder.
        dtype: torch dtype name.
        adapter_uri: Folder of a PEFT adapter that is part of the base model; null for none.
        device_map: How accelerate spreads the model over the worker's GPUs; null for all of it on one.
        attention: Name of transformers' attention implementation; null for its own choice.
    """

    def __init__(
        self,
        weights_uri: str,
        dtype: str = "float32",
        adapter_uri: str | None = None,
        device_map: str | None = None,
        attention: str | None = None,
    ) -> None:
        self._uri, self._adapter_uri = weights_uri, adapter_uri
        self._dtype, self._device_map, self._attention = dtype, device_map, attention

    def load(self, device: str, seed: int) -> nn.Module:
        """See Loader. No code that lies beside the weights is ever run.

        Raises:
            SpecError: transformers has not the attention that is asked for, or is not installed.
            InputError: The folder cannot be read, or asks for code of its own.
            ContractError: It holds no language model, or weights that do not fit it.
            NumericsError: The weights are not finite.
        """
        with extra("hf", "model.loader hf_transformers"):
            from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
            from transformers.utils.logging import disable_progress_bar
        disable_progress_bar()  # its own, between the lines of ours
        place = local_copy(self._uri)
        try:
            config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise load_error(self._uri, f"{self._uri} cannot be loaded", error, _hint(place)) from error
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if type(config) not in kind._model_mapping:
            raise ContractError(
                f"{self._uri} is a {config.model_type} model, which transformers knows as no language model",
                "give a causal or sequence-to-sequence checkpoint, or load it with loader: torch_module",
            )
        _require_attention(kind._model_mapping[type(config)], self._attention)
        spread = self._device_map if device != "cpu" else None
        try:
            model, said = kind.from_pretrained(
                place,
                config=config,
                dtype=getattr(torch, self._dtype),
                attn_implementation=self._attention,
                use_safetensors=True,
                device_map=spread,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise InputError(f"{self._uri} cannot be loaded: {first_line(error)}") from error
        _require_whole(self._uri, type(model).__name__, said)
        model.config.use_cache = False  # keys and values are for texts that go on
        if self._adapter_uri is not None:
            model = merged(model, self._adapter_uri)
        require_finite(model, self._adapter_uri or self._uri)
        return in_own_memory(model if spread else model.to(device)).eval()


def _hint(place: str) -> str:
    adapter = os.path.exists(f"{place}/adapter_config.json") and not os.path.exists(f"{place}/config.json")
    return "it is a PEFT adapter: name it as model.adapter_uri, and its base model as model.weights_uri" * adapter


def _require_attention(kind: Any, attention: str | None) -> None:
    """See that transformers has the attention that the spec asks for. Raises SpecError."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    flag = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}.get(attention or "")
    if flag is not None and not any(getattr(each, flag, True) for each in kinds):
        raise SpecError(
            f"model.attention: transformers has no {attention} for {kinds[0].__name__}",
            "leave model.attention out: the attention is then what transformers has for this model",
        )


def merged(model: nn.Module, adapter_uri: str) -> nn.Module:
    """A model with a PEFT adapter in its weights.

    Raises:
        InputError: There is no adapter, or it cannot be read.
        ContractError: It does not fit the model.
    """
    with extra("hf", "adapter_uri"):
        from peft import PeftModel, get_peft_model_state_dict
    path = local_copy(adapter_uri)
    try:
        with safe_open(f"{path}/adapter_model.safetensors", "pt") as file:
            there = set(file.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers by an old name
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
            adapted = PeftModel.from_pretrained(model, path, local_files_only=True, trust_remote_code=False)
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"adapter {adapter_uri} cannot be loaded: {first_line(error)}") from error
    except (ValueError, RuntimeError) as error:
        raise ContractError(
            f"adapter {adapter_uri} does not fit {type(model).__name__}: {first_line(error)}"
        ) from error
    # peft leaves what it does not find as it was made: an adapter that changes nothing, or noise.
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    require_fit([f"missing {name}" for name in sorted(wanted) if name not in there], adapter_uri, type(model).__name__)
    return adapted.merge_and_unload()


def _require_whole(uri: str, model: str, said: dict[str, Any]) -> None:
    """See that all weights of the model came from the folder. Raises ContractError."""
    problems = [f"missing {name}" for name in sorted(said.get("missing_keys", ()))]
    shapes = ((name, list(there), list(own)) for name, there, own in sorted(said.get("mismatched_keys", ())))
    problems += [f"{name} is {there} in the file, {own} in the model" for name, there, own in shapes]
    problems += [f"unexpected {name}" for name in sorted(said.get("unexpected_keys", ()))]
    require_fit(problems, uri, model)
