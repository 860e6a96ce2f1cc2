"""Stage 0: check everything that can be checked before work, and freeze it.

Reads: the spec, corpus files, query files, the weights' digest.
Writes: manifest.parquet, queries.parquet, and run.yaml last.
Resumes: an existing run is opened; any change of what decides its scores is refused, naming the field or the file.
Next: tune.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from . import storage
from .artifacts import Run
from .base_losses import rows_kept
from .checkpoints import expand
from .corpus import Corpus, payload_names, require_free_names
from .digests import (
    MODEL_URIS,
    input_digests,
    input_files,
    with_absolute_uris,
    without_copies,
)
from .errors import ArtifactError, InputError, SpecError
from .extensions import load_loader, load_producer, load_task, needs_query, sees_corpus
from .folder import partition
from .formats.base import overlap
from .frozen import (
    REFREEZE,
    create_run,
    is_begun,
    is_run,
    open_alone,
    open_run,
    save_spec,
)
from .importing import user_code
from .observe import say
from .plan import Plan, fingerprint, identity, make_plan, make_shards, shard_rows
from .queries import checked_queries, require_enough_rows
from .reader import Reader
from .records import RANKED, stored
from .sections import Section
from .spec import Member, Resolved, Spec
from .specfile import changed_fields
from .topk import require_fitting
from .versions import versions, warn_of_changes
from .works import Addition, Manifest

MAX_CHANGES_SHOWN = 8
MAX_NAME_CHARS = 255


def freeze(spec: Spec) -> Run:
    """Open the run that a spec describes, making it on the first start.

    Raises:
        SpecError, InputError, ContractError: The spec or its inputs are wrong; nothing was written.
        ArtifactError: The folder holds a run of another spec, or inputs changed since it was made.
    """
    replaced = is_run(storage.absolute(spec.run.uri))
    run, resumed = _open_or_survey(spec)
    if not resumed:
        Corpus(run.spec.corpus).check_ids(run.shards)
        faster = is_begun(run.uri()) if replaced else is_run(run.uri())
        created = None if faster else create_run(run)
        if created is None:  # another driver was faster: the run is what it froze
            return _reopen(spec)
        say(
            f"froze {run.rows:,} training examples in {len(run.shards)} shards, {len(run.query_ids)} queries: {run.uri()}"
        )
        # Where run.yaml was lost and is written again, additions are there already.
        run = open_alone(run.uri()) if storage.names(run.uri("additions")) else created
    return run


def survey(spec: Spec) -> tuple[Run, Plan]:
    """What `freeze` would make and the stages would do; writes nothing. Raises as `freeze` does."""
    run, _ = _open_or_survey(spec)
    return run, make_plan(run.spec, run.shards, run.query_ids, len(run.queries), rows_kept(run))


def _open_or_survey(spec: Spec) -> tuple[Run, bool]:
    """The run of a spec, and whether it was there before.

    A run that has committed nothing yet makes way for another spec, so that a mended one can have its folder.
    """
    if spec.rank.transform == "counterpart_loss":
        require_fitting(spec.rank.transform, load_producer(spec.producer).direction)
    require_apart(
        spec.run.uri, {"corpus.uri": spec.corpus.uri, "queries.uri": spec.queries.uri if spec.queries else None}
    )
    run, run_uri = None, storage.absolute(spec.run.uri)
    if is_run(run_uri):
        try:
            run = _reopen(spec)
        except ArtifactError:
            if is_begun(run_uri):
                raise
    resumed = run is not None
    if run is None:
        run = _survey(spec)
        if run.has_commits() is False:
            raise ArtifactError(
                f"{run_uri} holds what another spec made, and no run.yaml of it that is whole", REFREEZE
            )
    taken = {*RANKED.names, *stored(RANKED, run.per_token).names}
    require_free_names(payload_names(run.spec.corpus, run.columns), taken)
    return run, resumed


def _survey(spec: Spec) -> Run:
    """The run that a spec describes, from its inputs alone."""
    with user_code(f"task: {spec.task.implementation}"):
        task = load_task(spec.task)
        columns = task.columns()
    _require_fitting_producer(spec)
    load_loader(spec.model)
    members, found = expand(spec, {})
    corpus = Corpus(spec.corpus)
    measured = corpus.measure(corpus.survey_files(), columns)
    if spec.queries is None:
        queries = pa.table({"query_id": [spec.producer.implementation]})
    else:
        queries = checked_queries(spec.queries, columns, corpus.resolved.classes, task)
        require_enough_rows(queries, spec.producer)
    query_ids = query_ids_of(queries)
    rows_each = shard_rows(spec, sum(one.rows for one in measured), columns)
    shards = make_shards(measured, rows_each)
    resolved = _resolve(spec, corpus, rows_each, members)
    resolved, files, found = without_copies(resolved, input_files(resolved), found)
    digests = input_digests(resolved, shards, files)
    _require_same_inputs(spec, digests)
    frozen = Resolved(
        fingerprint=fingerprint(resolved, digests),
        digests=digests,
        files=files,
        found=found,
        chosen=spec.resolved.chosen if spec.resolved else {},
        versions=versions(),
    )
    resolved = resolved.model_copy(update={"resolved": frozen})
    first = Addition(0, frozen.fingerprint, 0, len(shards), query_ids)
    return Run(resolved, Manifest.of(shards), tuple(columns), queries, (first,))


def require_apart(run_uri: str, inputs: Mapping[str, str | None]) -> None:
    """See that no input takes in the run's own files, or lies among them. Raises SpecError."""
    for field, uri in inputs.items():
        if uri is not None and overlap(uri, run_uri):
            raise SpecError(
                f"run.uri: {run_uri} and {field} {uri} are in one another: the run's own files would be read as rows",
                "give the run a folder of its own, beside its inputs",
            )


