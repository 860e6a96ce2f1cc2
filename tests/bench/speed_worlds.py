"""Models and corpora on which stage score is timed, and bare loops over the same rows: digits, pictures of 32 x 32, texts.

A bare loop is nothing but forward passes and losses, batch after batch, of examples that are tensors in memory already; models
of pictures have their kernels in the order that is fastest here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from jobs import digits
from pipeline.artifacts import Run
from pipeline.extensions import load_model
from pipeline.freeze import freeze
from pipeline.score import SHARDS_AHEAD, score
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from pipeline.storage import remove_folder
from pipeline.tuner import Tuner
from tests.bench.speed_peers import smollm2

SEED, SHARDS, SHARD_ROWS, SIZES_SHARD_ROWS, QUERIES = 0, 8, 32_768, 12_500, 8
"""Rounding noise is not measured: of so few rows it would be a large part, of a million it is a thousandth."""
IMAGE_SHAPE, IMAGE_CLASSES, WIDTHS, BLOCKS_EACH = (3, 32, 32), 10, (16, 32, 64), 2


class Block(nn.Module):
    """Two convolutions and a way past them (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.past = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.past(x))


def resnet() -> nn.Module:
    """Six blocks on pictures of 32 x 32: the CIFAR kind of ResNet, of 14 layers."""
    widths = [WIDTHS[0], *(width for width in WIDTHS for _ in range(BLOCKS_EACH))]
    blocks = [Block(before, after) for before, after in pairwise(widths)]
    first = [nn.Conv2d(IMAGE_SHAPE[0], widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], IMAGE_CLASSES)]
    return nn.Sequential(*first, *blocks, *last)


@dataclass(frozen=True)
class World:
    """A model and rows.

    Args:
        name: For people.
        folder: Where files go.
        rows: Of the corpus.
        batch_rows: Of a forward pass.
        quarter: How many blocks are the last quarter.
        queries: How many are asked about, in one run and another.
        actors: Of stage score, of one thread each, on Ray; 0 for one worker in this process, of as many threads as torch has.
        shard_rows: At most.
    """

    name: str
    folder: Path
    rows: int
    batch_rows: int
    quarter: int
    queries: tuple[int, ...] = (1, QUERIES)
    actors: int = 0
    shard_rows: int = SHARD_ROWS

    def tree(self) -> dict[str, Any]:
        """Sections model, task, corpus, queries and score of a spec."""
        raise NotImplementedError

    @cached_property
    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets."""
        raise NotImplementedError

    def loss_B(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses of a batch."""
        return F.cross_entropy(model(inputs), targets, reduction="none")

    def run(self, queries: int, last_blocks: int, compile: bool = False) -> Run:
        """A frozen run with its counterparts made, of the first so many queries."""
        name = f"run-{queries}-{last_blocks}-{compile}"
        tree = self.tree()
        tree["score"]["compile"] = compile
        table = pq.read_table(tree["queries"]["uri"]).slice(0, queries)
        tree["queries"]["uri"] = str(self.folder / f"queries-{queries}.parquet")
        pq.write_table(table, tree["queries"]["uri"])
        sections = {
            "run": {"uri": str(self.folder / name)},
            "producer": {"name": "unlearn", "steps": 1, "last_blocks": last_blocks},
            "resources": {"score": {"actors": self.actors or 1}},
        }
        run = freeze(parse_spec({**sections, **tree}))
        if failures := Tuner(run, "cpu").tune_all(run.query_ids):
            raise failures[0]
        return run

    def two_passes(self) -> float:
        """Seconds of the bare loop: base and one other model over all rows."""
        return self._looped(self.loop_threads)

    @cached_property
    def loop_threads(self) -> int:
        """Of the bare loop: one, or as many as torch has, whichever is faster."""
        self._looped(1)
        return min({1, torch.get_num_threads()}, key=self._looped)

    def _looped(self, threads: int) -> float:
        models, before = self._models, torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                started_s = time.perf_counter()
                for inputs, targets in self.batches:
                    for model in models:
                        self.loss_B(model, inputs, targets)
                return time.perf_counter() - started_s
        finally:
            torch.set_num_threads(before)

    @cached_property
    def _models(self) -> list[nn.Module]:
        model = parse_spec({"run": {"uri": str(self.folder / "none")}, **self.tree()}).model
        made = [load_model(model, "cpu", SEED) for _ in range(2)]
        return [each.to(memory_format=torch.channels_last) if self._sees_images(each) else each for each in made]

    @staticmethod
    def _sees_images(model: nn.Module) -> bool:
        return any(isinstance(module, nn.Conv2d) for module in model.modules())


