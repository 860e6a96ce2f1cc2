"""What a counterpart is on disk and in an engine: the tensors in which it differs from the base.

Of each either what it becomes, or what is added to it: a tensor, or a product of low rank.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import ContractError

_LEFT, _RIGHT, _ADDED = ".low_rank_left", ".low_rank_right", ".added_step"


@dataclass(frozen=True)
class LowRank:
    """A change `left @ right` of a matrix [O, I].

    Args:
        left: [O, R].
        right: [R, I].
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix: (O, I)."""
        return len(self.left), self.right.shape[1]

    def to(self, like: Tensor) -> LowRank:
        """On another tensor's device; the factors keep their precision."""
        return LowRank(self.left.to(like.device), self.right.to(like.device))

    def added_to(self, base: Tensor, out: Tensor) -> None:
        """The changed matrix into `out`, rounded once."""
        dtype = torch.promote_types(base.dtype, self.left.dtype)
        out.copy_(base.to(dtype).addmm(self.left.to(dtype), self.right.to(dtype)))


@dataclass(frozen=True)
class Added:
    """A change of a tensor in a precision of its own, which the changed tensor may not have: bfloat16 has 8 bits.

    Args:
        step: What is added.
    """

    step: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.step.shape

    def to(self, like: Tensor) -> Added:
        """On another tensor's device, in its precision: few bits of a step are as many as its own size asks for."""
        return Added(self.step.to(like))

    def added_to(self, base: Tensor, out: Tensor) -> None:
        """The changed tensor into `out`, rounded once."""
        out.copy_(base.to(torch.promote_types(base.dtype, self.step.dtype)) + self.step)


Change = Tensor | LowRank | Added
"""Of a tensor: what it becomes, or what is added to it."""


def between(
    base: nn.Module, counterpart: nn.Module, steps: Mapping[str, LowRank | Added]
) -> dict[str, tuple[Change, float]]:
    """Name -> (change on the CPU, its L2 norm) of every parameter and buffer that differs; of tied ones the first name.

    Args:
        base: The base model.
        counterpart: A model of the same names.
        steps: What is known to be added to the base, by name; the counterpart holds the result, as far as its precision goes.

    Raises:
        ContractError: Tensors that the base ties differ in the counterpart: the base's one slot cannot hold both.
    """
    before = base.state_dict()
    changed: dict[str, tuple[Change, float]] = {}
    first: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in counterpart.state_dict().items():
        tied_to, same = first.setdefault((before[name].data_ptr(), tensor.shape), (name, tensor))
        if tied_to != name:
            if same.data_ptr() != tensor.data_ptr() and not torch.equal(same, tensor):
                raise ContractError(
                    f"{tied_to} and {name} are one tensor in the base and two in the counterpart",
                    "save the base with weights of their own for both (tie_word_embeddings: false)",
                )
            continue
        step = steps.get(name)
        if isinstance(step, Added):  # which the counterpart's precision may not show
            if step.step.any():
                changed[name] = (Added(_on_cpu(step.step)), float(step.step.double().norm()))
        elif not torch.equal(before[name], tensor):
            wide = torch.promote_types(tensor.dtype, torch.float64)  # complex numbers stay so
            norm = float((tensor.to(wide) - before[name].to(wide)).norm())
            changed[name] = (_on_cpu(tensor) if step is None else step.to(torch.empty(0)), norm)
    return changed


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def to_bytes(changes: Mapping[str, Change]) -> bytes:
    """As a safetensors file."""
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        if isinstance(change, LowRank):
            tensors |= {name + _LEFT: change.left.contiguous(), name + _RIGHT: change.right.contiguous()}
        elif isinstance(change, Added):
            tensors[name + _ADDED] = change.step
        else:
            tensors[name] = change
    return safetensors.torch.save(tensors)


def from_bytes(data: bytes, folder: Path | None = None) -> dict[str, Change]:
    """What `to_bytes` wrote.

    Args:
        data: All of it.
        folder: Where it waits in a file that goes away with this process; it takes memory while it is used. Null: in memory.

    Raises:
        OSError: There is no room in the folder.
    """
    if folder is None:
        return _changes(safetensors.torch.load(data))
    with NamedTemporaryFile(dir=folder, prefix=".waiting-") as file:
        file.write(data)
        file.flush()
        return _changes(
            safetensors.torch.load_file(file.name)
        )  # mapped: the file has no name from here on, but is there


def _changes(tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for name, tensor in tensors.items():
        if name.endswith(_LEFT):
            whole = name.removesuffix(_LEFT)
            changes[whole] = LowRank(tensor, tensors[whole + _RIGHT])
        elif name.endswith(_ADDED):
            changes[name.removesuffix(_ADDED)] = Added(tensor)
        elif not name.endswith(_RIGHT):
            changes[name] = tensor
    return changes