def _require_fitting_producer(spec: Spec) -> None:
    """See that the producer gets queries if it tunes on them, else none, and workers as it can use them. Raises SpecError."""
    needed, name = needs_query(load_producer(spec.producer)), spec.producer.implementation
    if needed and spec.queries is None:
        raise SpecError(f"queries: missing; producer {name} tunes on them", "name a file of rows to ask about")
    if sees_corpus(load_producer(spec.producer)) and spec.resources.tune.shard:
        raise SpecError(
            f"resources.tune.shard: producer {name} sees a sample of the corpus, and every worker must hold the whole model",
            "leave shard out; workers share out the sample or the queries anyway",
        )
    if not needed and spec.queries is not None:
        raise SpecError(f"queries: producer {name} tunes on none: it makes one counterpart", "leave the section out")


def query_ids_of(queries: pa.Table) -> tuple[str, ...]:
    """Queries in order of first appearance. Raises InputError for an id that cannot name a folder."""
    query_ids = tuple(dict.fromkeys(queries["query_id"].to_pylist()))
    for query_id in query_ids:
        if not query_id or len(partition(query_id)) > MAX_NAME_CHARS:
            raise InputError(
                f"query_id {query_id!r}: got {len(query_id)} characters, expected 1 or more, and a folder name of at most "
                f"{MAX_NAME_CHARS} (it would be {partition(query_id)[:40]}...)"
            )
    return query_ids


def _resolve(spec: Spec, corpus: Corpus, rows_each: int, members: list[Member]) -> Spec:
    """The spec with nothing left to find out: absolute URIs, formats, classes, shard size."""
    kept = spec.score.base_losses
    update: dict[str, Section] = {
        "run": spec.run.model_copy(update={"uri": storage.absolute(spec.run.uri)}),
        "corpus": corpus.resolved,
        "score": spec.score.model_copy(
            update={"shard_rows": rows_each, "base_losses": kept and storage.absolute(kept)}
        ),
    }
    if (curvatures := getattr(spec.producer, "curvatures", None)) is not None:
        update["producer"] = spec.producer.model_copy(update={"curvatures": storage.absolute(curvatures)})
    if queries := spec.queries:
        queries_format = Reader(queries.uri, queries.format, corpus.resolved.classes).name
        found = {"uri": storage.absolute(queries.uri), "format": queries_format}
        update["queries"] = queries.model_copy(update=found)
    for section in MODEL_URIS:
        update[section] = with_absolute_uris(section, getattr(spec, section))
    return spec.model_copy(update={**update, "ensemble": members})


