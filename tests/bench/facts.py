"""`make bench-facts`: does `jobs/specs/trace_facts.yaml` find the sentences that taught a model a fact, and who else does?

The benchmark is what `python -m jobs.facts` makes. Over all sentences, and as in FTRACE (Akyürek et al., 2205.11482) over a pool
of each query: its proponents, the first 100 of BM25, up to 100 with the same object, and 100 by chance.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipeline.artifacts import Run
from pipeline.evaluate import interval, retrieval
from pipeline.extensions import load_model, load_task, prepared
from pipeline.folder import partition
from pipeline.observe import say
from pipeline.specfile import load_spec
from tests.bench import baselines
from tests.bench.table import FOLDER, machine
from tests.conftest import run_without_ray

WORLD, SPEC = Path("build/facts"), "jobs/specs/trace_facts.yaml"
QUERIES_PER_RUN = 4
"""Counterparts that are held at once: 540 MB each."""
POOL, DEPTH = 100, 10
OURS = "mirrorscope, trace_facts.yaml"


class Facts:
    """The benchmark on disk, and the recipe that is judged.

    Args:
        folder: What `python -m jobs.facts` wrote.
        queries: File of queries in it.
        overrides: Of the spec's fields.
    """

    def __init__(self, folder: Path, queries: str, overrides: Sequence[str] = ()) -> None:
        uris = [f"model.weights_uri={folder}/model", f"corpus.uri={folder}/sentences.parquet"]
        self.overrides = [*uris, *overrides]
        self.queries = pq.read_table(folder / queries)
        table = pq.read_table(folder / "sentences.parquet")
        self.ids, self.texts = table["id"].to_pylist(), table["text"].to_pylist()
        self.truth_QN = self._equal(table["fact"], self.queries["query_id"])
        self.same_object_QN = self._equal(table["object"], self.queries["object"])
        same_subject_QN = self._equal(table["subject"], self.queries["subject"])
        self.twin_Q = (same_subject_QN & self.same_object_QN & ~self.truth_QN).any(axis=1)

    def _equal(self, of_texts: pa.ChunkedArray, of_queries: pa.ChunkedArray) -> np.ndarray:
        texts_N = np.asarray(of_texts.to_pylist())
        return np.stack([texts_N == value for value in of_queries.to_pylist()])

    def asked(self) -> list[str]:
        """Questions with their answers, as text."""
        pairs = zip(self.queries["prompt"].to_pylist(), self.queries["text"].to_pylist(), strict=True)
        return [prompt + text for prompt, text in pairs]

    def pool(self, bm25_QN: np.ndarray, seed: int = 0) -> np.ndarray:
        """FTRACE's candidates of each query: [Q, N]."""
        draw = np.random.default_rng(seed)
        pool_QN = self.truth_QN.copy()
        for pool_N, same_N, score_N in zip(pool_QN, self.same_object_QN, bm25_QN, strict=True):
            same = np.flatnonzero(same_N)
            pool_N[draw.permutation(same)[:POOL]] = True
            pool_N[np.argsort(-score_N, kind="stable")[:POOL]] = True
            pool_N[draw.permutation(len(pool_N))[:POOL]] = True
        return pool_QN


def ours(facts: Facts) -> np.ndarray:
    """Scores of the spec's recipe: [Q, N]. A few queries per run, so that few counterparts are held at a time."""
    parts = []
    for start in range(0, facts.queries.num_rows, QUERIES_PER_RUN):
        with TemporaryDirectory() as folder:
            queries = facts.queries.slice(start, QUERIES_PER_RUN)
            pq.write_table(queries, f"{folder}/queries.parquet")
            uris = [f"run.uri={folder}/run", f"queries.uri={folder}/queries.parquet"]
            run = run_without_ray(load_spec(SPEC, [*facts.overrides, *uris]))
            parts += [_in_order(run, query_id, facts.ids) for query_id in queries["query_id"].to_pylist()]
        say(f"{len(parts)} of {facts.queries.num_rows} queries scored")
    return np.stack(parts)


def _in_order(run: Run, query_id: str, ids: Sequence[str]) -> np.ndarray:
    """Scores [N] of one query; every example has one."""
    place = {example_id: number for number, example_id in enumerate(ids)}
    uri = run.uri("scores", partition(query_id))
    table = pq.read_table(uri, columns=["example_id", "score"], partitioning=None)
    score_N = np.full(len(ids), np.nan)
    score_N[[place[each] for each in table["example_id"].to_pylist()]] = table["score"].to_numpy()
    return score_N


