"""The judge: methods side by side, on whether their scores are right.

Reads: finished runs, scores of other tools, retrainings, what is known to be true.
Writes: {judge.uri}/report/: per judgement a table (CSV) and a figure; and these into each judged run's report/ too.
Resumes: made again as a whole; retrainings are kept.
Next: nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.csv

from . import evaluate, figures, judgements, matrices, storage
from .artifacts import Run
from .corpus import as_text, open_format
from .errors import ArtifactError, InputError
from .evaluate import Detection, Estimate
from .extensions import load_task
from .frozen import open_run
from .judge import Judge
from .matrices import Matrix
from .plan import make_shards
from .queries import WHOLE_FILE_ROWS
from .retrain import Retrainings, retrain
from .retraining import read_examples, untempered

Row = dict[str, str | float | int | None]


@dataclass(frozen=True)
class Judgement:
    """One question put to all methods.

    Args:
        name: Of its files.
        title: What was asked.
        rows: One per method, best first.
        figure: PNG.
    """

    name: str
    title: str
    rows: Sequence[Row]
    figure: bytes


@dataclass(frozen=True)
class _Case:
    """What is judged: ids of queries and examples, and every method's scores."""

    judge: Judge
    run: Run
    query_ids: tuple[str, ...]
    id_N: np.ndarray
    methods: Sequence[Matrix]


def judged(judge: Judge) -> list[Judgement]:
    """Judge all methods by all that is asked, and write tables and figures.

    Raises:
        SpecError, InputError: Runs disagree, scores or truths are missing or strange.
        ArtifactError: A run is not finished, or damaged.
        NumericsError, ContractError, ClusterError: Of retrainings.
    """
    runs = {name: open_run(uri) for name, uri in judge.runs.items()}
    case = _case(judge, runs)
    asked: list[tuple[object, Callable[[_Case], Judgement]]] = [
        (judge.lds, _lds), (judge.truth, _truth), (judge.mislabelled, _mislabelled)
    ]  # fmt: skip
    found = [judgement(case) for section, judgement in asked if section is not None]
    for uri in (storage.absolute(judge.judge.uri), *(run.uri() for run in runs.values())):
        for judgement in found:
            storage.write_bytes(f"{uri}/report/{judgement.name}.csv", _csv(judgement.rows))
            storage.write_bytes(f"{uri}/report/{judgement.name}.png", judgement.figure)
    return found


def _case(judge: Judge, runs: Mapping[str, Run]) -> _Case:
    name, first = next(iter(runs.items()))
    for other, run in runs.items():
        if not run.is_sealed():
            raise ArtifactError(f"runs.{other}: {run.uri()} is not finished", "run its spec to the end first")
        if run.resolved.digests["corpus"] != first.resolved.digests["corpus"] or run.query_ids != first.query_ids:
            raise InputError(
                f"runs.{other}: {run.uri()} has another corpus or other queries than {name}, {first.uri()}",
                "methods are judged side by side on the same examples and queries",
            )
    id_N, _ = read_examples(first, load_task(untempered(first.spec.task)))
    query_ids = first.query_ids
    found = [matrices.of_run(each, run, query_ids, id_N) for each, run in runs.items()]
    found += [matrices.of_file(each, storage.absolute(uri), query_ids, id_N) for each, uri in judge.scores.items()]
    return _Case(judge, first, query_ids, id_N, found)


def _lds(case: _Case) -> Judgement:
    """Do sums of scores foretell what training on part of the corpus does to the queries?"""
    assert case.judge.lds is not None
    retrainings = Retrainings(case.judge, case.run, case.judge.lds)
    retrain(retrainings)
    loss_SRQ = retrainings.losses_SRQ()
    inside_SN = np.stack([retrainings.inside_N(part, len(case.id_N)) for part in range(len(loss_SRQ))])
    found = {each.name: judgements.linear_datamodelling(each.score_QN, inside_SN, loss_SRQ) for each in case.methods}
    ceiling = next(iter(found.values())).ceiling
    rows: list[Row] = [
        {
            "method": name, "lds": lds.mean.value, "low": lds.mean.low, "high": lds.mean.high,
            "standard_error": lds.standard_error, "ceiling": ceiling,
        }
        for name, lds in found.items()
    ]  # fmt: skip
    section = case.judge.lds
    title = (
        f"Linear datamodelling score: {section.subsets} subsets ({section.share:.0%}), {section.retrainings} models each, "
        f"{_queries(case)}"
    )
    xlabel = "Spearman correlation, mean over queries, 95 % interval"
    bars = [(name, lds.mean.value, lds.mean.low, lds.mean.high) for name, lds in found.items()]
    figure = figures.bars(bars, title, xlabel, ceiling, "what perfect scores would get")
    return Judgement("lds", title, _best_first(rows, "lds"), figure)


