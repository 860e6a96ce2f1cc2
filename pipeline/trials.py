"""Judgements by training anew: what scores foretell is done, and what becomes of the queries is measured.

Shapes: Q queries, N examples, S subsets, G groups of examples, R retrainings of each, K top-k, M random draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np

from . import figures, judgements
from .case import Case, Judgement, Row, best_first, labelled, spread
from .errors import InputError
from .judge import LdsSection, LeaveOutSection, MirrorSection, TailPatchSection
from .judgements import Contrast
from .lessons import Lesson, Step, Subset, Whole, seed_of, without
from .retrain import Retrainings, model_mark

_Asked = TypeVar("_Asked")
"""Section of the judge's spec."""


@dataclass(frozen=True)
class Trial(ABC, Generic[_Asked]):
    """One question that retraining answers: first say what is to be trained, then, when it is, judge.

    Args:
        case: What is judged.
        retrainings: Where losses after lessons are.
        section: What is asked.
    """

    case: Case
    retrainings: Retrainings
    section: _Asked

    @abstractmethod
    def lessons(self) -> list[Lesson]:
        """All that it wants to be trained. Raises InputError if the corpus does not have what is asked for."""

    @abstractmethod
    def judgement(self) -> Judgement:
        """The answer, once all lessons are learned."""

    def _losses(self, parts: Sequence[Sequence[Lesson]]) -> np.ndarray:
        """Losses of the queries [S, R, Q] after lessons, R for each of S."""
        return self.retrainings.query_losses(list(chain.from_iterable(parts))).reshape(len(parts), len(parts[0]), -1)

    def _whole(self, retrainings: int) -> list[Lesson]:
        """Models of the whole corpus, with which those of a part of it are compared."""
        return [Whole(None, r) for r in range(retrainings)]

    def _without(self, row_SM: np.ndarray, retrainings: int) -> list[list[Lesson]]:
        """Models of the corpus without rows, for each of S lists of them."""
        return [[without(row_M, r) for r in range(retrainings)] for row_M in row_SM]

    def _drawn(self, name: str, draws: int, rows: int) -> np.ndarray:
        """Random rows, drawn by the spec's seed: [draws, rows]."""
        chance = np.random.default_rng(seed_of(self.case.judge.seed, name))
        return np.stack([chance.permutation(len(self.case.id_N))[:rows] for _ in range(draws)])

    def _top(self, field: str, k: int) -> dict[str, np.ndarray]:
        """Every method's k strongest proponents of every query: [Q, K]. Raises InputError if that is the whole corpus."""
        if k >= len(self.case.id_N):
            raise InputError(f"{field}: {k:,} of {len(self.case.id_N):,} examples would leave none to compare with")
        return {labelled(each): np.argsort(-each.value_QN, axis=1, kind="stable")[:, :k] for each in self.case.methods}


class LinearDatamodelling(Trial[LdsSection]):
    """Do sums of scores foretell what training on part of the corpus does to the queries?"""

    @cached_property
    def _parts(self) -> list[list[Subset]]:
        section = self.section
        return [[Subset(section.share, s, r) for r in range(section.retrainings)] for s in range(section.subsets)]

    def lessons(self) -> list[Lesson]:
        """See Trial."""
        return list(chain.from_iterable(self._parts))

    def judgement(self) -> Judgement:
        """See Trial."""
        case, section = self.case, self.section
        loss_SRQ = self._losses(self._parts)
        inside_SN = np.stack([some[0].inside_N(case.judge.seed, len(case.id_N)) for some in self._parts])
        found = {
            each.name: judgements.linear_datamodelling(each.score_QN, inside_SN, loss_SRQ) for each in case.methods
        }
        ceiling = next(iter(found.values())).ceiling
        rows: list[Row] = [
            {
                "method": name, "lds": each.mean.value, "low": each.mean.low, "high": each.mean.high,
                "standard_error": each.standard_error, "ceiling": ceiling,
            }
            for name, each in found.items()
        ]  # fmt: skip
        title = (
            f"Linear datamodelling score: {section.subsets} subsets ({section.share:.0%}), {section.retrainings} models each, "
            f"{case.queries}"
        )
        xlabel = "Spearman correlation, mean over queries, 95 % interval"
        bars = [(name, each.mean.value, each.mean.low, each.mean.high) for name, each in found.items()]
        figure = figures.bars(bars, title, xlabel, ceiling, "what perfect scores would get")
        return Judgement("lds", title, best_first(rows, "lds"), figure)


