"""The protocol of a format, and what lies under a URI, from which each format picks its files."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from .. import object_info, storage
from ..errors import InputError, PipelineError
from ..local_disk import files_below, folders_below
from ..records import Measured, Rows, Shard, SourceFile
from ..storage_errors import is_store_error, mapped
from .unread import refuse_lake, refuse_unreadable, way_out

_RUN_FILES = (
    "manifest.parquet",
    "forecast.json",
    "topk/meta.json",
    "report/contact_sheet.png",
    "scores/query_id=q/shard-0.parquet",
)
"""Some of what a run writes, of every depth."""


class Format(Protocol):
    """Picks its files, measures them once, reads contiguous rows of one."""

    suffixes: tuple[str, ...]

    def files(self, listing: Listing) -> list[SourceFile]:
        """Files of a corpus in a fixed order, without opening them. Raises InputError."""
        ...

    def measure(self, file: SourceFile) -> Measured:
        """Rows and columns of one file. Raises InputError if it cannot be read as this format."""
        ...

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """The shard's rows with those of the columns that the file has; rows that cannot be parsed come back as rejects.

        Raises:
            InputError: The file cannot be read, or holds other rows than the manifest says.
        """
        ...


@dataclass(frozen=True)
class Listing:
    """What lies under a URI: a folder to its bottom, what matches a glob, or one file.

    Args:
        uri: As the spec has it.
        root: The folder that example ids are relative to.
        files: Sorted by path, those with names that begin with a dot or an underscore too.
        folders: Folders below `root`; of a glob or a file none.
        dead_links: Links that lead nowhere.
    """

    uri: str
    root: str
    files: tuple[SourceFile, ...]
    folders: tuple[str, ...] = ()
    dead_links: int = 0

    @cached_property
    def visible(self) -> tuple[SourceFile, ...]:
        """Files below no name that begins with a dot or underscore: such are other programs' notes."""
        return tuple(file for file in self.files if not is_hidden(relative_path(file.path, self.root)))

    def pick(self, suffixes: Collection[str], among: Sequence[SourceFile] | None = None) -> list[SourceFile]:
        """Files with one of the suffixes, of the visible ones if not told otherwise. Raises InputError if there is none."""
        files = self.visible if among is None else among
        ends = tuple(suffixes)
        picked = [file for file in files if file.path.lower().endswith(ends)]
        if not picked:
            raise InputError(
                f"{self.uri}: none of {len(self.files)} file(s) there ends in {', '.join(sorted(suffixes))}",
                way_out([file.path for file in files]) or "check the path and the format",
            )
        return picked

    def unread(self, picked: Sequence[SourceFile], readable: Collection[str]) -> str:
        """Files that are not read, by suffix, with their number; empty if all are.

        Args:
            picked: Files that are read.
            readable: Suffixes that some format reads: the spec chose another.

        Raises:
            InputError: The folder holds a table of a lake, whose log says which files count, or data that cannot be read.
        """
        paths = [relative_path(file.path, self.root) for file in self.files]
        refuse_lake(self.uri, paths)
        read = {path for file in picked for path in _paths(file)}
        left = [file.path for file in self.visible if file.path not in read]
        unknown = [path for path in left if not path.lower().endswith(tuple(readable))]
        suffix = max((end for end in readable if min(read).lower().endswith(end)), key=len)
        refuse_unreadable(unknown, f"{self.uri.rstrip('/')}/**/*{suffix}")
        counts = Counter(_suffix(path) or "without a suffix" for path in left)
        parts = [f"{number:,} {what}" for what, number in sorted(counts.items(), key=lambda one: (-one[1], one[0]))]
        if hidden := len(self.files) - len(read) - len(left):
            parts.append(f"{hidden:,} with names that begin with a dot or an underscore")
        if self.dead_links:
            parts.append(f"{self.dead_links:,} link(s) that lead nowhere")
        return f"{self.uri}: files that are not read: {', '.join(parts)}" if parts else ""


def _paths(file: SourceFile) -> list[str]:
    return [file.path] if file.members is None else [f"{file.path}/{member}" for member in file.members]


def _suffix(path: str) -> str:
    name = path.rsplit("/", 1)[-1].lower()
    return f".{name.rsplit('.', 1)[-1]}" if "." in name else ""


def is_hidden(below: str, marks: str = "._") -> bool:
    """Whether any part of a relative path begins with one of some characters."""
    return any(part[:1] in marks for part in below.split("/") if part)


