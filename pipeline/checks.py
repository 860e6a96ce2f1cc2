"""What is compared of a run's objects with what its commits, and the objects themselves, say of them.

Reads: everything in the run's folder. Writes: nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from . import forecast, storage
from .artifacts import BETWEEN_LOOKS_S, CALIBRATION, CHOICE, Run, counterparts_digest
from .calibration import Way
from .ensemble import member_name, members_of, number_of_members
from .errors import ArtifactError, ForeignError, InputError
from .folder import PAGE_COMMENT, digest_line_problem, partition
from .frozen import REEXTEND, REFREEZE, addition_path, addition_tables, read_addition, read_spec_bytes
from .picture import png_problem
from .storage import Stored
from .works import Receipt, Work, work_name

_Read = TypeVar("_Read")
_PAGES = re.compile(r"report/(index\.html|tokens-[^/]+\.html|contact_sheet\.png)")
"""What a run writes there; the rest is the judge's, or somebody's own."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Args:
        path: Object in the run's folder.
        what: What is wrong with it.
        commit: The commit to delete so that the next start makes it anew; null where that does not help.
        stray: Whether it is to be deleted itself: rows of a shard whose commit does not name them, or a forecast.
        hint: What to do about it where neither helps.
    """

    path: str
    what: str
    commit: str | None = None
    stray: bool = False
    hint: str = ""

    @property
    def repair(self) -> str:
        """What repairs it."""
        if self.stray:
            return "`verify --mend` deletes it"
        if self.commit:
            return "`verify --mend`, then the run's command make it anew"
        return self.hint or "nothing makes it anew: put it back from a copy, or start a new run in another folder"


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

    def add(self, receipt: Receipt) -> None:
        """Count a shard's commit."""
        self.rejects += receipt.rejects
        self.rows += receipt.rows
        if receipt.quarantined is not None:
            self.quarantined.append(receipt)


class Look:
    """What is on the store against what should be.

    Args:
        run: The run.
        stored: What its folder holds.
        deep: Whether to compare digests of data, and not sizes alone.
    """

    def __init__(self, run: Run, stored: Mapping[str, Stored], deep: bool) -> None:
        self.run, self.stored, self._deep = run, stored, deep
        self.read_bytes = 0
        self.tensors: dict[str, str] = {}
        self._way: Way | None = None
        with suppress(ArtifactError):  # one that is damaged is found by check_single
            self._way = run.way

    def refresh(self, prefix: str) -> None:
        """List again what lies below a folder; `prefix` is its path and a slash."""
        now = storage.objects(self.run.uri(prefix.rstrip("/")))
        others = {path: each for path, each in self.stored.items() if not path.startswith(prefix)}
        self.stored = {**others, **{f"{prefix}{path}": each for path, each in now.items()}}

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
        if whole and self._way is not None and receipt.counterparts != counterparts_digest(there, self._way):
            yield "was scored under other counterparts than those that are there"

    def wrong(self, path: str, sha256: str | None, size_bytes: int | None, rows: int | None = None) -> Iterator[str]:
        """What is wrong with one object."""
        there = self.stored.get(path)
        if there is None:
            yield "is missing"
        elif size_bytes is not None and there.size_bytes != size_bytes:
            yield f"got {there.size_bytes:,} bytes, expected {size_bytes:,}"
        elif self._deep and sha256 is not None:
            self.read_bytes += there.size_bytes
            try:
                got = storage.file_digest(self.run.uri(path))
            except InputError:  # gone since it was listed
                got = "of nothing"
            if got != sha256:
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


def check_frozen(look: Look, found: Audit) -> set[str]:
    """Paths of what is frozen: compared again, however long ago the run was opened."""
    run, named = look.run, {"run.yaml"}
    _read_own(found, lambda: read_spec_bytes(run.uri()), Finding("run.yaml", "", hint=REFREEZE))
    tables = [(path, sha256, REFREEZE) for path, sha256 in run.resolved.tables.items()]
    for addition in run.additions[1:]:
        described = partial(read_addition, run, addition.number)
        path = addition_path(addition.number)
        named.add(path)
        if (tree := _read_own(found, described, Finding(path, "", hint=REEXTEND))) is not None:
            tables += [(path, sha256, REEXTEND) for path, sha256 in addition_tables(addition.number, tree).items()]
    for path, sha256, hint in tables:
        found.damage += [Finding(path, what, hint=hint) for what in look.wrong(path, sha256, None)]
    return named | {path for path, _, _ in tables}


