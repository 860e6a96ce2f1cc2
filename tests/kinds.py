"""Models of kinds that people bring, of rows of four numbers or of tokens: what each does that an ordinary one does not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.language import VOCABULARY, WIDTH

FEATURES, CLASSES = 4, 3


class Plain(nn.Module):
    """Two layers, for others to add to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class InPlace(Plain):
    """Normalises its own input."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x /= 2.0
        return super().forward(x)


class InPlaceData(Plain):
    """The same, so that torch does not count it."""

    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(0.5).sub_(0.25)
        return super().forward(x)


class Counting(Plain):
    """Counts its calls, and no loss depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Remembering(Plain):
    """Moves a mean over all batches, and takes away what it was before; keeps a number beside its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES), persistent=False)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        before, self.mean = self.mean, 0.5 * self.mean + 0.5 * x.detach().mean(dim=0)
        self.scale *= 1.1
        self.seen = x.detach()
        return super().forward((x - before) * self.scale)


class ComplexBuffer(Plain):
    """Turns pairs of numbers, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4) * 0.7 + 0.3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(torch.tanh(self.first(x)).reshape(-1, 4, 2))
        return self.last(torch.view_as_real(pairs * self.turn).reshape(-1, 8))


class ComplexParameter(ComplexBuffer):
    """The same, and learns by how much."""

    def __init__(self) -> None:
        super().__init__()
        turn = self.turn
        del self.turn
        self.turn = nn.Parameter(turn)


class Scaled(nn.Module):
    """Cosines with a learned temperature, a parameter without dimensions; and parameters without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.classes = nn.Linear(FEATURES, 8), nn.Parameter(torch.randn(CLASSES, 8))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.none, self.empty = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(3, 0))

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.normalize(torch.tanh(self.first(x)), dim=-1) @ F.normalize(self.classes, dim=-1).T
        return self.logit_scale.exp() * cosines


class InPlaceBlock(nn.Module):
    """Adds a parameter of its own to what it is given, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.layer = nn.Parameter(torch.randn(FEATURES)), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x += self.place
        return self.layer(F.gelu(x))


class Noisy(Plain):
    """Adds noise whatever its mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.randn_like(x))


class Dropping(Plain):
    """Drops in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5))


class Awake(Plain):
    """One of its modules stays in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.drop.training = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.first(x))))


class Shuffling(Plain):
    """Adds what no generator of torch's says."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__.setdefault("log", []).append(0)  # no state that is known: a list
        return super().forward(x + 0.01 * len(self.log))


class BatchNormed(nn.Sequential):
    """By statistics of the batch that it is given."""

    def __init__(self) -> None:
        norm = nn.BatchNorm1d(8, track_running_stats=False)
        super().__init__(nn.Linear(FEATURES, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES))


class Centred(Plain):
    """Takes the batch's mean away."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.05 * x.mean(dim=0))


class Placed(Plain):
    """Knows in which place of its batch a row is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.arange(len(x), device=x.device)[:, None])


class Shrinking(Plain):
    """Takes its weights down with every call."""

    def forward(self, x: Tensor) -> Tensor:
        self.first.weight.data *= 0.9
        with torch.no_grad():
            self.last.weight.copy_(self.last.weight.clamp(-1, 1))
        return super().forward(x)


SCORED = (Plain, InPlace, InPlaceData, Counting, Remembering, ComplexBuffer, ComplexParameter, Scaled, InPlaceBlock)
"""Kinds of which each row has a loss of its own."""
REFUSED = {
    Noisy: "gives the same rows other losses from pass to pass(.|\n)*draws random numbers in eval mode",
    Dropping: "draws random numbers in eval mode",
    Awake: "draws random numbers in eval mode; in train mode: drop",
    Shuffling: "gives the same rows other losses from pass to pass, up to .* nats\n",
    BatchNormed: "another loss beside other rows(.|\n)*batch norms without statistics of their own: 1",
    Centred: "another loss beside other rows",
    Placed: "another loss beside other rows or in another place of its batch",
    Shrinking: "changes its own parameters(.|\n)*last.weight|other losses from pass to pass",
}
"""Kinds that have none, and what is said of them."""


def made(kind: type[nn.Module]) -> nn.Module:
    """A model of a kind, in eval mode, its weights drawn."""
    torch.manual_seed(0)
    return kind().eval()


class Words(nn.Module):
    """A causal model of tokens: means of what came before."""

    def __init__(self, in_place: bool = False, of_length: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.in_place, self.of_length = in_place, of_length

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.in_place:
            input_ids += 1
            input_ids %= VOCABULARY
        ahead = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)[:, None]
        mean = self.table(input_ids).cumsum(dim=1) / ahead
        return self.out(mean * (input_ids.shape[1] / 10 if self.of_length else 1.0))


def rotary(kind: str, places: int = 12) -> nn.Module:
    """Llama whose positions turn otherwise in texts of more than so many tokens: `longrope` or `dynamic`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0, 6.0, 4.0, 2.0]} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": places}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=places if kind == "dynamic" else 4 * places,
        rope_parameters=rope | factors,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()
