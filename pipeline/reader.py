"""The files of a corpus, of queries, or of any table: found, measured and read as rows, whatever their format.

Folders called `key=value` are columns of the files below them, where the files have no such column themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from . import storage
from .decode import type_problem
from .errors import InputError
from .extensions import load_format
from .formats.base import Listing, corpus_root, list_files, relative_path
from .formats.image_folder import ImageFolder
from .formats.parquet import Parquet
from .formats.text import Csv, JsonLines
from .observe import say
from .records import Column, Measured, Rows, Shard, SourceFile
from .sections import unknown_word
from .values import is_from_json, json_column, json_field, python_values, text_problem

_FORMATS: dict[str, Any] = {"parquet": Parquet, "jsonl": JsonLines, "csv": Csv, "image_folder": ImageFolder}
SUFFIXES = {suffix: word for word, kind in _FORMATS.items() for suffix in kind.suffixes}
"""What `auto` goes by."""
TEXT_FIELDS = ("corpus.example_id", "corpus.source", "queries.query_id")
"""Fields of the spec that name columns which are read as text."""
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


class Reader:
    """Files under one URI.

    Args:
        uri: A file, a folder or a glob.
        format: A word of `formats`, or `auto`.
        classes: Of image folders, in label order; null sorts them.

    Raises:
        InputError: Nothing is there, or with `auto` files of several formats, or of none.
    """

    def __init__(self, uri: str, format: str = "auto", classes: Sequence[str] | None = None) -> None:
        self.uri = uri
        self.name = _recognised(self.listing) if format == "auto" else format
        self._sorts_classes = classes is None
        self._format = load_format(self.name, {"uri": uri, "classes": classes} if self.name == "image_folder" else {})

    @cached_property
    def listing(self) -> Listing:
        """What lies under the URI, asked once. Raises InputError, StorageError."""
        return list_files(self.uri)

    @cached_property
    def root(self) -> str:
        """The folder that ids are relative to."""
        return corpus_root(self.uri)

    @property
    def classes(self) -> list[str] | None:
        """Of image folders, in label order, once files were listed."""
        return getattr(self._format, "classes", None)

    def files(self) -> list[SourceFile]:
        """Files in order, unopened. Raises InputError, StorageError."""
        return self._format.files(self.listing)

    def survey(self) -> list[SourceFile]:
        """Files in order, unopened; says which lie beside them and are not read, and how image folders were numbered.

        Raises:
            InputError: Data would be left out, or the folder is a table of a lake.
            StorageError: The store refused.
        """
        files = self.files()
        if unread := self.listing.unread(files, SUFFIXES):
            say(unread)
        if isinstance(self._format, ImageFolder) and self._sorts_classes:
            say(f"{self.uri}: {self._format.labels(files)}")
        return files

    def measure(self, file: SourceFile) -> Measured:
        """Rows and columns of one file. Raises InputError, StorageError."""
        measured = storage.retried(file.path, lambda: self._format.measure(file))
        below = {name: pa.null() for name in self._partitions(file.path)}
        return replace(measured, columns={**below, **measured.columns}) if below else measured

    def with_columns(self, measured: Sequence[Measured], names: Collection[str] | None) -> list[Measured]:
        """Files with columns that may stand anywhere in them, as keys of JSON lines do: a row that lacks one has null there.

        Args:
            measured: All files.
            names: Columns asked for, or null for all that there are.

        Raises:
            InputError, StorageError: A file cannot be read.
        """
        find = getattr(self._format, "find_columns", None)
        if find is None:
            return list(measured)
        known = {name: kind for one in measured for name, kind in one.columns.items()}
        for one in measured:
            missing = None if names is None else [name for name in names if name not in known]
            if missing is None or missing:
                found = storage.retried(one.file.path, lambda one=one, missing=missing: find(one.file, missing))  # type: ignore[misc]
                known |= {name: pa.null() for name in found if name not in known}
        return [replace(one, columns=known) for one in measured]

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """A shard's rows with the columns asked for. Raises InputError, StorageError."""
        rows = storage.retried(shard.path, lambda: self._format.read(shard, columns))
        below = self._partitions(shard.path)
        table = rows.table
        for name in (name for name in columns if name in below):
            if name not in table.column_names:
                constant = pa.array([below[name]] * len(rows.row_N), pa.string())
                table = table.append_column(name, constant) if table.column_names else pa.table({name: constant})
            elif is_from_json(table.schema.field(name)):  # a row of JSON that lacks the key
                values = python_values(table[name].combine_chunks())
                array = json_column([below[name] if value is None else value for value in values])
                table = table.set_column(table.column_names.index(name), json_field(name, array.type), array)
        return replace(rows, table=table)

    def _partitions(self, path: str) -> dict[str, str | None]:
        """What folders called `key=value` say of the files below them."""
        if "=" not in path:
            return {}
        parts = [part.partition("=") for part in relative_path(path, self.root).split("/")[:-1]]
        values = {unquote(key): unquote(value) for key, sign, value in parts if key and sign}
        return {key: None if value == _HIVE_NULL else value for key, value in values.items()}


def _recognised(listing: Listing) -> str:
    """The format that the files have by their suffixes. Raises InputError for several, or none."""
    names = (file.path.rsplit("/", 1)[-1].lower().split(".") for file in listing.visible)
    ends = {f".{'.'.join(parts[-number:])}" for parts in names for number in (1, 2) if len(parts) > number}
    found = {SUFFIXES[end] for end in ends if end in SUFFIXES}
    if len(found) > 1:
        raise InputError(
            f"{listing.uri}: files of {len(found)} formats ({', '.join(sorted(found))})", "say which with `format:`"
        )
    if not found:
        listing.pick(SUFFIXES)
    return found.pop()


def check_columns(measured: Measured, columns: Sequence[Column], asked: Mapping[str, Sequence[str | None]]) -> None:
    """See that a file has every column that the task and the spec's fields ask for, in a type that can be decoded.

    Raises:
        InputError: It has not; every problem of the file is listed.
    """
    problems = []
    for field, names in {**asked, **{f"task column {c.name!r}": c.columns for c in columns}}.items():
        for name in names:
            if name is not None and name not in measured.columns:
                problems.append(f"{field}: column {unknown_word(name, measured.columns)}")
            elif name in measured.repeated:
                problems.append(f"{field}: column {name!r} comes more than once in the file: rename all but one")
            elif field in TEXT_FIELDS and name is not None and (problem := text_problem(measured.columns[name])):
                problems.append(f"{field}: column {name!r}: {problem}")
    for column in columns:
        for name in column.columns:
            if name in measured.columns and (problem := type_problem(measured.columns[name], column)):
                problems.append(f"task column {column.name!r}: column {name!r}: {problem}")
    if problems:
        raise InputError(f"{measured.file.path}:\n" + "\n".join(f"  {problem}" for problem in problems))