class Mirror(Trial[MirrorSection]):
    """Does the hypothesis hold (Ko et al. 2024)? Methods are judged beside it: what their scores foretell is minus P1.

    Over groups of examples i, P1(i, t) = L(A(D), t) - L(A(D without i), t) should go with P2(i, t) = L(A(D + t), i) - L(A(D), i).
    """

    @cached_property
    def _fewer(self) -> list[list[Lesson]]:
        return self._without(self._groups_GM, self.section.retrainings)

    @cached_property
    def _more(self) -> list[list[Lesson]]:
        return [[Whole(query_id, r) for r in range(self.section.retrainings)] for query_id in self.case.query_ids]

    def lessons(self) -> list[Lesson]:
        """See Trial."""
        return list(chain(self._whole(self.section.retrainings), *self._fewer, *self._more))

    def judgement(self) -> Judgement:
        """See Trial."""
        case, section, retrainings = self.case, self.section, self.retrainings
        whole = self._whole(section.retrainings)
        base_Q, base_N = retrainings.query_losses(whole).mean(axis=0), retrainings.example_losses(whole).mean(axis=0)
        p1_QG = base_Q[:, None] - self._losses(self._fewer).mean(axis=1).T
        p2_QN = np.stack([retrainings.example_losses(some).mean(axis=0) - base_N for some in self._more])
        p2_QG = p2_QN[:, self._groups_GM].mean(axis=2)
        mirrored = judgements.mean_agreement(p1_QG, p2_QG)
        found = {"trained with the query (P2)": mirrored} | {
            each.name: judgements.mean_agreement(-p1_QG, each.score_QN[:, self._groups_GM].mean(axis=2))
            for each in case.methods
        }
        rows: list[Row] = [
            {"method": name, **spread("pearson", each.pearson), **spread("spearman", each.spearman)}
            for name, each in found.items()
        ]
        what = "single examples" if section.rows == 1 else f"groups of {section.rows:,}"
        title = (
            f"The mirrored influence hypothesis: {section.groups:,} {what} of {len(case.id_N):,}, {case.queries}, "
            f"{_models(section.retrainings)} each"
        )
        xlabel = "P1: change of the query's loss by the examples (nats)"
        ylabel = "P2: change of the examples' loss by the query (nats)"
        figure = figures.scatter(mirrored, p1_QG.ravel(), p2_QG.ravel(), title, xlabel, ylabel)
        return Judgement("mirror", title, best_first(rows, "pearson"), figure)

    @cached_property
    def _groups_GM(self) -> np.ndarray:
        """Rows of the groups that are left out in turn: [G, M]. Raises InputError if the corpus has too few."""
        section, examples = self.section, len(self.case.id_N)
        if section.by_wrong_labels:
            return self._groups_by_wrong_labels_GM()
        if section.rows >= examples or (section.rows == 1 and section.groups > examples):
            raise InputError(
                f"mirror: {section.groups:,} groups of {section.rows:,}: the corpus has {examples:,} examples",
                "fewer groups, or smaller ones",
            )
        if section.rows == 1:
            return self._drawn("groups", 1, section.groups).T
        return self._drawn("groups", section.groups, section.rows)

    def _groups_by_wrong_labels_GM(self) -> np.ndarray:
        section, wrong_N = self.section, self.case.wrong_N
        wrong, right = np.flatnonzero(wrong_N), np.flatnonzero(~wrong_N)
        most = min(len(wrong), len(right))
        if section.rows > most:
            raise InputError(
                f"mirror.rows: groups of {section.rows:,} cannot be all wrong labels or all right ones: there are "
                f"{len(wrong):,} and {len(right):,}",
                f"at most {most:,}",
            )
        chance = np.random.default_rng(seed_of(self.case.judge.seed, "groups"))
        counts = np.round(np.linspace(0, section.rows, section.groups)).astype(int)
        groups = (
            (chance.permutation(wrong)[:count], chance.permutation(right)[: section.rows - count]) for count in counts
        )
        return np.stack([np.concatenate(pair) for pair in groups])


