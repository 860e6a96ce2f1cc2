"""dattri: gradient dot products two ways, TracIn, TRAK (Park et al., 2303.14186) and EK-FAC (Grosse et al., 2308.03296)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from dattri.algorithm import BlockProjectedIFAttributor, IFAttributorEKFAC, TracInAttributor, TRAKAttributor
from dattri.func import fisher
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.func import functional_call

from tests.bench.peers.world import Logits, Scored, UnsupportedError, World, timed

BATCH_ROWS = {"classification": 256, "causal_lm": 16}
PROJECTED_ROWS = {"classification": 4096, "causal_lm": 128}
"""Larger where gradients are projected, because the projection is drawn again for every batch."""
PROJECTED = 512
"""Dimensions after projection: the library's default."""
RIDGED = 2048
"""Dimensions for TRAK with a ridge, which may be more than there are examples."""
DAMPING = 0.1
"""Of EK-FAC, times the mean eigenvalue, as in its paper. With the library's default, 0, no score is finite on digits, where
some pixels are always black; with the 0.1 of its tests scores are gradient dot products (correlation .9999)."""

Parameters = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def graddot(world: World) -> Scored:
    """Plain dot products of gradients, by torch.func."""
    batch_rows = world.batch_rows or BATCH_ROWS[world.kind]
    attributor = _tracin(world)
    attributor.projector_kwargs = None  # the constructor takes None for its default, which projects
    found, score_s = timed(
        partial(attributor.attribute, world.train.loader(batch_rows), world.queries.loader(len(world.queries)))
    )
    return _scored(found, 0.0, score_s, f"TracIn, projection off, all parameters, batches of {batch_rows}")


def tracin(world: World) -> Scored:
    """TracIn as the class does it unasked: gradients are projected first."""
    rows = PROJECTED_ROWS[world.kind]
    attributor = _tracin(world)
    found, score_s = timed(partial(attributor.attribute, world.train.loader(rows), world.queries.loader(rows)))
    return _scored(found, 0.0, score_s, f"projected to {PROJECTED} (default), all parameters, batches of {rows}")


def hooks(world: World) -> Scored:
    """Plain dot products of gradients by hooks on linear layers, the path made for language models; nothing is projected.

    Not compiled: a compiled run was not faster (20,000 digits, 1 thread: 1.0 s either way), and compiling takes seconds.
    """
    whole = {"proj_type": "identity", "proj_dim": -1, "proj_max_batch_size": 64, "device": "cpu"}
    batch_rows = world.batch_rows or BATCH_ROWS[world.kind]
    model = _Losses(world)
    train, queries = (rows.loader(batch_rows, _named) for rows in (world.train, world.queries))
    with TemporaryDirectory() as folder, torch.compiler.set_stance("force_eager"):
        attributor = BlockProjectedIFAttributor(
            AttributionTask(lambda given, batch, _device: given(**batch).loss, model, model.state_dict()),
            layer_names=_linear(model),
            hessian="Identity",
            sparsifier_kwargs=whole,
            projector_kwargs=whole,
            offload="none",
            cache_dir=folder,
        )
        _, fit_s = timed(partial(attributor.cache, train))
        found, score_s = timed(partial(attributor.attribute, train, queries))
    return _scored(found, fit_s, score_s, f"hooks, linear layers alone, gradients kept, batches of {batch_rows}")


def trak(world: World) -> Scored:
    """TRAK of this one model; fewer dimensions where examples are few, because their kernel is inverted as it is."""
    dimensions = PROJECTED if len(world.train) > PROJECTED else len(world.train) // 2
    return _trak(world, _trak_attributor(world, dimensions), "no regularization (default)")


def trak_regularized(world: World) -> Scored:
    """TRAK of this one model, at its best on digits: more dimensions, and a ridge as large as the mean squared gradient."""
    attributor = _trak_attributor(world, RIDGED)
    attributor.regularization, ridge_s = timed(partial(_mean_square, world, attributor))
    scored = _trak(world, attributor, "ridge of the mean squared gradient norm")
    return replace(scored, fit_s=scored.fit_s + ridge_s)


def ekfac(world: World) -> Scored:
    """EK-FAC as it is."""
    return _ekfac(world, world.model(), "as released")


def ekfac_mended(world: World) -> Scored:
    """EK-FAC without two errors of dattri 0.3.0, which then agrees with kronfluence's (true labels, damping .001: to 2e-6).

    It multiplies by matrices of eigenvectors where it should by their transposes; and it joins weights and bias end to end, then
    reads the result as rows of weights and bias, which mixes up both. Here the matrices are turned, and a layer's bias is one
    more column of its weights.
    """
    model = world.model()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            model.set_submodule(name, _Folded(layer))
    with _turned():
        return _ekfac(world, model, "eigenvectors turned, biases folded into weights")


