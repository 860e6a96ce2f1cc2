"""What every setup of `make bench-faithful` shares: runs and peers over its files, and the judge on both."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import Run
from pipeline.ensemble import Ensemble, members_of
from pipeline.freeze import freeze
from pipeline.judge import Judge
from pipeline.mean import MeanScorer
from pipeline.members import gathered
from pipeline.run import finish
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec, parse_tree
from pipeline.tuner import Tuner
from pipeline.verdict import judged

FOLDER = Path("build/faithful")
PEERS_PYTHON = Path("build/peers/bin/python")
Sections = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """What a run or a peer is given, by the names of a world's files.

    Args:
        queries: Queries.
        model: The model's weights.
        corpus: Training examples.
    """

    queries: str
    model: str = "model"
    corpus: str = "train"


class World(Protocol):
    """A model, what it was trained on, and queries, as files.

    Attributes:
        kind: Its name.
        folder: Where its files are.
        rows: Training examples.
        queries: Queries whose losses are foretold.
        training: How the model was trained, for the judge.
        lds: Subsets and retrainings, for the judge.
        trials: What else the judge shall try by training, as sections of its spec.
        ranked: File of queries -> the section `rank` of runs over it that do not say another.
    """

    kind: str
    folder: Path
    rows: int
    queries: int
    training: Sections
    lds: Mapping[str, int]
    trials: Mapping[str, Sections]
    ranked: Mapping[str, Sections]

    def sections(self, asked: Asked) -> dict[str, Any]:
        """Sections model, corpus, queries and task of a run."""
        ...

    def for_peers(self, folder: Path, asked: Asked) -> None:
        """Write model, corpus and queries into a folder as `tests.bench.peers.run` reads them."""
        ...


@dataclass(frozen=True)
class Timed:
    """A finished run, with seconds of its stages in one process.

    Args:
        run: The run.
        tune_s: All counterparts.
        score_s: All scores.
    """

    run: Run
    tune_s: float
    score_s: float


@dataclass(frozen=True)
class Other:
    """A peer's scores.

    Args:
        path: File of query_id, example_id and score.
        fit_s: What it does once for any queries.
        score_s: All scores.
    """

    path: Path
    fit_s: float
    score_s: float


def with_wrong_labels(label_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels of ten classes, a tenth of them wrong; and which rows those are, the same for as many labels of any kind."""
    chance = np.random.default_rng(0)
    flipped = chance.permutation(len(label_N))[: len(label_N) // 10]
    wrong_N = label_N.copy()
    wrong_N[flipped] = (wrong_N[flipped] + chance.integers(1, 10, len(flipped))) % 10
    return wrong_N, flipped


def run(world: World, name: str, sections: Sections, asked: Asked) -> Timed:
    """A run, in this process; finished runs are taken as they are."""
    return work(freeze(parse_spec(tree_of(world, name, sections, asked))))


def tree_of(world: World, name: str, sections: Sections, asked: Asked) -> dict[str, Any]:
    """The spec of a method's run."""
    folder = "".join(letter if letter.isalnum() else "-" for letter in name)
    given = world.sections(asked)
    uri = str(world.folder / "runs" / asked.queries / asked.model / folder)
    rank = world.ranked.get(asked.queries, {})
    return {
        "run": {"uri": uri}, **given, "rank": rank, **sections, "task": {**given["task"], **sections.get("task", {})}
    }  # fmt: skip


def work(run: Run) -> Timed:
    """Do what is missing of a run in this process; its seconds, as they were when it was done, with those of its members."""
    run = gathered(run)
    members = [work(member) for member in members_of(run)]
    place = Path(run.uri("seconds.json"))
    if not run.is_sealed():
        started_s = time.monotonic()
        if not members and (failures := Tuner(run, "cpu").tune_all(run.query_ids)):
            raise failures[0]
        tuned_s = time.monotonic()
        scorer = MeanScorer(run) if isinstance(run, Ensemble) else ShardScorer(run, "cpu")
        for one in run.works():
            scorer.score(one)
        seconds = {"tune_s": tuned_s - started_s, "score_s": time.monotonic() - tuned_s}
        finish(run)
        place.write_text(json.dumps(seconds))
    own = Timed(run, **json.loads(place.read_text()))
    return Timed(run, *(sum(getattr(each, name) for each in (own, *members)) for name in ("tune_s", "score_s")))


def peers(
    world: World, folder: Path, asked: Asked, only: Sequence[str] = (), temperature: float = 1.0
) -> dict[str, Other]:
    """Scores and timings of the other libraries that can do this, in a folder of their own; they are kept there.

    Args:
        world: Whose files are scored.
        folder: Theirs.
        asked: Which files.
        only: Names of peers; empty for all.
        temperature: What they divide logits by.
    """
    if not (folder / "peers.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        world.for_peers(folder, asked)
        setup = json.loads((folder / "setup.json").read_text())
        (folder / "setup.json").write_text(json.dumps({**setup, "temperature": temperature}))
        command = [PEERS_PYTHON, "-m", "tests.bench.peers.run", folder]
        subprocess.run([*command, *(["--only", *only] if only else [])], check=True)
    found: dict[str, dict[str, Any]] = json.loads((folder / "peers.json").read_text())
    return {
        name: Other(_named(world, folder, name, asked), facts["fit_s"], facts["score_s"])
        for name, facts in found.items()
        if "unsupported" not in facts
    }


def _named(world: World, folder: Path, peer: str, asked: Asked) -> Path:
    """A peer's scores by the ids of queries and examples, instead of their row numbers."""
    path = folder / f"named-{peer}.parquet"
    scores = pq.read_table(folder / f"scores-{peer}.parquet")
    for file, column, renamed in ((asked.queries, "query_id", "query_id"), (asked.corpus, "id", "example_id")):
        ids = pq.read_table(world.folder / f"{file}.parquet", columns=[column])[column]
        at = scores.column_names.index(renamed)
        scores = scores.set_column(at, renamed, ids.take(scores[renamed].cast(pa.int64())))
    pq.write_table(scores, path)
    return path


def judge(
    world: World, name: str, timed: Mapping[str, Timed], others: Mapping[str, Other], **sections: Any
) -> dict[str, dict[str, Any]]:
    """What the one judgement that is asked for says of each method, best first."""
    tree = {
        "judge": {"uri": str(world.folder / "judged" / name)},
        "runs": {method: each.run.uri() for method, each in timed.items()},
        "scores": {method: str(each.path) for method, each in others.items()},
        **sections,
    }
    (judgement,) = judged(parse_tree(Judge, tree))
    return {str(row["method"]): dict(row) for row in judgement.rows}