class LeaveOut(Trial[LeaveOutSection]):
    """Does a query's loss rise when its strongest proponents are not trained on?"""

    @cached_property
    def _without_random(self) -> list[list[Lesson]]:
        return self._without(self._drawn("leave out", self.section.draws, self.section.k), self.section.retrainings)

    @cached_property
    def _without_top(self) -> dict[str, list[list[Lesson]]]:
        top = self._top("leave_out.k", self.section.k)
        return {name: self._without(row_QK, self.section.retrainings) for name, row_QK in top.items()}

    def lessons(self) -> list[Lesson]:
        """See Trial."""
        tops = chain.from_iterable(self._without_top.values())
        return list(chain(self._whole(self.section.retrainings), *self._without_random, *tops))

    def judgement(self) -> Judgement:
        """See Trial."""
        section = self.section
        base_Q = self.retrainings.query_losses(self._whole(section.retrainings)).mean(axis=0)
        random_QM = self._losses(self._without_random).mean(axis=1).T - base_Q[:, None]
        found = {}
        for name, parts in self._without_top.items():
            loss_QQ = self._losses(parts).mean(axis=1)  # of models without one query's proponents, each for itself
            found[name] = judgements.contrast(np.diagonal(loss_QQ) - base_Q, random_QM)
        title = (
            f"Leave-top-{section.k}-out of {len(self.case.id_N):,}: rise of the loss of {self.case.queries}, beyond that without "
            f"{section.k} random examples; {_models(section.retrainings)} each"
        )
        return _contrasts(
            "leave_out", title, "rise of the query's loss (nats), mean over queries, 95 % interval", found
        )


class TailPatch(Trial[TailPatchSection]):
    """Does a step on a query's strongest proponents lower its loss?"""

    @property
    def _lr(self) -> float:
        return self.case.judge.training.lr if self.section.lr is None else self.section.lr

    @cached_property
    def _tops(self) -> dict[str, np.ndarray]:
        return self._top("tail_patch.k", self.section.k)

    @cached_property
    def _drawn_M(self) -> np.ndarray:
        return self._drawn("tail patch", 1, min(self.section.draws, len(self.case.id_N)))[0]

    @cached_property
    def _rows_W(self) -> np.ndarray:
        """All rows that a step is taken on, in order."""
        return np.unique(np.concatenate([self._drawn_M, *(row_QK.ravel() for row_QK in self._tops.values())]))

    def _step(self, row: int, lr: float) -> Lesson:
        return Step(row, lr, model_mark(self.case.run))

    def lessons(self) -> list[Lesson]:
        """See Trial; the first is a step of no length: the model as it is."""
        return [self._step(0, 0.0), *(self._step(row, self._lr) for row in self._rows_W.tolist())]

    def judgement(self) -> Judgement:
        """See Trial."""
        section = self.section
        base_1Q, after_WQ = np.split(self.retrainings.query_losses(self.lessons()), [1])
        fall_WQ = base_1Q - after_WQ
        random_QM = fall_WQ[np.searchsorted(self._rows_W, self._drawn_M)].T
        found = {}
        for name, row_QK in self._tops.items():
            fall_QKQ = fall_WQ[np.searchsorted(self._rows_W, row_QK)]
            own_Q = np.array([fall_KQ[:, q].mean() for q, fall_KQ in enumerate(fall_QKQ)])
            found[name] = judgements.contrast(own_Q, random_QM)
        title = (
            f"Tail patch: fall of the loss of {self.case.queries} by one step (learning rate {self._lr:g}) on each of "
            f"{section.k} proponents, beyond that on {len(self._drawn_M)} random examples"
        )
        return _contrasts(
            "tail_patch", title, "fall of the query's loss (nats), mean over queries, 95 % interval", found
        )


def asked(case: Case, retrainings: Retrainings) -> list[Trial[Any]]:
    """What a judge is asked that wants retraining."""
    judge = case.judge
    kinds: list[tuple[type[Trial[Any]], Any]] = [
        (LinearDatamodelling, judge.lds), (Mirror, judge.mirror), (LeaveOut, judge.leave_out), (TailPatch, judge.tail_patch)
    ]  # fmt: skip
    return [kind(case, retrainings, section) for kind, section in kinds if section is not None]


def _contrasts(name: str, title: str, xlabel: str, found: dict[str, Contrast]) -> Judgement:
    rows: list[Row] = [
        {
            "method": method, "top": each.top, "random": each.random, **spread("difference", each.difference),
            **spread("wins", each.wins),
        }
        for method, each in found.items()
    ]  # fmt: skip
    bars = [
        (method, each.difference.value, each.difference.low, each.difference.high) for method, each in found.items()
    ]
    return Judgement(name, title, best_first(rows, "difference"), figures.bars(bars, title, xlabel))


def _models(count: int) -> str:
    return "one model" if count == 1 else f"{count} models"
