"""A run's folder: names of everything in it, whole-object writes, one commit per shard and per counterpart.

Nothing here knows Ray or torch. A stage that is killed leaves either a commit, whose objects are all whole, or no commit,
and then the same names are written again with the same bytes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast, get_args

import pyarrow as pa

from . import storage
from .calibration import MANY, Way
from .errors import ArtifactError, ForeignError, InputError
from .folder import json_bytes, parallel, partition, table_of
from .given import Given
from .works import Addition, Receipt, parse_receipt, work_name

CALIBRATION, CHOICE = "calibration.json", "choice.json"  # how scores are made, and what a producer's budget allows
READ_AT_ONCE = 256
"""Commits read ahead of whoever goes through them: memory is this many, whatever the number of shards."""
COMMIT_NAME = re.compile(r"shard-(\d+)(?:-addition-(\d+))?\.json")
MAX_REJECTS_SHOWN, BETWEEN_LOOKS_S = 3, 0.5
"""Longer than the writing of topk/meta.json behind its tables."""
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class Run(Given):
    """An opened run: what was frozen, and the way to everything in its folder."""

    # --- counterparts ----------------------------------------------------------------------------------------------

    def commit_counterpart(self, query_id: str, tensors: bytes, meta: Mapping[str, Any]) -> None:
        """Write a counterpart's changed tensors (safetensors) under a name of their contents, then meta.json, which commits it.

        The first one stands: what is scored under it must not be scored under another.
        """
        name = f"changed-{storage.bytes_digest(tensors)[:16]}.safetensors"
        folder = ("counterparts", partition(query_id))
        if self._is_made(query_id):
            return
        written = {"name": name, **self.write(tensors, *folder, name)}
        fingerprint = next(each.fingerprint for each in self.additions if query_id in each.query_ids)
        data = json_bytes({**meta, "query_id": query_id, "fingerprint": fingerprint, "tensors": written})
        if self.resolved.commits == "create":
            made = storage.create_bytes(self.uri(*folder, "meta.json"), data)
            if made or self._is_made(query_id):
                return
        self.write(data, *folder, "meta.json")

    def _is_made(self, query_id: str) -> bool:
        try:
            self.counterpart_meta(query_id)
        except ForeignError:
            raise
        except (InputError, ArtifactError):
            return False
        return True

    def counterpart_meta(self, query_id: str) -> dict[str, Any]:
        """A committed counterpart's meta.json. Raises InputError, ArtifactError (of another run, or damaged)."""
        meta = self.read_json("counterparts", partition(query_id), "meta.json")
        self._require_own(meta["fingerprint"], f"counterpart of query {query_id!r}")
        return meta

    def tensors_path(self, query_id: str) -> str:
        """Path of a committed counterpart's tensors in the run's folder. Raises as `counterpart_meta`."""
        return f"counterparts/{partition(query_id)}/{self.counterpart_meta(query_id)['tensors']['name']}"

    def counterpart_tensors(self, query_id: str) -> bytes:
        """A committed counterpart's changed tensors, checked against its digest. Raises InputError, ArtifactError."""
        expected = self.counterpart_meta(query_id)["tensors"]["sha256"]
        data = storage.read_bytes(self.uri(self.tensors_path(query_id)))
        if (got := storage.bytes_digest(data)) != expected:
            raise ArtifactError(
                f"counterpart of query {query_id!r} is damaged: got sha256 {got}, expected {expected}", self.mending
            )
        return data

    def committed_queries(self) -> set[str]:
        """Queries whose counterpart is committed."""
        there = set(storage.names(self.uri("counterparts")))
        named = [query_id for query_id in self.query_ids if partition(query_id) in there]
        done = parallel(lambda q: storage.exists(self.uri("counterparts", partition(q), "meta.json")), named)
        return {query_id for query_id, committed in zip(named, done, strict=True) if committed}

    # --- how scores are made -----------------------------------------------------------------------------------------

    def commit_measured(self, name: str, found: Mapping[str, Any]) -> None:
        """Write what a first start measured, CALIBRATION or CHOICE; the first one stands, as long as the run does."""
        data = json_bytes({**found, "fingerprint": self.additions[0].fingerprint})
        if self.resolved.commits == "create":
            storage.create_bytes(self.uri(name), data)
        elif self.measured(name) is None:
            self.write(data, name)

    def measured(self, name: str) -> dict[str, Any] | None:
        """What was committed; null if nothing was. Raises ArtifactError: it is damaged, or of another run."""
        try:
            found = self.read_json(name)
        except InputError:
            return None
        self._require_own(found["fingerprint"], name)
        return found

    @property
    def way(self) -> Way:
        """How scores are made: what the spec says, else what was measured; `difference` before. Raises as `measured`."""
        if self.spec.score.way != "auto":
            return self.spec.score.way
        found = self.measured(CALIBRATION)
        return cast("Way", found["way"]) if found is not None else self._way_of_commits()

    def _way_of_commits(self) -> Way:
        """How a committed shard was scored, where calibration.json is lost: all others must be scored in the same way."""
        committed = self.committed() if len(self.query_ids) >= MANY else set()
        for work in self.works() if committed else ():
            if (work.addition, work.shard.shard_id) in committed:
                with suppress(InputError, ArtifactError):  # a damaged object tells nothing; another shard may
                    scored_under = self.receipt(work.addition, work.shard.shard_id).counterparts
                    tensors = [self.counterpart_meta(query_id)["tensors"]["sha256"] for query_id in work.query_ids]
                    for way in WAYS:
                        if scored_under == counterparts_digest(tensors, way):
                            return way
        return "difference"

    # --- what a producer found out about the corpus ------------------------------------------------------------------

    def commit_fitted(self, tensors: bytes, details: Mapping[str, Any]) -> None:
        """Write what a producer fitted to the corpus, then fitted/meta.json, which commits it."""
        name = f"fitted-{storage.bytes_digest(tensors)[:16]}.safetensors"
        written = {"name": name, **self.write(tensors, "fitted", name)}
        meta = {"details": dict(details), "fingerprint": self.additions[0].fingerprint, "tensors": written}
        self.write_json(meta, "fitted", "meta.json")

    def fitted_meta(self) -> dict[str, Any]:
        """What commits it. Raises InputError if nothing was fitted, ArtifactError (of another run, or damaged)."""
        meta = self.read_json("fitted", "meta.json")
        self._require_own(meta["fingerprint"], "fitted/meta.json")
        return meta

    def fitted(self) -> tuple[bytes, dict[str, Any]] | None:
        """The tensors and details that a producer fitted to the corpus; null if it has not yet, or they are damaged."""
        try:
            meta = self.fitted_meta()
            data = storage.read_bytes(self.uri("fitted", meta["tensors"]["name"]))
        except ForeignError:
            raise
        except (InputError, ArtifactError):
            return None
        return (data, meta["details"]) if storage.bytes_digest(data) == meta["tensors"]["sha256"] else None

    # --- commits of shards -----------------------------------------------------------------------------------------

    def commit(self, receipt: Receipt) -> Receipt:
        """Write a shard's commit, after everything it names; the commit that then stands.

        The first commit stands, on the store's word where it has conditional PUTs: whoever comes second wrote the same bytes
        under the same names. Where it did not (another hardware's last bits), the commit is replaced to say what is there now.
        """
        path = ("commits", f"{receipt.name}.json")
        data = json_bytes(receipt.to_json())
        if self.resolved.commits == "create" and storage.create_bytes(self.uri(*path), data):
            return receipt
        standing = self.standing(receipt.addition, receipt.shard_id)
        if standing is not None and all(receipt.files.get(name, made) == made for name, made in standing.files.items()):
            return standing
        self.write(data, *path)
        return receipt

    def void(self, paths: Sequence[str]) -> None:
        """Delete commits, so that what they name is made anew; the seal first: it stands for all of them."""
        if paths:
            storage.remove(self.uri("_SUCCESS"))
        parallel(lambda path: storage.remove(self.uri(path)), paths)

    def standing(self, addition: int, shard_id: int) -> Receipt | None:
        """A shard's commit, if it has one that is whole. Raises ForeignError for another run's."""
        try:
            return self.receipt(addition, shard_id)
        except ForeignError:
            raise
        except (InputError, ArtifactError):
            return None

    def receipt(self, addition: int, shard_id: int) -> Receipt:
        """A shard's commit. Raises InputError if it is not there, ArtifactError for one of another run, or damaged."""
        name = f"{work_name(addition, shard_id)}.json"
        try:
            receipt = parse_receipt(self.read_json("commits", name))
        except ValueError as error:
            raise ArtifactError(f"{self.uri('commits', name)} is damaged: {error}") from error
        self._require_own(receipt.fingerprint, f"commit {receipt.name}")
        return receipt

    def has_commits(self, addition: Addition | None = None) -> bool | None:
        """Whether what is committed in the folder is the run's own; null if nothing is.

        Args:
            addition: One that the run was not opened with: then only what can be of that counts.
        """
        names = (COMMIT_NAME.fullmatch(name) for name in storage.names(self.uri("commits")))
        commits = [match for match in names if match and (addition is None or int(match[2] or 0) == addition.number)]
        folders = set(storage.names(self.uri("counterparts")))
        if addition is not None:
            folders &= {partition(query_id) for query_id in addition.query_ids}
        own, found = (addition or self.additions[0]).fingerprint, None
        for path in (
            *(("commits", match[0]) for match in commits),
            *(("counterparts", each, "meta.json") for each in folders),
        ):
            with suppress(InputError, ArtifactError):  # not committed, or damaged
                found = self.read_json(*path)["fingerprint"] == own
                if found:
                    return True
        return found

    def committed(self) -> set[tuple[int, int]]:
        """(addition, shard) of every commit, by one listing."""
        found = (COMMIT_NAME.fullmatch(name) for name in storage.names(self.uri("commits")))
        return {(int(match[2] or 0), int(match[1])) for match in found if match}

    def receipts(self, keys: Iterable[tuple[int, int]] | None = None) -> Iterator[Receipt]:
        """Commits, all of them if no keys are given, in order, read as they are gone through. Raises as `receipt`."""
        todo = iter(sorted(self.committed() if keys is None else keys))
        while some := list(islice(todo, READ_AT_ONCE)):
            yield from parallel(lambda key: self.receipt(*key), some)

    def read_shard(self, receipt: Receipt, path: str) -> pa.Table:
        """A table that a commit names, by its path in the run's folder. Raises InputError, ArtifactError."""
        if path not in receipt.files:
            raise ArtifactError(f"commit {receipt.name} names no {path}")
        return self.read_table(path, sha256=receipt.files[path]["sha256"], hint=self.mending)

    def is_tolerable(self, rejected: int) -> bool:
        """Whether so many rejected rows are within what the spec allows of all rows gone through."""
        return rejected <= self.spec.score.max_reject_fraction * self.rows_to_score

    def require_few_rejects(self, rejected: int) -> None:
        """See that no more rows were rejected than the spec allows. Raises InputError, with the first of them."""
        if self.is_tolerable(rejected):
            return
        shown = "".join(f"\n  {line}" for line in self._first_rejects())
        raise InputError(
            f"{rejected:,} of {self.rows_to_score:,} rows could not be scored, allowed is a fraction of "
            f"{self.spec.score.max_reject_fraction:g}; they are in {self.uri('rejects')}{shown}",
            "mend the corpus and start a new run, or go on with --set score.max_reject_fraction=...",
        )

    def _first_rejects(self) -> list[str]:
        for receipt in self.receipts():
            if receipt.rejects:
                rows = self.read_shard(receipt, receipt.rejects_path).slice(0, MAX_REJECTS_SHOWN)
                return [
                    f"{row['path']} row {row['row']}: {row['column']}: got {row['got']}, expected {row['expected']}"
                    for row in rows.to_pylist()
                ]
        return []

    def complete_receipts(self, grown: bool = False) -> Iterator[Receipt]:
        """All commits of a fully scored run, in order.

        Args:
            grown: Whether there may be commits of later additions, which the run was not opened with.

        Raises:
            ArtifactError: A shard is not committed, or scored and rejected rows do not add up to the manifest's.
        """
        committed = {key for key in self.committed() if not grown or key[0] < len(self.additions)}
        expected = {(work.addition, work.shard.shard_id) for work in self.works()}
        if committed != expected:
            raise ArtifactError(
                f"{self.uri()}: {len(committed & expected):,} of {len(expected):,} shards are committed, and "
                f"{len(committed - expected):,} that the manifest does not have",
                "run stage score to its end first",
            )
        for receipt, work in zip(self.receipts(expected), self.works(), strict=True):
            if receipt.rows + receipt.rejects != work.shard.rows:
                raise ArtifactError(
                    f"commit {receipt.name}: {receipt.rows} scored + {receipt.rejects} rejected rows, "
                    f"expected {work.shard.rows}"
                )
            yield receipt

    def ranking(self) -> dict[str, Any]:
        """What topk/meta.json says of the ranking. Raises InputError if there is none, ArtifactError if it is damaged."""
        return self.read_json("topk", "meta.json")

    def read_ranked(self) -> tuple[pa.Table, dict[str, Any]]:
        """The ranked table and its meta.json. Raises as `ranked_bytes`."""
        data, meta = self.ranked_bytes()
        return table_of(data, self.uri("topk", "ranked.parquet")), meta

    def ranked_bytes(self) -> tuple[bytes, dict[str, Any]]:
        """The ranked table as Parquet, and its meta.json. Raises ArtifactError if the run was not ranked, or it is damaged."""
        for last in (False, False, True):
            try:
                meta = self.ranking()
            except InputError as error:
                hint = "run its spec to the end; `mirrorscope status` says how far it is"
                raise ArtifactError(f"{self.uri()} is not ranked yet", hint) from error
            try:
                expected, hint = meta["tables"]["ranked.parquet"], f"`mirrorscope rank {self.uri()}` makes it anew"
                return self.read_checked("topk", "ranked.parquet", sha256=expected, hint=hint), meta
            except ArtifactError:
                if last:
                    raise
            time.sleep(BETWEEN_LOOKS_S)  # a ranking that is being written: its tables are there, its meta.json follows
        raise AssertionError("unreachable")

    def seal(self) -> None:
        """Write _SUCCESS: every row of the corpus is in exactly one of scores and rejects. Raises ArtifactError, InputError."""
        rows = rejects = rejects_in_all = 0
        for receipt in self.complete_receipts():
            rejects_in_all += receipt.rejects
            if self.is_first(receipt):
                rows, rejects = rows + receipt.rows, rejects + receipt.rejects
        self.require_few_rejects(rejects_in_all)
        counts = {"shards": len(self.shards), "rows": rows, "rejects": rejects, "commits": self.number_of_works}
        self.write_json({**counts, "fingerprint": self.additions[-1].fingerprint}, "_SUCCESS")

    def is_sealed(self) -> bool:
        """Whether _SUCCESS stands, for all that the run was given. Raises ArtifactError if it is damaged."""
        try:
            said = self.read_json("_SUCCESS")
        except InputError:
            return False
        return bool(said["fingerprint"] == self.additions[-1].fingerprint)

    def _require_own(self, fingerprint: Any, what: str) -> None:
        own = [addition.fingerprint for addition in self.additions]
        if fingerprint not in own:
            raise ForeignError(
                f"{self.uri()}: {what} carries fingerprint {fingerprint}, expected {' or '.join(own)}",
                "the folder mixes two runs; use a new run.uri",
            )


def counterparts_digest(tensors_sha256: Sequence[str], way: Way = "difference") -> str:
    """One digest of several counterparts, from those of their tensors in order, and of the way in which they are scored."""
    lines = [*tensors_sha256, *([] if way == "difference" else [f"way: {way}"])]
    return storage.bytes_digest("\n".join(lines).encode())