def all_scores(facts: Facts) -> Iterator[tuple[str, np.ndarray]]:
    """Name and scores [Q, N] of every method."""
    yield OURS, ours(facts)
    yield "BM25, question and answer", baselines.bm25(facts.texts, facts.asked())
    yield "BM25, question alone", baselines.bm25(facts.texts, facts.queries["prompt"].to_pylist())
    spec = load_spec(SPEC, facts.overrides)
    model, task = load_model(spec.model, "cpu", 0), load_task(spec.task)
    texts: Any = prepared(task, _columns(facts.texts, [""] * len(facts.texts)))
    pairs = list(zip(facts.queries["text"].to_pylist(), facts.queries["prompt"].to_pylist(), strict=True))
    queries: Any = [prepared(task, _columns([text], [prompt])) for text, prompt in pairs]
    yield "hidden states", baselines.hidden_states(model, texts, prepared(task, _columns(*zip(*pairs, strict=True))))
    model.set_attn_implementation("eager")
    yield "gradients (TracIn)", baselines.gradients(model, task, texts, queries)
    yield "chance", baselines.chance(len(facts.texts), len(pairs))


def _columns(texts: Sequence[str], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    return {"text": np.array(texts, object), "prompt": np.array(prompts, object)}


def measured(facts: Facts) -> Iterator[list[dict[str, Any]]]:
    """MRR, recall and precision over all sentences and over FTRACE's pools, with intervals: of all methods so far."""
    pool_QN = facts.pool(baselines.bm25(facts.texts, facts.asked()))
    rows: list[dict[str, Any]] = []
    for name, score_QN in all_scores(facts):
        for over, ranked_QN in (("all", None), ("pool", pool_QN)):
            found = retrieval(score_QN, facts.truth_QN, DEPTH, ranked_QN)
            values = {"mrr": found.reciprocal_rank_Q, "recall": found.recall_Q, "precision": found.precision_Q}
            means = {measure: [float(value_Q.mean()), *interval(value_Q)] for measure, value_Q in values.items()}
            rows.append({"method": name, "over": over, "reciprocal_rank": found.reciprocal_rank_Q.tolist(), **means})
        say(f"{name}: MRR {rows[-2]['mrr'][0]:.3f}")
        yield rows


def show(rows: list[dict[str, Any]], facts: Facts) -> None:
    """The table, and by how much the first method's MRR is above the others'."""
    q, n = facts.truth_QN.shape
    out = Console(width=150)
    for over, title in (("all", f"over all {n} sentences"), ("pool", "over each query's pool, as in FTRACE")):
        table = Table(title=f"{q} queries, {title}; 95 % of bootstraps", title_justify="left")
        names = (
            "method",
            "MRR",
            "of twins",
            "of others",
            f"recall@{DEPTH}",
            f"precision@{DEPTH}",
            "MRR of ours, less this one's",
        )
        for column in names:
            table.add_column(column, no_wrap=column == "method")
        some = [row for row in rows if row["over"] == over]
        for row in some:
            rank_Q = np.array(row["reciprocal_rank"])
            less_Q = np.array(some[0]["reciprocal_rank"]) - rank_Q
            mrr, recall, precision = (
                "{:.2f} ({:.2f} to {:.2f})".format(*row[name]) for name in ("mrr", "recall", "precision")
            )
            kinds = (f"{rank_Q[kind_Q].mean():.2f}" for kind_Q in (facts.twin_Q, ~facts.twin_Q))
            less = "{:+.2f} ({:+.2f} to {:+.2f})".format(less_Q.mean(), *interval(less_Q)) if row is not some[0] else ""
            table.add_row(row["method"], mrr, *kinds, recall, precision, less)
        out.print(table)
    out.print(machine())


def main() -> None:
    """The evaluated queries. What is measured is written at once: build/bench/facts.json."""
    started_s = time.perf_counter()
    facts = Facts(WORLD, "evaluated.parquet")
    rows: list[dict[str, Any]] = []
    for rows in measured(facts):
        FOLDER.mkdir(parents=True, exist_ok=True)
        report = {"conditions": machine(), "seconds": round(time.perf_counter() - started_s), "rows": rows}
        (FOLDER / "facts.json").write_text(json.dumps(report, indent=1) + "\n")
    show(rows, facts)


if __name__ == "__main__":
    main()
