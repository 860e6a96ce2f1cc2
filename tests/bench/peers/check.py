"""Do peers compute what they are timed for? Scores of one query beside plain dot products of gradients, by autograd alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from tests.bench.peers.world import Scored, World

ROWS = 8
LAYERS = (nn.Linear, nn.Conv2d)
Chosen = Callable[[nn.Module], list[Tensor]]


def agreement(world: World, name: str, peer: Callable[[World], Scored]) -> dict[str, float]:
    """Relative error (Euclidean norm, no scale is fitted) and rank correlation of a peer's scores with the plain ones."""
    few = world.first(ROWS)
    found_N = peer(few).score_QN[0]
    plain_N = _Plain.found(few, COVERED[name])
    error = np.linalg.norm(found_N - plain_N) / np.linalg.norm(plain_N)
    return {"relative_error": float(error), "spearman": float(spearmanr(found_N, plain_N).statistic)}


class _Plain:
    """Plain scores by the names of the parameters they are of, since for a large model they take as long as a turn."""

    known: dict[tuple[str, ...], np.ndarray] = {}

    @classmethod
    def found(cls, world: World, chosen: Chosen) -> np.ndarray:
        """Of the one world of this process."""
        model = world.model().float()
        parameters = chosen(model)
        names = tuple(name for name, each in model.named_parameters() if any(each is one for one in parameters))
        if names not in cls.known:
            cls.known[names] = plain(world, model, parameters)
        return cls.known[names]


def plain(world: World, model: Any, parameters: list[Tensor]) -> np.ndarray:
    """Dot products of the first query's gradient with each example's [N]."""

    def gradient(inputs: Tensor, target: Tensor) -> list[Tensor]:
        loss = world.loss_B(model(inputs[None]), target[None]).sum()
        return list(torch.autograd.grad(loss, parameters))

    query = gradient(*world.queries[0])
    rows = (gradient(*world.train[row]) for row in range(len(world.train)))
    return np.array([sum(float((a * b).sum()) for a, b in zip(query, row, strict=True)) for row in rows])


def _all(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


def _layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, LAYERS)]


def _parameters(layers: Sequence[nn.Module]) -> list[Tensor]:
    return [each for layer in layers for each in layer.parameters(recurse=False)]


def _weights_below(model: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in _layers(model)[:-1]]  # type: ignore[misc]


COVERED: dict[str, Chosen] = {
    "bergson-graddot": _weights_below,
    "bergson-projected": _weights_below,
    "kronfluence-identity": lambda model: _parameters(_layers(model)),
    "kronfluence-trunk": lambda model: _parameters(_layers(model)[:-1]),
    "kronfluence-lowrank": lambda model: _parameters(_layers(model)[:-1]),
    "dattri_llm-graddot": lambda model: _parameters(_layers(model)),
    "dattri_llm-trunk": lambda model: _parameters(_layers(model)[:-1]),
    "dattri-graddot": _all,
    "dattri-hooks": lambda model: _parameters([layer for layer in _layers(model) if isinstance(layer, nn.Linear)]),
    "captum-tracincp": _all,
    "captum-tracincp-fast": lambda model: [_layers(model)[-1].weight],  # type: ignore[list-item]
}
"""Peers that give plain dot products, and parameters whose gradients they compare."""