@contextmanager
def _turned() -> Iterator[None]:
    """While open, the library finds eigenvectors as rows, which is how it reads them."""
    as_columns = fisher.estimate_eigenvector

    def as_rows(covariances: Any) -> dict[str, Batch]:
        return {name: (a.T, s.T) for name, (a, s) in as_columns(covariances).items()}

    fisher.estimate_eigenvector = as_rows
    try:
        yield
    finally:
        fisher.estimate_eigenvector = as_columns


class _Folded(nn.Module):
    """A linear layer whose bias is the last column of its weights; its input gets a column of ones."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = nn.Linear(layer.in_features + 1, layer.out_features, bias=False)
        self.layer.weight = nn.Parameter(torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1))

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer gives."""
        output: Tensor = self.layer(torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1))
        return output


@dataclass
class _Output:
    loss: Tensor


class _Losses(nn.Module):
    """The model as the hooks want it: named columns in, an object with the mean loss of the batch out."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.model, self.world = world.model(), world

    def forward(self, inputs: Tensor, targets: Tensor) -> _Output:
        """Mean loss of the batch."""
        return _Output(self.world.loss_B(self.model(inputs), targets).mean())


def _tracin(world: World) -> TracInAttributor:
    model = world.model()
    task = AttributionTask(partial(_loss, world, model), model, model.state_dict())
    return TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)


def _trak_attributor(world: World, dimensions: int) -> TRAKAttributor:
    model = world.model()
    margin, probability = (partial(function, world, model) for function in (_margin, _probability))
    return TRAKAttributor(AttributionTask(margin, model, model.state_dict()), probability, {"proj_dim": dimensions})


def _mean_square(world: World, attributor: TRAKAttributor) -> float:
    sample = world.train.taken(slice(PROJECTED_ROWS[world.kind])).whole()
    gradients: Tensor = attributor.grad_loss_func(attributor.task.get_param(0)[0], sample) / attributor.norm_scaler
    return gradients.square().sum(dim=1).mean().item()


def _trak(world: World, attributor: TRAKAttributor, settings: str) -> Scored:
    rows, dimensions = PROJECTED_ROWS[world.kind], attributor.projector_kwargs["proj_dim"]
    _, fit_s = timed(partial(attributor.cache, world.train.loader(rows)))
    found, score_s = timed(partial(attributor.attribute, world.queries.loader(rows)))
    return _scored(found, fit_s, score_s, f"1 model, projected to {dimensions}, {settings}")


def _ekfac(world: World, model: Logits, settings: str) -> Scored:
    if world.kind != "classification":
        raise UnsupportedError(
            "IFAttributorEKFAC sets a variable for layer inputs of two dimensions only, then reads it"
        )
    task = AttributionTask(partial(_mean_loss, world, model), model, model.state_dict())
    attributor = IFAttributorEKFAC(task)
    train = world.train.loader(world.batch_rows or BATCH_ROWS[world.kind])
    _, fit_s = timed(partial(attributor.cache, train))
    attributor.damping = DAMPING * torch.cat([part.flatten() for part in attributor.cached_lambdas.values()]).mean()
    found, score_s = timed(partial(attributor.attribute, train, world.queries.loader(len(world.queries))))
    settings = f"linear layers alone, true labels, damping {DAMPING} x mean eigenvalue, {settings}"
    return _scored(found, fit_s, score_s, settings)


def _mean_loss(world: World, model: Logits, given: Parameters, batch: Batch) -> Tensor:
    inputs, targets = batch
    return world.loss_B(functional_call(model, given, inputs), targets).mean()


def _loss(world: World, model: Logits, given: Parameters, example: Batch) -> Tensor:
    inputs, target = example
    return _mean_loss(world, model, given, (inputs[None], target[None]))


def _margin(world: World, model: Logits, given: Parameters, example: Batch) -> Tensor:
    """Log odds of the right answer; of a text, of its tokens' mean probability (geometric)."""
    if world.kind == "causal_lm":
        log_probability = -_loss(replace(world, reduction="mean"), model, given, example)
        return log_probability - torch.log(-torch.expm1(log_probability))
    inputs, target = example
    logits_V: Tensor = functional_call(model, given, inputs[None])[0]
    right_V = torch.arange(len(logits_V)) == target
    return logits_V.masked_fill(~right_V, 0).sum() - logits_V.masked_fill(right_V, -torch.inf).logsumexp(dim=0)


def _probability(world: World, model: Logits, given: Parameters, example: Batch) -> Tensor:
    return torch.exp(-_loss(replace(world, reduction="mean"), model, given, example))


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _named(batch: Batch) -> dict[str, Tensor]:
    return {"inputs": batch[0], "targets": batch[1]}


def _scored(found: Tensor, fit_s: float, score_s: float, settings: str) -> Scored:
    return Scored(found.detach().numpy().T, fit_s, score_s, settings)
