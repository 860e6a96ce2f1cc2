"""Judgements by what is known: what is behind a query, what carries a wrong label.

Shapes: Q queries, N examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import evaluate, figures
from .case import Case, Judgement, Row, best_first, labelled, read_table, spread
from .errors import InputError
from .evaluate import Detection
from .matrices import Matrix

BASE_LOSS = "base loss"
"""The method that needs no counterpart: what the model has not learned, or learned last, is suspicious."""


def truth(case: Case) -> Judgement:
    """Is what is known to be behind a query ranked first? Raises InputError if that is not known of every query."""
    assert case.judge.truth is not None
    truth_QN = _true_pairs(case, case.judge.truth.uri)
    k = case.judge.truth.k
    rows: list[Row] = []
    ranks: dict[str, np.ndarray] = {}
    for each in case.methods:
        found = evaluate.retrieval(each.value_QN, truth_QN, k=k, seed=case.judge.seed)
        first_Q = np.round(1 / found.reciprocal_rank_Q)
        ranks[labelled(each)] = first_Q
        rows.append(
            {
                "method": each.name, "transform": each.transform, **spread("top1", evaluate.proportion(first_Q <= 1)),
                **spread("top5", evaluate.proportion(first_Q <= 5)),
                **spread("mrr", evaluate.mean_over(found.reciprocal_rank_Q)),
                **spread(f"recall_at_{k}", evaluate.mean_over(found.recall_Q)),
            }
        )  # fmt: skip
    title = f"Retrieval of the true examples of {case.queries} among {len(case.id_N):,}"
    return Judgement("truth", title, best_first(rows, "mrr"), figures.ranks(ranks, title))


def mislabelled(case: Case) -> Judgement:
    """Do opponents of the queries together carry wrong labels, and examples of high base loss?

    Raises:
        InputError: No wrong label is known.
    """
    wrong_N = case.wrong_N
    suspicion = {labelled(each): -each.value_QN.mean(axis=0) for each in case.methods}
    curves: dict[str, Detection] = {
        name: evaluate.detection(value_N, wrong_N, seed=case.judge.seed)
        for name, value_N in (suspicion | _base_losses(case.methods)).items()
    }
    rows: list[Row] = [
        {"method": name, "auc": found.auc, **{f"found_in_{share:.0%}": part for share, part in found.found.items()}}
        for name, found in curves.items()
    ]
    title = f"Detection of {int(wrong_N.sum())} wrong labels among {len(wrong_N):,}, by opponents of {case.queries}"
    return Judgement("mislabelled", title, best_first(rows, "auc"), figures.found(curves, title))


def _base_losses(methods: Sequence[Matrix]) -> dict[str, np.ndarray]:
    """Base losses [N] of the runs by a name for the table; with names of runs where they differ, as by temperature."""
    groups: list[tuple[np.ndarray, list[str]]] = []
    for each in methods:
        if each.base_loss_N is None:
            continue
        alike = (names for loss_N, names in groups if np.allclose(loss_N, each.base_loss_N, rtol=1e-3, atol=1e-6))
        if (names := next(alike, None)) is not None:
            names.append(each.name)
        else:
            groups.append((each.base_loss_N, [each.name]))
    return {BASE_LOSS if len(groups) == 1 else f"{BASE_LOSS} ({', '.join(names)})": loss_N for loss_N, names in groups}


def _true_pairs(case: Case, uri: str) -> np.ndarray:
    """Which examples are true of which query: [Q, N]. Raises InputError if a query has none."""
    table = read_table(uri, ["query_id", "example_id"])
    pairs: dict[str, list[str]] = {}
    for query_id, example_id in zip(table["query_id"].to_pylist(), table["example_id"].to_pylist(), strict=True):
        pairs.setdefault(query_id, []).append(example_id)
    truth_QN = np.stack([np.isin(case.id_N, np.asarray(pairs.get(query_id, []), str)) for query_id in case.query_ids])
    if not truth_QN.any(axis=1).all():
        without = case.query_ids[int(np.argmin(truth_QN.any(axis=1)))]
        raise InputError(f"truth.uri: {uri} names no example of the corpus for query {without!r}")
    return truth_QN
