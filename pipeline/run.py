"""The product, top to bottom: freeze, tune, score, rank, seal, report. No logic but order and resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

from .artifacts import Run
from .audit import mend, require_whole
from .cluster import connected
from .ensemble import Ensemble, members_of
from .errors import QuarantineError
from .extend import extend
from .freeze import freeze
from .frozen import open_run, save_spec, with_choices
from .members import errors_name_it, gathered
from .observe import say
from .rank import rank_with_meta
from .report import report
from .score import score
from .spec import Spec
from .specfile import parse_spec
from .tune import tune

Stage = Literal["tune", "score", "rank"]


def attribute(spec: Spec) -> Run:
    """Do everything a spec asks for that is not done yet.

    Raises:
        PipelineError: See errors.py; what is committed stays, and the same call goes on from there.
    """
    return carry_on(freeze(spec))


def grow(run_uri: str, queries_uri: str | None, corpus_uri: str | None) -> Run:
    """Add queries or newly arrived corpus files to a finished run, and do what that asks for. Raises as `attribute` does."""
    return carry_on(extend(run_uri, queries_uri, corpus_uri))


def carry_on(run: Run) -> Run:
    """Do what is not done yet of a frozen run; of an ensemble, its members first."""
    run = gathered(run)
    _each_member(run, mend)
    mend(run)
    with connected(run.spec.resources) if _needs_ray(run) else nullcontext():
        _each_member(run, tune, score, finish)
        tune(run)
        run = with_choices(run)
        score(run)
    finish(run)
    return run


def run_stage(spec: Spec, stage: Stage) -> Run:
    """Do one stage, for orchestrators that schedule them apart; members are ranked with stage score. Raises as `attribute`."""
    run = gathered(freeze(spec))
    _each_member(run, mend)
    mend(run)
    if stage == "rank":
        finish(run)
        return run
    with connected(spec.resources) if _needs_ray(run) else nullcontext():
        if stage == "tune":
            _each_member(run, tune)
            tune(run)
            run = with_choices(run)
        else:
            _each_member(run, score, finish)
            score(run)
    return run


def rerank(run_uri: str, overrides: Sequence[str]) -> Run:
    """Rank and report a run again with overrides of its rank section; scores nothing.

    Raises:
        SpecError: An override is wrong.
        ArtifactError, InputError: The run is not scored to its end, or damaged; its run.yaml stays as it was.
    """
    run = open_run(run_uri)
    section = parse_spec(run.spec.model_dump(mode="json"), overrides).rank
    require_whole(run)
    run = replace(run, spec=run.spec.model_copy(update={"rank": section}))
    finish(run)
    save_spec(run)
    return run


def finish(run: Run) -> None:
    """What comes after the last score: rank, seal, report."""
    ranking = rank_with_meta(run)
    run.seal()
    report(run, ranking)  # this one, whatever another command ranks meanwhile


def _each_member(run: Run, *actions: Callable[[Run], object]) -> None:
    """Do things with one member of an ensemble after the other, saying with which; with an ordinary run, nothing.

    What is quarantined in one does not stop the others: the mean, which comes last, says so again.
    """
    if isinstance(run, Ensemble):
        for place, member in enumerate(run.members):
            with errors_name_it(run, place):
                if mend not in actions and _has_work(member):
                    say(f"{run.named(place)}: {', '.join(action.__name__ for action in actions)}")
                try:
                    for action in actions:
                        action(member)
                except QuarantineError as error:
                    say(f"warning: {run.named(place)}: {error.message}")


def _needs_ray(run: Run) -> bool:
    """Whether anything is left that workers must do; a finished run needs no cluster."""
    return any(map(_has_work, (*members_of(run), run)))


def _has_work(run: Run) -> bool:
    return len(run.committed_queries()) < len(run.query_ids) or len(run.committed()) < run.number_of_works
