"""One counterpart tuned by all workers together, each holding a share of its weights, gradients and optimizer state (FSDP2).

For models of which one worker cannot hold a copy with gradients. Every worker takes the same steps on the same query, so the
counterpart is the one that a single worker would make.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

_shared: list[str] = []


@contextmanager
def over_workers(device: str) -> Iterator[None]:
    """Tune what is tuned in the block together with the other workers, each on its own device of this kind."""
    _shared.append(device)
    try:
        yield
    finally:
        _shared.pop()


def is_shared() -> bool:
    """Whether a counterpart is being tuned by all workers together."""
    return bool(_shared)


def share(model: nn.Module) -> None:
    """Leave each worker its share of a model, in place: layer by layer, so that one whole layer at a time is held."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(_shared[-1], (dist.get_world_size(),))
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    for layer in (*layers, model):
        fully_shard(layer, mesh=mesh)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A shared model's state dict, whole and on the CPU, at the first worker; nothing at the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def norm(tensor: Tensor) -> Tensor:
    """L2 norm in float64 of a tensor, of all its shares together."""
    length = tensor.to(torch.promote_types(tensor.dtype, torch.float64)).norm()
    return length.full_tensor() if hasattr(length, "full_tensor") else length


def of_first(value: float) -> float:
    """A measured number as the first worker has it, so that all decide alike by it, whatever rounding did to theirs."""
    if not is_shared():
        return value
    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


def is_first() -> bool:
    """Whether this is the worker that writes what all of them made."""
    return not is_shared() or dist.get_rank() == 0
