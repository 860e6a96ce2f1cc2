"""LoRA adapters (Hu et al., 2021) on a model's linear layers, by peft: added before steps, folded into the weights after them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ..changes import LowRank
from ..errors import MAX_NAMES_SHOWN, ContractError
from ..importing import extra

NAME = "default"


def add(
    model: nn.Module, chosen: Sequence[nn.Parameter], targets: str, rank: int, alpha: float, seed: int
) -> list[nn.Parameter]:
    """Put adapters that change nothing yet on layers, in place; the adapters' parameters.

    Args:
        model: Its own parameters are not to be tuned.
        chosen: Parameters of it; only a layer whose weight is among them gets an adapter.
        targets: Regular expression searched in names of linear layers; empty for all but the one that makes the logits.
        rank: Of the adapters.
        alpha: Their product counts `alpha / rank` times.
        seed: Their first values derive from it.

    Raises:
        ContractError: No layer matches.
        SpecError: peft is not installed.
    """
    with extra("hf", "producer.lora_rank"):
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D
    last = getattr(model, "get_output_embeddings", lambda: None)()
    weights = set(map(id, chosen))
    layers = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not last and id(layer.weight) in weights
    ]
    adapted = [name for name in layers if re.search(targets, name)]
    if not adapted:
        raise ContractError(
            f"producer.lora_targets: {targets!r} matches none of {len(layers)} linear layers: "
            + ", ".join(layers[:MAX_NAMES_SHOWN])
        )
    whole_names = "|".join(re.escape(name) for name in adapted)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=whole_names)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it notices what is a Conv1D
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=NAME)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fold(model: nn.Module) -> dict[str, LowRank]:
    """Take the adapters out again, in place, and add their products to the weights; parameter name -> product."""
    from peft.tuners.lora import LoraLayer

    factors = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            left = layer.lora_B[NAME].weight.detach().to(dtype) * layer.scaling[NAME]
            right = layer.lora_A[NAME].weight.detach().to(dtype)
            product = LowRank(right.T, left.T) if layer.fan_in_fan_out else LowRank(left, right)
            with torch.no_grad():
                product.added_to(weight.data.clone(), weight.data)
            model.set_submodule(name, layer.get_base_layer())
            factors[f"{name}.weight"] = product
    return factors
