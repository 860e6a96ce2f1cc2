"""Is a run what its commits say? Told from the objects alone; what is damaged can be mended, what nobody names removed.

Reads: everything in the run's folder.
Writes: nothing; `mend` deletes the commit of what is damaged, `collect` deletes orphans.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from . import storage
from .artifacts import READ_AT_ONCE, Run, counterparts_digest
from .ensemble import member_name, members_of, number_of_members
from .errors import ArtifactError, ForeignError, InputError
from .folder import parallel, partition
from .frozen import frozen_objects
from .observe import Progress, say
from .storage import Stored
from .works import Receipt, Work, work_name

RECHECK_BYTES = 1 << 30
"""Up to so much, a start reads again all that is committed; beyond, it looks at sizes and leaves the rest to `verify`."""
_DATA = ("scores/", "partials/", "rejects/", "counterparts/", "fitted/")
_OURS = (*_DATA, "commits/", "additions/", ".train-", ".probe-")
"""Where something that nobody names is a leaving of ours; what else lies in the folder is somebody's own."""
_TEMPORARY = re.compile(r"(?:(?:topk|report|lake)/)?\.[^/]+\.[0-9a-f]{32}\.tmp")
_ROWS = re.compile(r"(?:scores/[^/]+|rejects)/(shard-\d+(?:-addition-\d+)?)(?:-quarantined)?\.parquet")


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Args:
        path: Object in the run's folder.
        what: What is wrong with it.
        commit: The commit to delete so that the next start makes it anew; null where that does not help.
        stray: Whether it is rows of a shard whose commit does not name them: to be deleted itself.
    """

    path: str
    what: str
    commit: str | None = None
    stray: bool = False


@dataclass
class Audit:
    """What was found.

    Args:
        works: Shards to score, those of additions again under their queries.
        commits: Shards that are committed.
        counterparts: Counterparts that are committed.
        rows: Score rows per query set, as the commits say.
        rejects: Rows in rejects/.
        quarantined: Commits of quarantined shards.
        objects: Objects that commits name.
        read_bytes: Bytes read to compare digests; 0 if only sizes were compared.
        sealed: Whether _SUCCESS stands for all of the run.
        damage: What is not as it should be.
        orphans: Objects that nobody names, with size and time.
    """

    works: int
    commits: int = 0
    counterparts: int = 0
    rows: int = 0
    rejects: int = 0
    objects: int = 0
    read_bytes: int = 0
    sealed: bool = False
    damage: list[Finding] = field(default_factory=list)
    quarantined: list[Receipt] = field(default_factory=list)
    orphans: dict[str, Stored] = field(default_factory=dict)


def audit(run: Run, read_at_most: float = float("inf"), shown: bool = True) -> Audit:
    """Compare a run's objects with its manifest and commits.

    Args:
        run: The run.
        read_at_most: With more bytes of data than this, objects are compared by size instead of by digest.
        shown: Shows progress.

    Raises:
        StorageError: The store refused.
    """
    committed, made = run.committed(), run.committed_queries()
    stored = storage.objects(run.uri())  # after the commits: all that they name is there to be seen
    data_bytes = sum(each.size_bytes for path, each in stored.items() if path.startswith(_DATA))
    look = _Look(run, stored, deep=data_bytes <= read_at_most)
    found = Audit(works=run.number_of_works, commits=len(committed), counterparts=len(made))
    named = _check_frozen(look, found)
    if "fitted/meta.json" in stored:  # what a producer found out about the corpus
        named |= _check_tensors(look, found, "fitted", run.fitted_meta)[0]
    for query_id in sorted(made):
        named |= _of_members(look, query_id) if members_of(run) else _check_counterpart(look, found, query_id)
    read: set[str] = set()
    progress = Progress("check", len(committed), "shards", shown=shown)
    with progress:
        for some in _some_at_once(sorted(committed)):
            for paths, findings, receipt in parallel(lambda key: look.commit(*key), some):
                named |= paths
                found.damage += findings
                if receipt is not None:
                    read.add(receipt.name)
                    _add(found, run, receipt)
                progress.advance(receipt.rows if receipt is not None else 0)
    named |= _check_ranking(look, found)
    found.objects, found.read_bytes = len(named & stored.keys()), look.read_bytes
    _check_seal(run, stored, found)
    nobodys = {path: each for path, each in stored.items() if path not in named}
    found.orphans = {
        path: each for path, each in nobodys.items() if path.startswith(_OURS) or _TEMPORARY.fullmatch(path)
    }
    for path in found.orphans:  # of a shard that is committed: who reads the folder would count its rows twice
        if (rows := _ROWS.fullmatch(path)) and rows[1] in read:
            found.damage.append(Finding(path, "is not named by the shard's commit", stray=True))
    return found


def mend(run: Run) -> None:
    """See at a start that what is committed is whole, and void what is not, so that it is made anew.

    Quarantined shards are tried again, unless the spec tolerates them.

    Raises:
        ArtifactError: Something is wrong that making anew does not mend.
    """
    if not run.committed_queries() and not run.committed():
        return
    found = audit(run, RECHECK_BYTES, shown=False)
    void(run, found.damage)
    if run.is_tolerable(found.rejects):
        return
    for receipt in found.quarantined:
        say(f"{receipt.name} was quarantined before ({receipt.quarantined}); it is tried again")
    _forget(run, found.quarantined)
    names = [(receipt.addition, receipt.shard_id) for receipt in found.quarantined]
    for member in members_of(run):  # each alone may tolerate what all together are too many of
        standing = parallel(lambda name: member.standing(*name), names)  # noqa: B023  done before the next member
        _forget(member, [receipt for receipt in standing if receipt is not None and receipt.quarantined is not None])


def _forget(run: Run, quarantined: Sequence[Receipt]) -> None:
    """Delete commits of quarantined shards, and what they name: their rows are no rejects any more."""
    run.void([f"commits/{receipt.name}.json" for receipt in quarantined])
    rejects = [path for receipt in quarantined for path in receipt.files]
    parallel(lambda path: storage.remove(run.uri(path)), rejects)


def require_mendable(run: Run, damage: Sequence[Finding]) -> None:
    """See that making anew mends what is damaged. Raises ArtifactError."""
    if hopeless := [finding for finding in damage if finding.commit is None and not finding.stray]:
        raise ArtifactError(
            f"{run.uri(hopeless[0].path)}: {hopeless[0].what}"
            + (f", and {len(hopeless) - 1} more like it" if len(hopeless) > 1 else ""),
            "`mirrorscope verify` lists all of it",
        )


def void(run: Run, damage: Sequence[Finding]) -> None:
    """Delete commits of what is damaged, and strays. Raises ArtifactError for what this does not mend; deletes nothing then."""
    require_mendable(run, damage)
    for finding in damage:
        say(f"warning: {run.uri(finding.path)}: {finding.what}; it is {'deleted' if finding.stray else 'made anew'}")
    parallel(lambda path: storage.remove(run.uri(path)), [finding.path for finding in damage if finding.stray])
    run.void(list(dict.fromkeys(finding.commit for finding in damage if finding.commit)))


def collect(run: Run, older_than_s: float, dry: bool = False) -> dict[str, Stored]:
    """Delete objects that nobody names and that are older than that; what was (or would be) deleted.

    Young ones may belong to a worker that has not committed yet. Raises ArtifactError for a damaged run: deletes nothing then.
    """
    found = audit(run, read_at_most=-1)
    if damage := [finding for finding in found.damage if not finding.stray]:
        raise ArtifactError(f"{run.uri()}: {len(damage)} things are damaged", "mend it first: see `mirrorscope verify`")
    before_s = time.time() - older_than_s
    old = {path: each for path, each in found.orphans.items() if each.modified_s <= before_s}
    if not dry:
        parallel(lambda path: storage.remove(run.uri(path)), list(old))
    return old


class _Look:
    """What is on the store against what should be."""

    def __init__(self, run: Run, stored: dict[str, Stored], deep: bool) -> None:
        self.run, self._stored, self._deep = run, stored, deep
        self.read_bytes, self.way = 0, run.way
        self.tensors: dict[str, str] = {}

    def commit(self, addition: int, shard_id: int) -> tuple[set[str], list[Finding], Receipt | None]:
        """Paths that a shard's commit names (its own too), what is wrong with them, and the commit if it can be used."""
        path = f"commits/{work_name(addition, shard_id)}.json"
        try:
            receipt = self.run.receipt(addition, shard_id)
            work = self.run.work(addition, shard_id)
        except (ArtifactError, InputError) as error:
            foreign = isinstance(error, ForeignError)
            return {path}, [Finding(path, error.message, commit=None if foreign else path)], None
        except IndexError:
            return {path}, [Finding(path, "the manifest has no such shard")], None
        findings = [
            Finding(path, what, path) for what in (*_wrong_counts(receipt, work), *self._wrong_models(receipt, work))
        ]
        for name, written in receipt.files.items():
            expected_rows = receipt.rejects if name.startswith("rejects/") else receipt.rows
            rows = expected_rows if name.startswith(("rejects/", "scores/")) else None
            findings += [
                Finding(name, what, path) for what in self.wrong(name, written["sha256"], written["bytes"], rows)
            ]
        return {path, *receipt.files}, findings, receipt

    def _wrong_models(self, receipt: Receipt, work: Work) -> Iterator[str]:
        there = [self.tensors[query_id] for query_id in work.query_ids if query_id in self.tensors]
        whole = len(there) == len(work.query_ids) and receipt.quarantined is None
        if whole and receipt.counterparts != counterparts_digest(there, self.way):
            yield "was scored under other counterparts than those that are there"

    def wrong(self, path: str, sha256: str | None, size_bytes: int | None, rows: int | None = None) -> Iterator[str]:
        """What is wrong with one object."""
        there = self._stored.get(path)
        if there is None:
            yield "is missing"
        elif size_bytes is not None and there.size_bytes != size_bytes:
            yield f"got {there.size_bytes:,} bytes, expected {size_bytes:,}"
        elif self._deep and sha256 is not None:
            self.read_bytes += there.size_bytes
            if (got := storage.file_digest(self.run.uri(path))) != sha256:
                yield f"got sha256 {got}, expected {sha256}"
            elif rows is not None and (got_rows := self._rows(path)) != rows:
                yield f"got {got_rows} rows, expected {rows:,}"

    def _rows(self, path: str) -> int | str:
        try:
            with storage.reading(self.run.uri(path)) as source:
                return int(pq.read_metadata(source).num_rows)
        except (pa.ArrowInvalid, OSError) as error:
            return f"no Parquet ({error})"


