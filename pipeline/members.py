"""The members of an ensemble as runs: made of what it froze, grown as it grew, and held against it.

An ensemble's manifest, queries and additions are copied, not found again: whatever arrives in the corpus's folder in between,
all members are asked the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from . import storage
from .artifacts import Run
from .digests import addition_digests, member_digest
from .ensemble import Ensemble, ensemble_of, member_name, member_spec, number_of_members
from .errors import ArtifactError, PipelineError
from .frozen import create_addition, create_run, is_begun, is_run, open_alone, save_spec
from .plan import added_fingerprint, fingerprint
from .spec import Resolved, Spec

_Value = TypeVar("_Value")


def gathered(run: Run) -> Run:
    """A frozen run with its members, frozen and grown as it is, where it is an ensemble; an ordinary run as it is.

    Raises:
        ArtifactError: A member's folder holds another run, or one that grew apart from the ensemble.
    """
    if not run.spec.ensemble:
        return run
    ensemble = ensemble_of(run)
    members = []
    for place in range(number_of_members(ensemble)):
        with errors_name_it(ensemble, place):
            members.append(_member(ensemble, place))
    return replace(ensemble, members=tuple(members))


@contextmanager
def errors_name_it(run: Ensemble, place: int) -> Iterator[None]:
    """Whatever goes wrong in the block is said to have gone wrong with that member."""
    try:
        yield
    except PipelineError as error:
        raise type(error)(f"{run.named(place)}: {error.message}", error.hint) from error


def _member(run: Ensemble, place: int) -> Run:
    """One member, up to date."""
    spec = _resolved(run, place)
    uri = spec.run.uri
    # An addition that is damaged is written again below.
    member = open_alone(uri, before_damage=True) if is_run(uri) else None
    if member is not None and not _is_same(member, spec) and not is_begun(uri):
        member = None  # makes way, as it does for a run's mended spec
    if member is None:
        first = replace(run.additions[0], fingerprint=_fingerprint(spec))
        create_run(Run(spec, run.shards[: first.stop_shard], run.columns, _queries(run, 0), (first,)))
        member = open_alone(uri, before_damage=True)  # another driver may have been faster
    if not _is_same(member, spec):
        raise ArtifactError(
            f"{uri} holds another run: fingerprint {member.resolved.fingerprint}, expected {_fingerprint(spec)}",
            "use another run.uri for the ensemble, or delete that folder",
        )
    now = spec.model_copy(update={"resolved": member.spec.resolved})
    if now != member.spec:  # fields that move no score
        member = replace(member, spec=now)
        save_spec(member)
    return _grown(run, member)


def _resolved(run: Ensemble, place: int) -> Spec:
    """A member's spec with its part of what the ensemble was resolved with."""
    spec = member_spec(run.spec, place)
    digests, files = _of_member(run.resolved.digests, place), _of_member(run.resolved.files, place)
    mark, versions = fingerprint(spec, digests), run.resolved.versions
    chosen = {"": of_it} if (of_it := run.resolved.chosen.get(member_name(place))) else {}
    resolved = Resolved(fingerprint=mark, digests=digests, files=files, chosen=chosen, versions=versions)
    return spec.model_copy(update={"resolved": resolved})


def _of_member(every: Mapping[str, _Value], place: int) -> dict[str, _Value]:
    """What an ensemble was frozen with, by its names, as a member was."""
    common = {name: value for name, value in every.items() if not name.startswith("ensemble.")}
    return {**common, "weights": every[member_digest(place)]}


def _fingerprint(spec: Spec) -> str:
    assert spec.resolved is not None
    return spec.resolved.fingerprint


def _is_same(member: Run, spec: Spec) -> bool:
    return member.resolved.fingerprint == _fingerprint(spec)


def _grown(run: Ensemble, member: Run) -> Run:
    """A member with all additions of its ensemble. Raises ArtifactError if it has others, or other files or queries."""
    for addition in run.additions[len(member.additions) :]:
        shards = run.shards[addition.first_shard : addition.stop_shard]
        digests = addition_digests(run.spec, list(shards), addition.queries_digest)
        mark = added_fingerprint(member.additions[-1].fingerprint, digests)
        storage.remove(member.uri("_SUCCESS"))
        queries = _queries(run, addition.number) if addition.query_ids else None
        create_addition(member, replace(addition, fingerprint=mark), shards, queries)
        member = open_alone(member.uri(), before_damage=True)
    for what, theirs, ours in (
        ("corpus", member.shards, run.shards),
        ("queries", member.query_ids, run.query_ids),
        ("query rows", *([each.queries_digest for each in one.additions] for one in (member, run))),
    ):
        if theirs != ours:
            raise ArtifactError(
                f"{member.uri()} and its ensemble are not asked the same: other {what}",
                "was it extended by itself? Extend the ensemble by the same, in the same order; or begin anew in another run.uri",
            )
    return member


def _queries(run: Run, addition: int) -> pa.Table:
    """The query rows of one addition."""
    wanted = pa.array(run.additions[addition].query_ids, pa.string())
    return run.queries.filter(pc.is_in(run.queries["query_id"], wanted))
