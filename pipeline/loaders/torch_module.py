"""A torch module from a factory function, with weights from a safetensors file or a tensors-only .pt file."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import ContractError, InputError, first_line
from ..importing import construct, resolve
from ..model_folder import read_file
from ..numerics import cast
from .base import load_weights, require_finite

UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    struct.error, OverflowError, MemoryError, OSError,
)  # fmt: skip
"""What torch.load raises on damaged bytes, found by changing them at random."""


class TorchModule:
    """See Loader.

    Args:
        factory: `package.module:function` returning the module.
        arguments: Its keyword arguments.
        weights_uri: State dict; null keeps what the factory returns.
        dtype: torch dtype name.
    """

    def __init__(self, factory: str, arguments: Mapping[str, Any], weights_uri: str | None, dtype: str) -> None:
        self._factory, self._arguments = factory, dict(arguments)
        resolve(factory, "model.factory")  # a typo is an error before any work
        self._weights_uri, self._dtype = weights_uri, dtype

    def load(self, device: str, seed: int) -> nn.Module:
        """See Loader. The factory runs under `seed`; no pickled code of the weights file is ever run."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = construct(self._factory, {}, self._arguments, "model.factory")
        if not isinstance(model, nn.Module):
            raise ContractError(
                f"model.factory {self._factory} returned {type(model).__name__}, expected a torch.nn.Module"
            )
        if self._weights_uri is not None:
            load_weights(model, read_weights(self._weights_uri), self._weights_uri)
        model = cast(model, getattr(torch, self._dtype)).to(device).eval()
        require_finite(model, self._weights_uri or f"of {self._factory}")
        return model


def read_weights(uri: str) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a file of `torch.save` that holds tensors only.

    Raises:
        InputError: The file is missing or damaged, holds pickled code, or is no state dict, or an index of others.
    """
    if uri.endswith(".index.json"):
        raise InputError(
            f"weights {uri} are an index of several files",
            "save them as one file; of a model in Hugging Face format give its folder to loader: hf_transformers",
        )
    data = read_file(uri)
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"weights {uri} cannot be read as safetensors: {error}") from error
    except UNREADABLE as error:
        raise InputError(
            f"weights {uri} cannot be read as tensors only: {first_line(error)}",
            "save model.state_dict() with safetensors.torch.save_file",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise InputError(f"weights {uri} are no state dict: got {keys}", "save model.state_dict() alone")
    return state
