"""The smallest real world: rows of four numbers and a linear model, so that a shard costs milliseconds. It can grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import nn

from pipeline.artifacts import Run
from pipeline.audit import mend
from pipeline.ensemble import Ensemble, members_of
from pipeline.lessons import Lesson
from pipeline.mean import MeanScorer
from pipeline.members import gathered
from pipeline.retrain import Retrainings
from pipeline.retraining import Retrainer
from pipeline.run import finish
from pipeline.score import _tally
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from pipeline.tuner import Tuner
from pipeline.works import Work

CLASSES = 3
SHARD_ROWS = 4
FILES = {"part-0": (0, 8), "part-1": (8, 13)}
"""Corpus files and the ids of their rows."""
LATER = {"part-2": (13, 19)}
"""Files that arrive when the run is finished."""
BAD_ROWS = (6, 17)
"""Rows without features: they end in rejects/."""
QUERIES, LATER_QUERIES = {"red": 1, "green": 2}, {"blue": 2}
"""Query ids and their rows."""
SEEDS = (1, 2, 3)
"""Of models: the first is the world's; an ensemble has all."""
LINEAR = {1: "linear", 2: "linear-2", 3: "linear-3"}
"""Their weights' files."""
PRODUCTS = ("counterparts/", "scores/", "rejects/", "topk/ranked", "topk/sources")
"""What of a run is a function of spec and inputs alone, to the byte, but for times in the JSON of it."""


def linear(seed: int = 0) -> nn.Module:
    """The model: one layer."""
    torch.manual_seed(seed)
    return nn.Linear(4, CLASSES)


def linear_on_pictures() -> nn.Module:
    """The same on pictures of four by four pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))


def _rows(first: int, stop: int, bad: Sequence[int] = ()) -> pa.Table:
    rng = np.random.default_rng(first)
    features = [None if i in bad else rng.normal(size=4).tolist() for i in range(first, stop)]
    return pa.table(
        {
            "id": [f"row-{i:02d}" for i in range(first, stop)],
            "features": pa.array(features, pa.list_(pa.float32())),
            "label": [i % CLASSES for i in range(first, stop)],
            "site": [f"site-{i % 2}" for i in range(first, stop)],
        }
    )


class Small:
    """Corpus files, query files and weights in a folder; and what a run over them does, without Ray.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for kind, files in (("corpus", FILES), ("later", LATER)):
            (folder / kind).mkdir()
            for name, (first, stop) in files.items():
                pq.write_table(_rows(first, stop, BAD_ROWS), folder / kind / f"{name}.parquet")
        for kind, queries in (("queries", QUERIES), ("later-queries", LATER_QUERIES)):
            names = [name for name, rows in queries.items() for _ in range(rows)]
            table = _rows(100 + len(kind), 100 + len(kind) + len(names))
            pq.write_table(table.add_column(0, "query_id", [names]), folder / f"{kind}.parquet")
        for seed in SEEDS:
            safetensors.torch.save_file(linear(seed).state_dict(), folder / f"{LINEAR[seed]}.safetensors")

    @property
    def later(self) -> tuple[str, str]:
        """What a run can be extended by: URIs of queries and of corpus files."""
        return str(self.folder / "later-queries.parquet"), str(self.folder / "later")

    def tree(self, run_uri: Path | str) -> dict[str, Any]:
        """A spec over this world as a YAML tree."""
        return {
            "run": {"uri": str(run_uri)},
            "model": {"factory": "tests.small:linear", "weights_uri": str(self.folder / "linear.safetensors")},
            "task": {"features": "features", "label": "label", "shape": [4]},
            "corpus": {"uri": str(self.folder / "corpus"), "example_id": "id", "source": "site"},
            "queries": {"uri": str(self.folder / "queries.parquet")},
            "producer": {"name": "unlearn", "steps": 2},
            "score": {"shard_rows": SHARD_ROWS, "batch_rows": SHARD_ROWS, "max_reject_fraction": 0.12},
            "rank": {"k": 3},
        }

    def ensemble(self, *weights: float) -> str:
        """Override: the further models with these weights, else 1."""
        uris = [str(self.folder / f"{LINEAR[seed]}.safetensors") for seed in SEEDS[1:]]
        members = [{"weights_uri": uri, "weight": weight} for uri, weight in zip(uris, weights or (1, 1), strict=True)]
        return f"ensemble={members}"

    def spec(self, run_uri: Path | str, *overrides: str) -> Any:
        """It as a spec, with overrides."""
        return parse_spec(self.tree(run_uri), overrides)


@contextmanager
def one_thread() -> Iterator[None]:
    """Of torch: more of them wait for each other for longer than a shard here takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def work_off(run: Run, order: Callable[[list[Work]], list[Work]] = list) -> Run:
    """What `carry_on` does, with the work of Ray's actors done here."""
    run = gathered(run)
    family = (*members_of(run), run)
    for each in family:
        mend(each)
    for each in family:
        _work_off(each, order)
        finish(each)
    return run


def _work_off(run: Run, order: Callable[[list[Work]], list[Work]]) -> None:
    missing = [query_id for query_id in run.query_ids if query_id not in run.committed_queries()]
    if missing:
        tuner = Tuner(run, "cpu")
        for query_id in missing:
            tuner.tune(query_id)
    done = _tally(run).done
    pending = [work for work in run.works() if (work.addition, work.shard.shard_id) not in done]
    if pending:
        scorer = MeanScorer(run) if isinstance(run, Ensemble) else ShardScorer(run, "cpu")
        for work in order(pending):
            scorer.score(work)


def learn_here(retrainings: Retrainings, lessons: Sequence[Lesson]) -> list[Lesson]:
    """What `retrain` does, with the work of Ray's actors done here; what was missing."""
    missing = retrainings.missing(lessons)
    with one_thread():
        retrainer = Retrainer(retrainings.run, retrainings.judge.training, "cpu")
        for lesson in missing:
            retrainings.do(retrainer, lesson)
    return missing


def products(objects: dict[str, bytes]) -> dict[str, bytes]:
    """Of a run's objects those whose bytes are a function of spec and inputs."""
    return {
        path: data
        for path, data in objects.items()
        if path.startswith(PRODUCTS) and not path.endswith((".json", ".tmp"))
    }
