"""Copies of remote files on this machine that only this user can write, compared with their digests on every use.

The machine's temporary folder is everybody's: who guesses a folder's name can make it first, and put another model there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from . import storage
from .errors import InputError, StorageError
from .observe import say_seldom

CACHE = "MIRRORSCOPE_CACHE"
"""Environment variable: where copies go; else the machine's temporary folder."""
_FILES, _UNFINISHED, _DIGESTS = "files", "unfinished", "digests.json"
"""In a copy's folder: the files; those that are being copied; sha256 of each file."""


def cache_folder() -> Path:
    """Where copies go by the environment. It need not exist, and may turn out not to be private: see `private_folder`."""
    return Path(os.environ.get(CACHE) or Path(tempfile.gettempdir()) / _own_name())


def private_folder() -> Path:
    """A folder for copies that is this user's alone: mode 0700, made if need be.

    It is `cache_folder`, or where that is not private: with MIRRORSCOPE_CACHE a folder in it, else one in the home folder.

    Raises:
        OSError: There is none, and none can be made. The message has the reason for each place.
    """
    first = cache_folder()
    problem = _make_private(first)
    if not problem:
        return first
    second = first / _own_name() if os.environ.get(CACHE) else Path.home() / ".cache" / "mirrorscope"
    if other := _make_private(second):
        raise PermissionError(f"{problem}; {other}")
    say_seldom(str(first), f"warning: {problem}: copies go to {second}")
    return second


def verified_copy(
    place: str, names: Sequence[str], is_expected: Callable[[Mapping[str, str]], bool]
) -> tuple[str, dict[str, str]]:
    """A private copy of some files of a remote folder.

    A copy whose files do not have the digests that were noted when it was made, or not those that are expected, is replaced.

    Args:
        place: Absolute URI of the folder.
        names: Names of the files, directly in it.
        is_expected: Whether name -> sha256 is what the caller expects.

    Returns:
        Path of the copy, and name -> sha256 of its files, which are not what is expected if the folder itself is not.

    Raises:
        InputError: A file is missing, or changes while it is copied.
        StorageError: The store refuses, or there is no private folder or no room for the copy.
    """
    versions = _versions(place, names)
    key = storage.bytes_digest("\n".join([place, *versions]).encode())[:24]
    try:
        folder = private_folder() / key
        if _make_private(folder):  # left from a time when others could write here
            _set_aside(folder)
            folder.mkdir(mode=0o700, exist_ok=True)
        with _locked(folder, fcntl.LOCK_SH):
            digests, problem = _checked(folder, names)
            if not problem and is_expected(digests):
                return str(folder / _FILES), digests
        with _locked(folder, fcntl.LOCK_EX):
            digests, problem = _checked(folder, names)  # by another process in the meantime
            if problem or not is_expected(digests):
                if (folder / _FILES).exists():
                    why = problem or "the copy is not what was expected"
                    say_seldom(str(folder), f"warning: {folder}: {why}; {place} is copied again")
                digests = _copy(place, names, versions, folder)
            return str(folder / _FILES), digests
    except OSError as error:
        raise StorageError(
            f"{place} cannot be copied to {cache_folder()}: {error}",
            f"make room there, or set {CACHE} to a folder of yours that nobody else can write (chmod 700)",
        ) from error


def _own_name() -> str:
    return f"mirrorscope-{os.getuid()}"


def _versions(place: str, names: Sequence[str]) -> list[str]:
    return [f"{name} {storage.stat(f'{place}/{name}')}" for name in names]


def _make_private(folder: Path) -> str:
    """Make a folder if there is none; why it is not this user's alone, empty if it is. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # it is looked at below
        folder.mkdir(mode=0o700)
    above = os.stat(folder.parent)
    if above.st_uid not in (0, os.getuid()) or (above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX):
        return f"others can replace {folder}, as they can write in {folder.parent}"
    return _not_ours(folder, stat.S_ISDIR, 0o077)


def _not_ours(path: Path, is_kind: Callable[[int], bool], forbidden: int) -> str:
    """Why a folder or file is not of the right kind, this user's, and without these bits of its mode; empty if it is."""
    found = os.lstat(path)
    if not is_kind(found.st_mode):
        return f"{path} is a link, or of another kind"
    if found.st_uid != os.getuid():
        return f"{path} belongs to another user"
    return f"{path} is open to other users" if found.st_mode & forbidden else ""


def _set_aside(folder: Path) -> None:
    """Remove what stands where a copy goes; what cannot be removed stays under another name."""
    aside = folder.with_name(f".{uuid.uuid4().hex}")
    os.rename(folder, aside)
    if aside.is_symlink():
        aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Hold a lock on a folder for the time of the block; it ends with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, kind)
        yield
    finally:
        os.close(handle)


def _checked(folder: Path, names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Name -> sha256 of a copy's files, and what is wrong with them; empty if nothing is."""
    files = folder / _FILES
    try:
        noted = json.loads((folder / _DIGESTS).read_bytes())
        if _not_ours(files, stat.S_ISDIR, 0o077) or sorted(os.listdir(files)) != sorted(names):
            return {}, "the copy has other files"
        for name in names:
            if problem := _not_ours(files / name, stat.S_ISREG, 0o022):
                return {}, problem
        digests = {name: storage.file_digest(str(files / name)) for name in names}
    except (OSError, ValueError, InputError, StorageError):
        return {}, "the copy is not whole"
    damaged = [name for name in names if not isinstance(noted, dict) or digests[name] != noted.get(name)]
    return digests, f"the copy of {', '.join(damaged)} is damaged" if damaged else ""


def _copy(place: str, names: Sequence[str], versions: Sequence[str], folder: Path) -> dict[str, str]:
    """Copy the files, the folder's lock held; name -> sha256. Raises InputError, StorageError, OSError."""
    unfinished = folder / _UNFINISHED
    if unfinished.exists():  # an interrupted copy
        _set_aside(unfinished)
    unfinished.mkdir(mode=0o700)
    for name in names:
        storage.download(f"{place}/{name}", unfinished / name)
        (unfinished / name).chmod(0o600)
    digests = {name: storage.file_digest(str(unfinished / name)) for name in names}
    if _versions(place, names) != list(versions):
        raise InputError(f"{place} changed while it was copied", "run the same command again when it is written")
    if (folder / _FILES).exists():
        _set_aside(folder / _FILES)
    (folder / _DIGESTS).write_text(json.dumps(digests))
    unfinished.rename(folder / _FILES)
    return digests
