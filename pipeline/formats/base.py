"""The protocol of a format, and the listing that most of them share."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from .. import storage
from ..errors import InputError
from ..local_disk import files_below
from ..records import Measured, Rows, Shard, SourceFile


class Format(Protocol):
    """Lists files, measures them once, reads contiguous rows of one."""

    suffixes: tuple[str, ...]

    def files(self, uri: str) -> list[SourceFile]:
        """Files of a corpus in a fixed order, without opening them. Raises InputError, StorageError."""
        ...

    def measure(self, file: SourceFile) -> Measured:
        """Rows and columns of one file. Raises InputError if it cannot be read as this format."""
        ...

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """The shard's rows with the columns asked for; rows that cannot be parsed come back as rejects.

        Raises:
            InputError: The file cannot be read, or holds other rows than the manifest says.
        """
        ...


def corpus_root(uri: str) -> str:
    """The folder that example ids are relative to: the URI itself, a file's folder, or what precedes a wildcard.

    It asks the store: ask once per corpus. Raises StorageError.
    """
    fs, path = storage.locate(storage.absolute(uri))
    if _has_wildcard(path):
        return _above_wildcards(path)
    try:
        is_folder = storage.retried(uri, lambda: fs.info(path)["type"] == "directory")  # isdir lists all of it
    except InputError:
        is_folder = False
    return path if is_folder else path.rsplit("/", 1)[0]


def _has_wildcard(path: str) -> bool:
    return any(wildcard in path for wildcard in "*?[")


def _above_wildcards(path: str) -> str:
    while _has_wildcard(path):
        path = path.rsplit("/", 1)[0]
    return path


def relative_path(path: str, root: str) -> str:
    """A corpus file's path below the corpus root; all of its path where it lies elsewhere, in a folder that was added."""
    below = path if path.startswith(root) else path.split("://", 1)[-1]
    if not below.startswith(root):  # a scheme that is spelt another way; asking fsspec takes a hundred times as long
        below = storage.locate(path)[1]
    return "" if below == root else below.removeprefix(f"{root.rstrip('/')}/").lstrip("/")


def _hidden(name: str, root: str) -> bool:
    below = name.removeprefix(root).strip("/")
    return any(part[0] in "._" for part in below.split("/"))


def _found(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """Path -> info of all that a folder, glob or file name stands for. Raises FileNotFoundError if that is nothing."""
    if not _has_wildcard(path):
        info = fs.info(path)  # not isfile: it takes a store that does not answer for a no
        found = {path: info} if info["type"] == "file" else files_below(fs, path)
    else:  # fsspec's glob leaves out folders whose listing fails; a listing of ours fails or is whole
        matches, above = re.compile(glob_translate(path)).match, _above_wildcards(path)
        levels = math.inf if "**" in path else path.removeprefix(above).strip("/").count("/") + 1
        found = {name: info for name, info in files_below(fs, above, levels).items() if matches(name)}
    if not found:
        raise FileNotFoundError(path)
    return found


def find_files(uri: str, suffixes: Collection[str]) -> list[SourceFile]:
    """Files with one of the suffixes under a folder, matching a glob, or the one file named; sorted by path.

    Names that begin with a dot or underscore are passed over. Raises InputError if there is none, StorageError.
    """
    fs, path = storage.locate(storage.absolute(uri))
    try:
        found = storage.retried(uri, lambda: _found(fs, path))
    except InputError as error:
        raise InputError(f"{uri} does not exist, or is an empty folder") from error
    root = corpus_root(uri)
    files = [
        SourceFile(
            path=name if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name),
            size_bytes=int(info["size"]),
            version=storage.version(info),
        )
        for name, info in sorted(found.items())
        if info["type"] == "file" and not _hidden(name, root) and name.lower().endswith(tuple(suffixes))
    ]
    if not files:
        raise InputError(
            f"{uri}: none of {len(found)} file(s) there ends in {', '.join(sorted(suffixes))}",
            "check the path and the format",
        )
    return files