class Images(World):
    """Pictures, as lists of numbers in Parquet."""

    factory: str
    shape: tuple[int, ...]

    def tree(self) -> dict[str, Any]:
        """See World."""
        return {
            "model": {"factory": self.factory, "weights_uri": str(self.folder / "model.safetensors")},
            "task": {"features": "pixels", "shape": list(self.shape)},
            "corpus": {"uri": str(self.folder / "corpus.parquet"), "example_id": "id"},
            "queries": {"uri": str(self.folder / "all-queries.parquet")},
            "score": {
                "batch_rows": self.batch_rows,
                "shard_rows": min(self.rows // SHARDS, self.shard_rows),
                "noise_rows": 0,
            },
        }

    @cached_property
    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See World."""
        pixels, labels = (torch.from_numpy(each) for each in self.examples)
        shaped = pixels.view(-1, *self.shape)
        return list(zip(shaped.split(self.batch_rows), labels.split(self.batch_rows), strict=True))

    @cached_property
    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [N, P] float32 and labels [N]."""
        raise NotImplementedError

    def write(self, model: nn.Module) -> None:
        """All files."""
        self.folder.mkdir(parents=True)
        safetensors.torch.save_file(model.state_dict(), self.folder / "model.safetensors")
        pixels, labels = self.examples
        flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels.ravel()), pixels.shape[1])
        corpus = pa.table({"id": [f"{i:09d}" for i in range(len(labels))], "pixels": flat, "label": labels})
        pq.write_table(corpus, self.folder / "corpus.parquet")
        queries = corpus.slice(0, 64).rename_columns(["query_id", "pixels", "label"])
        pq.write_table(queries, self.folder / "all-queries.parquet")


class Digits(Images):
    """The digits CNN; digits over and over."""

    factory, shape = "jobs.digits:cnn", (1, 8, 8)

    @cached_property
    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """See Images."""
        pixels, labels = digits.load_digits()
        take = np.arange(self.rows) % len(labels)
        return pixels[take], labels[take]


class Pictures(Images):
    """The ResNet; random pictures."""

    factory, shape = "tests.bench.speed_worlds:resnet", IMAGE_SHAPE

    @cached_property
    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """See Images."""
        chance = np.random.default_rng(SEED)
        pixels = chance.random((self.rows, int(np.prod(self.shape))), dtype=np.float32)
        return pixels, chance.integers(0, IMAGE_CLASSES, self.rows)


class Texts(World):
    """SmolLM2-135M in bfloat16, texts of 256 tokens."""

    def tree(self) -> dict[str, Any]:
        """See World."""
        there = smollm2()
        return {
            "model": {"loader": "hf_transformers", "weights_uri": "build/smollm2", "dtype": "bfloat16"},
            "task": {"name": "causal_lm", "tokens": "tokens", "config_uri": "build/smollm2"},
            "corpus": {"uri": str(self.folder / "corpus.parquet"), "example_id": "id"},
            "queries": {"uri": str(there / "queries.parquet"), "query_id": "query_id"},
            "score": {
                "batch_tokens": self.batch_rows * self._ids.shape[1],
                "shard_rows": self.batch_rows,
                "noise_rows": 0,
            },
        }

    @cached_property
    def _ids(self) -> np.ndarray:
        table = pq.read_table(smollm2() / "corpus.parquet").slice(0, self.rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, self.folder / "corpus.parquet")
        return np.array(table["tokens"].to_pylist())

    @cached_property
    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See World."""
        ids = torch.from_numpy(self._ids)
        return [(each, each[:, 1:]) for each in ids.split(self.batch_rows)]

    def loss_B(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See World."""
        logits_BTV: torch.Tensor = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets.flatten(), reduction="none")


WORLDS: dict[str, Callable[[Path], World]] = {
    "digits": lambda folder: many_digits(folder / "digits", 1_048_576, (1,)),
    "digits-many": lambda folder: many_digits(folder / "digits-many", 131_072, (QUERIES,)),
    "digits-100k": lambda folder: many_digits(folder / "digits-100k", 100_000, (1,), SIZES_SHARD_ROWS),
    "digits-5m": lambda folder: many_digits(folder / "digits-5m", 5_000_000, (1,), SIZES_SHARD_ROWS),
    "resnet": lambda folder: written(Pictures("ResNet on 32 x 32", folder / "resnet", 4_096, 128, 2), resnet()),
    "smollm2": lambda folder: Texts("SmolLM2-135M bfloat16, 256 tokens", folder / "smollm2", 8, 4, 8),
}


def many_digits(folder: Path, rows: int, queries: tuple[int, ...], shard_rows: int = SHARD_ROWS) -> Images:
    actors = os.cpu_count() or 1
    return written(Digits("digits CNN", folder, rows, 256, 1, queries, actors, shard_rows), digits.cnn())


def written(world: Images, model: nn.Module) -> Images:
    world.write(model.eval())
    return world


def forget_scores(run: Run) -> None:
    """Make the next scoring do all shards again."""
    for folder in ("commits", "scores", "partials"):
        remove_folder(run.uri(folder))


def on_ray(run: Run) -> float:
    """Seconds of stage score on a running Ray, from the first shard's start (in a fresh actor) to the last commit."""
    forget_scores(run)
    score(run)
    receipts = list(run.receipts())
    return max(receipt.finished_at_s for receipt in receipts) - min(receipt.started_at_s for receipt in receipts)


class Stage:
    """What a worker of stage score does: Parquet in, Parquet out, as many shards at a time as it has.

    Args:
        run: With its counterparts made.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._scorer = run, ShardScorer(run, "cpu")

    def __call__(self) -> float:
        """Seconds for all shards."""
        forget_scores(self._run)
        started_s = time.perf_counter()
        with ThreadPoolExecutor(SHARDS_AHEAD) as pool:
            list(pool.map(self._scorer.score, self._run.works()))
        return time.perf_counter() - started_s