def _truth(case: _Case) -> Judgement:
    """Is what is known to be behind a query ranked first?"""
    assert case.judge.truth is not None
    truth_QN = _true_pairs(case, case.judge.truth.uri)
    k = case.judge.truth.k
    rows: list[Row] = []
    ranks: dict[str, np.ndarray] = {}
    for each in case.methods:
        found = evaluate.retrieval(each.value_QN, truth_QN, k=k, seed=case.judge.seed)
        first_Q = np.round(1 / found.reciprocal_rank_Q)
        ranks[_labelled(each)] = first_Q
        rows.append(
            {
                "method": each.name, "transform": each.transform, **_spread("top1", evaluate.proportion(first_Q <= 1)),
                **_spread("top5", evaluate.proportion(first_Q <= 5)),
                **_spread("mrr", evaluate.mean_over(found.reciprocal_rank_Q)),
                **_spread(f"recall_at_{k}", evaluate.mean_over(found.recall_Q)),
            }
        )  # fmt: skip
    title = f"Retrieval of the true examples of {_queries(case)} among {len(case.id_N):,}"
    return Judgement("truth", title, _best_first(rows, "mrr"), figures.ranks(ranks, title))


def _mislabelled(case: _Case) -> Judgement:
    """Do opponents of the queries together carry wrong labels?"""
    assert case.judge.mislabelled is not None
    table = _read(case.judge.mislabelled.uri, ["example_id"])
    bad_N = np.isin(case.id_N, np.asarray(table["example_id"].to_pylist(), dtype=str))
    if not bad_N.any():
        raise InputError(f"mislabelled.uri: {case.judge.mislabelled.uri} names no example of the corpus")
    curves: dict[str, Detection] = {
        _labelled(each): evaluate.detection(-each.value_QN.mean(axis=0), bad_N, seed=case.judge.seed)
        for each in case.methods
    }
    rows: list[Row] = [
        {"method": name, "auc": found.auc, **{f"found_in_{share:.0%}": part for share, part in found.found.items()}}
        for name, found in curves.items()
    ]
    title = f"Detection of {int(bad_N.sum())} wrong labels among {len(bad_N):,}, by opponents of {_queries(case)}"
    return Judgement("mislabelled", title, _best_first(rows, "auc"), figures.found(curves, title))


def _queries(case: _Case) -> str:
    return "one query" if len(case.query_ids) == 1 else f"{len(case.query_ids):,} queries"


def _labelled(method: Matrix) -> str:
    return method.name if method.transform == "signed" else f"{method.name} ({method.transform})"


def _spread(name: str, estimate: Estimate) -> Row:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _best_first(rows: Sequence[Row], by: str) -> list[Row]:
    return sorted(rows, key=lambda row: -float(row[by] or 0))


def _true_pairs(case: _Case, uri: str) -> np.ndarray:
    """Which examples are true of which query: [Q, N]. Raises InputError if a query has none."""
    table = _read(uri, ["query_id", "example_id"])
    pairs: dict[str, list[str]] = {}
    for query_id, example_id in zip(table["query_id"].to_pylist(), table["example_id"].to_pylist(), strict=True):
        pairs.setdefault(query_id, []).append(example_id)
    truth_QN = np.stack([np.isin(case.id_N, np.asarray(pairs.get(query_id, []), str)) for query_id in case.query_ids])
    if not truth_QN.any(axis=1).all():
        without = case.query_ids[int(np.argmin(truth_QN.any(axis=1)))]
        raise InputError(f"truth.uri: {uri} names no example of the corpus for query {without!r}")
    return truth_QN


def _read(uri: str, names: Sequence[str]) -> pa.Table:
    """Columns of a table in any format that a corpus may have, as text. Raises InputError."""
    reader, _ = open_format(uri, "auto", None)
    parts = []
    for file in reader.files(uri):
        measured = storage.retried(file.path, partial(reader.measure, file))
        if missing := [name for name in names if name not in measured.columns]:
            raise InputError(
                f"{file.path}: got columns {', '.join(measured.columns)}, expected also {', '.join(missing)}"
            )
        parts += [reader.read(shard, list(names)).table for shard in make_shards([measured], WHOLE_FILE_ROWS)]
    return pa.table({name: pa.concat_arrays([as_text(part, name) for part in parts]) for name in names})


def _csv(rows: Sequence[Row]) -> bytes:
    out = io.BytesIO()
    pyarrow.csv.write_csv(pa.Table.from_pylist(list(rows)), out)
    return out.getvalue()
