"""The product, top to bottom: freeze, tune, score, rank, report. No logic but order and resume."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

from .artifacts import Run
from .cluster import connected
from .freeze import freeze
from .rank import rank
from .report import report
from .score import score
from .spec import RankSection, Spec
from .tune import tune

Stage = Literal["tune", "score", "rank"]


def attribute(spec: Spec) -> Run:
    """Do everything a spec asks for that is not done yet.

    Raises:
        PipelineError: See errors.py; what is committed stays, and the same call goes on from there.
    """
    run = freeze(spec)
    with connected(spec.resources) if _needs_ray(run) else nullcontext():
        tune(run)
        score(run)
    finish(run)
    return run


def run_stage(spec: Spec, stage: Stage) -> Run:
    """Do one stage, for orchestrators that schedule them apart. Raises as `attribute` does."""
    run = freeze(spec)
    if stage == "rank":
        finish(run)
        return run
    with connected(spec.resources) if _needs_ray(run) else nullcontext():
        tune(run) if stage == "tune" else score(run)
    return run


def rerank(run: Run, section: RankSection) -> Run:
    """Rank and report again with another k or transform; scores nothing. Raises ArtifactError, InputError."""
    run = run.with_rank(section)
    finish(run)
    return run


def finish(run: Run) -> None:
    """What comes after the last score: rank, report, seal."""
    rank(run)
    report(run)
    run.seal()


def _needs_ray(run: Run) -> bool:
    """Whether anything is left that workers must do; a finished run needs no cluster."""
    return len(run.committed_queries()) < len(run.query_ids) or len(run.committed_ids()) < len(run.shards)
