"""Files of a model, a tokenizer or an adapter that a run was frozen with: what is loaded of them is compared with that.

A file that is read as a whole is compared by what was read. A folder that a library reads by itself is compared before, and
looked at again when everything is loaded: it must not have changed in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from . import storage
from .errors import InputError

_HINT = "put the former file back, or start a new run in another folder: losses under two models make no scores"
_Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class FrozenFiles:
    """What a field of a spec named when the run was frozen.

    Args:
        field: The field, as in `task.tokenizer_uri`.
        uri: URI of a file, or of a folder.
        patterns: Names of the files that are read of a folder.
        files: Name -> sha256 of each file of a folder; of a single file, whose name is then empty.
    """

    field: str
    uri: str
    patterns: tuple[str, ...]
    files: Mapping[str, str]

    def require(self, found: Mapping[str, str]) -> None:
        """See that files have the digests that they had. Raises InputError, with the first that has not."""
        for name in sorted({*self.files, *found}):
            if found.get(name) != self.files.get(name):
                got, expected = (
                    f"sha256 {each[name]}" if name in each else "no such file" for each in (found, self.files)
                )
                place = f"{self.uri}/{name}" if name else self.uri
                raise InputError(
                    f"{self.field}: {place} is not what the run was frozen with: got {got}, expected {expected}",
                    _HINT,
                )


@dataclass
class _Loading:
    expected: Mapping[_Key, FrozenFiles]
    checks: list[Callable[[], None]] = field(default_factory=list)


_loading: ContextVar[_Loading | None] = ContextVar("_loading", default=None)


@contextmanager
def loaded_as_frozen(frozen: Sequence[FrozenFiles]) -> Iterator[None]:
    """Around loads: files are what the run was frozen with, from the first look at them to the end of the block.

    What was loaded must not need the files any more at that end, as memory-mapped tensors do.

    Raises:
        InputError: They are not, or change.
    """
    loading = _Loading({(storage.absolute(one.uri), one.patterns): one for one in frozen})
    token = _loading.set(loading)
    try:
        yield
    except Exception:  # whatever a library says of a file that changed while it was read
        _check(loading)
        raise
    else:
        _check(loading)
    finally:
        _loading.reset(token)


def _check(loading: _Loading) -> None:
    for check in loading.checks:
        check()


def expected_of(uri: str, patterns: tuple[str, ...]) -> FrozenFiles | None:
    """What a load of these files must find; null outside of a block, and for files that are not the run's."""
    loading = _loading.get()
    return loading.expected.get((storage.absolute(uri), patterns)) if loading is not None else None


def at_the_end(check: Callable[[], None]) -> None:
    """Have something checked at the end of the block."""
    if (loading := _loading.get()) is not None:
        loading.checks.append(check)


def identity(path: str) -> tuple[int, ...]:
    """What changes with a local file: its inode, size and times, that of its metadata last. Raises OSError."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