def _wrong_counts(receipt: Receipt, work: Work) -> Iterator[str]:
    if receipt.rows + receipt.rejects != work.shard.rows:
        yield f"{receipt.rows:,} scored + {receipt.rejects:,} rejected rows, expected {work.shard.rows:,}"
    wanted = {receipt.rejects_path} if receipt.rejects else set()
    if not receipt.quarantined:
        wanted |= {f"scores/{partition(query_id)}/{work.name}.parquet" for query_id in work.query_ids}
        wanted.add(f"partials/topk/{receipt.partial}")
    if missing := sorted(wanted - set(receipt.files)):
        yield f"names no {missing[0]}"


def _check_frozen(look: _Look, found: Audit) -> set[str]:
    """Paths of what is frozen."""
    frozen = frozen_objects(look.run)
    for path, sha256 in frozen.items():
        found.damage += [Finding(path, what) for what in look.wrong(path, sha256, None)]
    return set(frozen)


def _check_ranking(look: _Look, found: Audit) -> set[str]:
    """Paths of the ranking, if there is one."""
    meta = "topk/meta.json"
    try:
        tables = look.run.ranking()["tables"]
    except InputError:
        return set()
    except ArtifactError as error:
        found.damage.append(Finding(meta, error.message, meta))
        return {meta}
    for name, sha256 in tables.items():
        found.damage += [Finding(f"topk/{name}", what, meta) for what in look.wrong(f"topk/{name}", sha256, None)]
    return {meta, *(f"topk/{name}" for name in tables)}