def _require_same_inputs(spec: Spec, digests: dict[str, str]) -> None:
    """A spec that was resolved before runs again only on the same inputs. Raises ArtifactError."""
    if spec.resolved is None:
        return
    changed = [name for name, digest in spec.resolved.digests.items() if digests.get(name) != digest]
    if changed:
        raise ArtifactError(
            f"the spec was resolved with other inputs: {', '.join(sorted(changed))} changed since",
            "put them back, or delete the section `resolved` to run on what is there now",
        )


def _reopen(spec: Spec) -> Run:
    """The run in the folder, if the spec and its inputs are those it was made with; else ArtifactError."""
    run = open_run(spec.run.uri)
    if new := require_same_files(run):
        say(f"warning: {new} is new in the corpus and no part of {run.uri()}: `mirrorscope extend` adds what is new")
    classes = spec.corpus.classes or run.spec.corpus.classes  # the files are the same: so are the classes found in them
    corpus = Corpus(spec.corpus.model_copy(update={"classes": classes}))
    rows_each = spec.score.shard_rows or run.spec.score.shard_rows
    assert rows_each is not None
    members, _ = expand(spec, run.resolved.found)
    wanted = _resolve(spec, corpus, rows_each, members)
    digests = input_digests(wanted, run.shards[: run.additions[0].stop_shard], input_files(wanted))
    changes = changed_fields(identity(run.spec), identity(wanted))
    changes += [
        f"{name}: the file's contents" for name, old in run.resolved.digests.items() if digests.get(name) != old
    ]
    if changes:
        shown = "\n".join(f"  {change}" for change in changes[:MAX_CHANGES_SHOWN])
        raise ArtifactError(
            f"{run.uri()} was made by another spec:\n{shown}",
            "use another run.uri for the changed spec, or undo the change",
        )
    warn_of_changes(run, spec)
    spec_now = wanted.model_copy(update={"resolved": run.spec.resolved})
    run_now = replace(run, spec=spec_now)
    if spec_now != run.spec:  # fields that move no score: how many workers, how deep to rank
        save_spec(run_now)
    return run_now


def require_same_files(run: Run) -> str | None:
    """See that the files of a run are what they were; one that is new, if there is any. Raises ArtifactError."""
    corpora = [Corpus(run.spec.corpus.model_copy(update={"uri": uri})) for uri in _corpus_uris(run)]
    corpus = corpora[0]
    files = {file.path: file for one in corpora for file in one.list_files()}
    frozen = {shard.path: (shard.size_bytes, shard.version) for shard in run.shards}
    now = {path: (file.size_bytes, file.version) for path, file in files.items()}
    strangers = [file for path, file in files.items() if path not in frozen]  # new, or without rows then as now
    changes = [f"{path}: gone" for path in frozen if path not in now]
    changes += [
        f"{path}: {now[path][0]:,} bytes of version {now[path][1]}, frozen with {frozen[path][0]:,} of {frozen[path][1]}"
        for path in frozen
        if path in now and now[path] != frozen[path]
    ]
    if changes:
        shown = "\n".join(f"  {change}" for change in changes[:MAX_CHANGES_SHOWN])
        raise ArtifactError(
            f"the corpus changed since {run.uri()} was frozen:\n{shown}",
            "put the files back, or start a new run in another folder",
        )
    return next((file.path for file in strangers if corpus.rows(file)), None)


def _corpus_uris(run: Run) -> list[str]:
    """Where files of the run's corpus are, its additions' too."""
    added = [addition.corpus_uri for addition in run.additions if addition.corpus_uri is not None]
    return list(dict.fromkeys([run.spec.corpus.uri, *added]))
