"""Is a run what its commits say? Told from the objects alone; what is damaged can be mended, what nobody names removed.

Reads: everything in the run's folder.
Writes: nothing; `mend` deletes the commit of what is damaged, `collect` deletes orphans.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice

from . import storage
from .artifacts import READ_AT_ONCE, Run
from .checks import Audit, Finding, Look, check_counterparts, check_frozen, check_ranking, check_seal, check_single
from .ensemble import members_of
from .errors import ArtifactError, InputError
from .folder import parallel
from .observe import Progress, say
from .storage import Stored
from .works import Receipt

RECHECK_BYTES = 1 << 30
"""Up to so much, a start reads again all that is committed; beyond, it looks at sizes and leaves the rest to `verify`."""
_DATA = ("scores/", "partials/", "rejects/", "counterparts/", "fitted/")
_OURS = (*_DATA, "commits/", "additions/", ".train-", ".probe-")
"""Where something that nobody names is a leaving of ours; what else lies in the folder is somebody's own."""
_TEMPORARY = re.compile(r"(?:(?:topk|report|lake)/)?\.[^/]+\.[0-9a-f]{32}\.tmp")
_ROWS = re.compile(r"(?:scores/[^/]+|rejects)/(shard-\d+(?:-addition-\d+)?)(?:-quarantined)?\.parquet")


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
    look = Look(run, stored, deep=data_bytes <= read_at_most)
    found = Audit(works=run.number_of_works, commits=len(committed), counterparts=len(made))
    named = check_frozen(look, found) | check_single(look, found) | check_counterparts(look, found, sorted(made))
    read: set[str] = set()
    progress = Progress("check", len(committed), "shards", shown=shown)
    with progress:
        for some in _some_at_once(sorted(committed)):
            for paths, findings, receipt in parallel(lambda key: look.commit(*key), some):
                named |= paths
                found.damage += findings
                if receipt is not None:
                    read.add(receipt.name)
                    found.add(receipt)
                progress.advance(receipt.rows if receipt is not None else 0)
    named |= check_ranking(look, found)
    check_seal(look, found)
    found.objects, found.read_bytes = len(named & stored.keys()), look.read_bytes
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
            hopeless[0].hint or "`mirrorscope verify` lists all of it",
        )


def void(run: Run, damage: Sequence[Finding]) -> None:
    """Delete commits of what is damaged, and strays. Raises ArtifactError for what this does not mend; deletes nothing then."""
    require_mendable(run, damage)
    for finding in damage:
        say(f"warning: {run.uri(finding.path)}: {finding.what}; it is {'deleted' if finding.stray else 'made anew'}")
    parallel(lambda path: storage.remove(run.uri(path)), [finding.path for finding in damage if finding.stray])
    run.void(list(dict.fromkeys(finding.commit for finding in damage if finding.commit)))


def require_whole(run: Run) -> None:
    """See that a run is whole, its ranking and report aside: those are made of all else. Raises ArtifactError."""
    found = audit(run, RECHECK_BYTES, shown=False)
    if damage := [each for each in found.damage if not each.stray and not each.path.startswith("topk/")]:
        more = f", and {len(damage) - 1} more things are damaged" if len(damage) > 1 else ""
        what = f"{run.uri(damage[0].path)} is not what its commit says: {damage[0].what}{more}"
        raise ArtifactError(what, damage[0].hint or run.mending)


def collect(run: Run, older_than_s: float, dry: bool = False) -> dict[str, Stored]:
    """Delete objects that nobody names and that are older than that by the store's clock; what was (or would be) deleted.

    Young ones may belong to a worker that has not committed yet. Raises ArtifactError for a damaged run: deletes nothing then.
    """
    found = audit(run, read_at_most=-1)
    if damage := [finding for finding in found.damage if not finding.stray]:
        raise ArtifactError(f"{run.uri()}: {len(damage)} things are damaged", "mend it first: see `mirrorscope verify`")
    before_s = storage.now_s(run.uri()) - older_than_s
    old = {path: each for path, each in found.orphans.items() if _is_old(each.modified_s, before_s)}
    if dry:
        return old
    deleted = parallel(lambda path: _removed(run, path, before_s), list(old))
    old = {path: each for (path, each), done in zip(old.items(), deleted, strict=True) if done}
    _return_work(run, found, old)
    return old


def _is_old(modified_s: float, before_s: float) -> bool:
    return math.isfinite(modified_s) and modified_s <= before_s


def _removed(run: Run, path: str, before_s: float) -> bool:
    """Delete an orphan, unless a worker has written it again since it was listed."""
    with suppress(InputError):
        if not _is_old(storage.modified_s(run.uri(path)), before_s):
            return False
    storage.remove(run.uri(path))
    return True


def _return_work(run: Run, before: Audit, deleted: Mapping[str, Stored]) -> None:
    """Void what was committed in the moment in which an object of it was deleted: the next start makes it anew."""
    if (before.commits, before.counterparts) == (len(run.committed()), len(run.committed_queries())):
        return
    found = audit(run, read_at_most=-1, shown=False)
    void(run, [finding for finding in found.damage if finding.path in deleted])


def _some_at_once(keys: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    todo = iter(keys)
    while some := list(islice(todo, READ_AT_ONCE)):
        yield some