def _check_counterpart(look: _Look, found: Audit, query_id: str) -> set[str]:
    """Paths of a counterpart."""
    folder = f"counterparts/{partition(query_id)}"
    paths, sha256 = _check_tensors(look, found, folder, lambda: look.run.counterpart_meta(query_id))
    if sha256 is not None:
        look.tensors[query_id] = sha256
    return paths


def _of_members(look: _Look, query_id: str) -> set[str]:
    """Take note of what an ensemble's members have of a query; what is wrong with it is found in them."""
    with suppress(ArtifactError, InputError):
        look.tensors[query_id] = look.run.counterpart_meta(query_id)["tensors"]["sha256"]
    return set()


def _check_tensors(
    look: _Look, found: Audit, folder: str, read_meta: Callable[[], Mapping[str, Any]]
) -> tuple[set[str], str | None]:
    """Paths of a meta.json and the tensors that it commits, and their digest as it says it; null if it is damaged."""
    meta = f"{folder}/meta.json"
    try:
        written = read_meta()["tensors"]
    except ArtifactError as error:
        foreign = isinstance(error, ForeignError)
        found.damage.append(Finding(meta, error.message, commit=None if foreign else meta))
        return {meta}, None
    tensors = f"{folder}/{written['name']}"
    found.damage += [Finding(tensors, what, meta) for what in look.wrong(tensors, written["sha256"], written["bytes"])]
    return {meta, tensors}, written["sha256"]


def _check_seal(run: Run, stored: dict[str, Stored], found: Audit) -> None:
    try:
        found.sealed = run.is_sealed()
    except ArtifactError as error:
        found.damage.append(Finding("_SUCCESS", f"cannot be read: {error}", "_SUCCESS"))
        return
    commits = sum(path.startswith("commits/") and path.endswith(".json") for path in stored)  # as of the same moment
    if "_SUCCESS" in stored and len(members_of(run)) < (wanted := number_of_members(run)):
        missing = f"stands, but of {wanted} members {member_name(len(members_of(run)))} is gone"
        found.damage.append(Finding("_SUCCESS", missing, "_SUCCESS"))
    if "_SUCCESS" in stored and commits < found.works:
        missing = f"stands, but {found.works - commits:,} shards have no commit"
        found.damage.append(Finding("_SUCCESS", missing, "_SUCCESS"))


def _add(found: Audit, run: Run, receipt: Receipt) -> None:
    found.rejects += receipt.rejects
    found.rows += receipt.rows
    if receipt.quarantined is not None:
        found.quarantined.append(receipt)


def _some_at_once(keys: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    todo = iter(keys)
    while some := list(islice(todo, READ_AT_ONCE)):
        yield some