def check_single(look: Look, found: Audit) -> set[str]:
    """Paths of objects that no commit names: each has a digest of its own."""
    run, named = look.run, {CALIBRATION, CHOICE, forecast.NAME}
    for name in (CALIBRATION, CHOICE):
        _read_own(found, partial(run.measured, name), Finding(name, "", commit=name))
    _read_own(found, lambda: forecast.kept(run), Finding(forecast.NAME, "", stray=True))
    for path in filter(_PAGES.fullmatch, look.stored):
        named.add(path)
        with suppress(InputError):  # gone since it was listed
            data = storage.read_bytes(run.uri(path))
            if problem := png_problem(data) if path.endswith(".png") else digest_line_problem(data, PAGE_COMMENT):
                found.damage.append(Finding(path, problem, stray=True))
    return named


def check_ranking(look: Look, found: Audit) -> set[str]:
    """Paths of the ranking, if there is one."""
    named, damage = _ranking(look)
    if damage:  # perhaps one is being written: its tables are there, and its meta.json follows
        time.sleep(BETWEEN_LOOKS_S)
        look.refresh("topk/")
        named, damage = _ranking(look)
    found.damage += damage
    return named


def _ranking(look: Look) -> tuple[set[str], list[Finding]]:
    meta = "topk/meta.json"
    if meta not in look.stored:
        return set(), []
    try:
        tables = {f"topk/{name}": sha256 for name, sha256 in look.run.ranking()["tables"].items()}
    except (ArtifactError, InputError) as error:
        return {meta}, [Finding(meta, error.message, commit=meta)]
    damage = [Finding(path, what, meta) for path, sha256 in tables.items() for what in look.wrong(path, sha256, None)]
    return {meta, *tables}, damage


def _read_own(found: Audit, read: Callable[[], _Read], otherwise: Finding) -> _Read | None:
    """What an object says that has a digest of its own; null, and a finding, if it is damaged or of another run.

    `otherwise` is the finding, with what to say before the error.
    """
    try:
        return read()
    except (ArtifactError, InputError) as error:
        commit = None if isinstance(error, ForeignError) else otherwise.commit
        found.damage.append(replace(otherwise, what=otherwise.what + error.message, commit=commit))
        return None


def check_counterparts(look: Look, found: Audit, query_ids: Sequence[str]) -> set[str]:
    """Paths of counterparts, and of what a producer found out about the corpus."""
    named: set[str] = set()
    if "fitted/meta.json" in look.stored:
        named |= _check_tensors(look, found, "fitted", look.run.fitted_meta)[0]
    for query_id in query_ids:
        if members_of(look.run):  # what is wrong with theirs is found in them
            with suppress(ArtifactError, InputError):
                look.tensors[query_id] = look.run.counterpart_meta(query_id)["tensors"]["sha256"]
            continue
        folder = f"counterparts/{partition(query_id)}"
        paths, sha256 = _check_tensors(look, found, folder, partial(look.run.counterpart_meta, query_id))
        named |= paths
        if sha256 is not None:
            look.tensors[query_id] = sha256
    return named


def _check_tensors(
    look: Look, found: Audit, folder: str, read_meta: Callable[[], Mapping[str, Any]]
) -> tuple[set[str], str | None]:
    """Paths of a meta.json and the tensors that it commits, and their digest as it says it; null if it is damaged."""
    meta = f"{folder}/meta.json"
    described = _read_own(found, read_meta, Finding(meta, "", commit=meta))
    if described is None:
        return {meta}, None
    written = described["tensors"]
    tensors = f"{folder}/{written['name']}"
    found.damage += [Finding(tensors, what, meta) for what in look.wrong(tensors, written["sha256"], written["bytes"])]
    return {meta, tensors}, written["sha256"]


def check_seal(look: Look, found: Audit) -> None:
    """See whether _SUCCESS stands, and for what."""
    run, stored = look.run, look.stored
    found.sealed = bool(_read_own(found, run.is_sealed, Finding("_SUCCESS", "cannot be read: ", commit="_SUCCESS")))
    commits = sum(path.startswith("commits/") and path.endswith(".json") for path in stored)  # as of the same moment
    if "_SUCCESS" in stored and len(members_of(run)) < (wanted := number_of_members(run)):
        missing = f"stands, but of {wanted} members {member_name(len(members_of(run)))} is gone"
        found.damage.append(Finding("_SUCCESS", missing, "_SUCCESS"))
    if "_SUCCESS" in stored and commits < found.works:
        missing = f"stands, but {found.works - commits:,} shards have no commit"
        found.damage.append(Finding("_SUCCESS", missing, "_SUCCESS"))
