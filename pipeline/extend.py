"""Growth of a finished run: new queries, or newly arrived corpus files, checked and frozen as an addition.

Reads: the run, the new files.
Writes: additions/NNNN/, with addition.json last.
Resumes: the same call again adds nothing.
Next: tune.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from . import storage
from .artifacts import Run
from .corpus import Corpus
from .digests import addition_digests, as_frozen, queries_digest
from .errors import ArtifactError, InputError, SpecError
from .extensions import load_task
from .freeze import query_ids_of, require_apart, require_same_files
from .frozen import create_addition, open_alone, open_run
from .observe import say
from .plan import added_fingerprint, make_shards
from .queries import checked_queries, require_enough_rows
from .works import Addition, Manifest


def extend(run_uri: str, queries_uri: str | None, corpus_uri: str | None) -> Run:
    """Add queries, or newly arrived corpus files, to a finished run; the run with its addition, to be tuned and scored.

    Files that the run knows are passed over, and so are queries that were added before with the same contents: the same call
    again adds nothing. The seal goes before the addition comes, so that it never stands for less than all of the run.

    Raises:
        SpecError: The new files are in the run's folder, or it is in theirs.
        ArtifactError: The run is not finished, or a file of it changed.
        InputError: The new queries or files are malformed, or bring ids that the run has already.
    """
    require_apart(run_uri, {"corpus": corpus_uri, "queries": queries_uri})
    run, damage = _open_to_extend(run_uri)
    queries, queries_digest = _new_queries(run, queries_uri) if queries_uri else (None, None)
    shards = _new_shards(run, corpus_uri) if corpus_uri else Manifest.of([])
    if queries is None and not len(shards):
        run = (
            run if damage is None else open_alone(run_uri)
        )  # whole, if the damage is a member's, which is made whole later
        say(f"{run.uri()} has all of that already")
        return run
    if not run.is_sealed():  # or it was, and a call of this that added nothing took the seal away
        _require_finished(run)
    addition = _addition(run, queries, queries_digest, shards, corpus_uri)
    if damage is not None and run.has_commits(addition) is False:
        raise damage
    storage.remove(run.uri("_SUCCESS"))
    create_addition(run, addition, shards, queries)
    say(f"added {len(addition.query_ids)} queries and {shards.rows:,} training examples in {len(shards)} shards")
    return open_run(run_uri) if damage is None else open_alone(run_uri)


def _open_to_extend(run_uri: str) -> tuple[Run, ArtifactError | None]:
    """A run, or, where an addition to it is damaged, the run as it was before that, and the damage."""
    try:
        return open_run(run_uri), None
    except ArtifactError as damage:
        return open_alone(run_uri, before_damage=True), damage


def _addition(
    run: Run, queries: pa.Table | None, queries_digest: str | None, shards: Manifest, corpus_uri: str | None
) -> Addition:
    """What is added, with its fingerprint. Raises InputError: an id comes twice."""
    both = pa.concat_tables([run.shards.table.replace_schema_metadata(None), shards.table])
    if len(shards):
        Corpus(run.spec.corpus).check_ids(Manifest(both))
    digests = addition_digests(run.spec, list(shards), queries_digest)
    return Addition(
        number=len(run.additions),
        fingerprint=added_fingerprint(run.additions[-1].fingerprint, digests),
        first_shard=len(run.shards),
        stop_shard=len(both),
        query_ids=query_ids_of(queries) if queries is not None else (),
        corpus_uri=storage.absolute(corpus_uri) if corpus_uri and len(shards) else None,
        queries_digest=queries_digest,
    )


def _require_finished(run: Run) -> None:
    """See that all of a run is scored. Raises ArtifactError, InputError."""
    try:
        rejects = sum(receipt.rejects for receipt in run.complete_receipts(grown=True))
    except ArtifactError as error:
        raise ArtifactError(error.message, f"only a finished run grows: `mirrorscope status {run.uri()}`") from error
    run.require_few_rejects(rejects)


def _new_queries(run: Run, uri: str) -> tuple[pa.Table | None, str | None]:
    """Rows of queries to add and the digest of their files; nothing for what was added before."""
    if run.spec.queries is None:
        raise SpecError(f"{run.uri()} has no queries: producer {run.spec.producer.implementation} tunes on none")
    section = run.spec.queries.model_copy(update={"uri": uri, "format": "auto"})
    digest = queries_digest(section, run.spec.corpus.classes)
    if digest in {run.resolved.digests["queries"], *(addition.queries_digest for addition in run.additions)}:
        return None, None
    with as_frozen(run):
        queries = checked_queries(section, run.columns, run.spec.corpus.classes, load_task(run.spec.task))
    require_enough_rows(queries, run.spec.producer)
    if known := [query_id for query_id in query_ids_of(queries) if query_id in run.query_ids]:
        raise InputError(
            f"{uri}: {len(known)} query ids are in the run already, first {known[0]!r}",
            "give new queries ids of their own",
        )
    return queries, digest


def _new_shards(run: Run, uri: str) -> Manifest:
    """Shards of the files that the run does not have yet."""
    require_same_files(run)
    corpus = Corpus(run.spec.corpus.model_copy(update={"uri": uri}))
    known = set(pc.unique(run.shards.table["path"]).to_pylist())
    files = [file for file in corpus.survey_files() if file.path not in known]
    assert run.spec.score.shard_rows is not None
    if not files:
        return Manifest.of([])
    measured = [one for one in corpus.measure(files, run.columns, may_be_empty=True) if one.rows]
    return Manifest.of(make_shards(measured, run.spec.score.shard_rows, first=len(run.shards)))