def list_files(uri: str) -> Listing:
    """What lies under a URI. A path that exists is that path, whatever characters are in it; else it may be a glob.

    Raises:
        InputError: Nothing is there.
        StorageError: The store refused.
    """
    fs, path = storage.locate(storage.absolute(uri))
    try:
        found, root, is_folder = storage.retried(uri, lambda: _found(fs, path))
    except InputError as error:
        raise InputError(f"{uri} does not exist, or is an empty folder") from error
    local = isinstance(fs, LocalFileSystem)
    files = [
        SourceFile(
            path=name if local else fs.unstrip_protocol(name),
            size_bytes=int(info["size"]),
            version=object_info.version(info),
        )
        for name, info in sorted(found.items())
        if info["type"] == "file"
    ]
    folders = storage.retried(uri, lambda: folders_below(fs, path)) if is_folder else []
    return Listing(uri, root, tuple(files), tuple(folders), sum(info["type"] == "link" for info in found.values()))


def corpus_root(uri: str) -> str:
    """The folder that example ids are relative to: the URI itself, a file's folder, or what precedes a wildcard.

    It asks the store: ask once per corpus. Raises StorageError.
    """
    fs, path = storage.locate(storage.absolute(uri))
    try:
        kind = storage.retried(uri, lambda: fs.info(path)["type"])  # isdir lists all of it
    except InputError:
        return _above_wildcards(path) if has_wildcard(path) else path.rsplit("/", 1)[0]
    return path if kind == "directory" else path.rsplit("/", 1)[0]


def overlap(uri: str, folder_uri: str) -> bool:
    """Whether what a file, folder or glob names lies in a folder, or would take in files of it. Raises StorageError."""
    fs, path = storage.locate(storage.absolute(uri))
    other_fs, folder = storage.locate(storage.absolute(folder_uri))
    if type(fs) is not type(other_fs):
        return False
    if isinstance(fs, LocalFileSystem):
        path, folder = os.path.realpath(path), os.path.realpath(folder)
    path, folder = f"{path.rstrip('/')}/", f"{folder.rstrip('/')}/"
    if path.startswith(folder) or folder.startswith(path):
        return True
    matches = re.compile(glob_translate(path.rstrip("/"))).match
    return has_wildcard(path) and any(matches(folder + name) for name in _RUN_FILES)


def _found(fs: Any, path: str) -> tuple[dict[str, dict[str, Any]], str, bool]:
    """Path -> info of all that a folder, glob or file name stands for; its root; whether it is a folder.

    Raises FileNotFoundError if nothing is there.
    """
    try:
        info = fs.info(path)  # not isfile: it takes a store that does not answer for a no
    except FileNotFoundError:
        if not has_wildcard(path):
            raise
        # fsspec's glob leaves out folders whose listing fails; a listing of ours fails or is whole
        matches, above = re.compile(glob_translate(path)).match, _above_wildcards(path)
        levels = math.inf if "**" in path else path.removeprefix(above).strip("/").count("/") + 1
        found = {name: info for name, info in files_below(fs, above, levels).items() if matches(name)}
        is_folder, root = False, above
    else:
        is_folder = info["type"] == "directory"
        found, root = (files_below(fs, path), path) if is_folder else ({path: info}, path.rsplit("/", 1)[0])
    if not found:
        raise FileNotFoundError(path)
    return found, root, is_folder


def has_wildcard(path: str) -> bool:
    """Whether a path may be a glob."""
    return any(wildcard in path for wildcard in "*?[")


def _above_wildcards(path: str) -> str:
    while has_wildcard(path):
        path = path.rsplit("/", 1)[0]
    return path


def relative_path(path: str, root: str) -> str:
    """A corpus file's path below the corpus root; all of its path where it lies elsewhere, in a folder that was added."""
    below = path if path.startswith(root) else path.split("://", 1)[-1]
    if not below.startswith(root):  # a scheme that is spelt another way; asking fsspec takes a hundred times as long
        below = storage.locate(path)[1]
    return "" if below == root else below.removeprefix(f"{root.rstrip('/')}/").lstrip("/")


@contextmanager
def readable_as(what: str, path: str) -> Iterator[None]:
    """What pyarrow raises of a damaged file, as an InputError that names it, or as the store's error that it is."""
    with mapped(path):
        try:
            yield
        except PipelineError:
            raise
        except Exception as error:  # a damaged file makes decoders raise almost anything
            if isinstance(error, OSError) and is_store_error(error):
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{path} cannot be read as {what}: {said}") from error
