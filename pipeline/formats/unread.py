"""Files that no format reads: which are data that must not be left out in silence, and what to do about them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import InputError

_EXPORT = "write it as Parquet, CSV or JSON lines"
_UNPACK = "unpack it"
_DATA = {
    **dict.fromkeys(
        (".arrow", ".arrows", ".feather", ".ipc", ".orc", ".avro", ".lance", ".tfrecord", ".tfrecords"), _EXPORT
    ),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".sqlite", ".sqlite3", ".db", ".duckdb"), _EXPORT),
    **dict.fromkeys((".h5", ".hdf5", ".npy", ".npz", ".pkl", ".pickle", ".mat", ".dta", ".sav", ".rds"), _EXPORT),
    **dict.fromkeys((".tsv", ".tab", ".psv"), "write it as CSV, with commas"),
    **dict.fromkeys((".heic", ".heif", ".avif", ".jp2", ".jxl", ".jfif", ".psd"), "convert it to PNG or JPEG"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".gz", ".bz2", ".zst", ".xz", ".lzma", ".lz4", ".br", ".snappy", ".z"), _UNPACK),
}
"""Suffix -> the way out. Compressed text that is read (`formats/streams.py`) was picked before anything is looked up here."""

_LAKES = {
    "Delta": (r"(^|/)_delta_log/", "deltalake.DeltaTable({uri!r}).file_uris() lists the files of its latest version"),
    "Iceberg": (
        r"(^|/)metadata/[^/]*\.metadata\.json$",
        "pyiceberg's table.scan().plan_files() lists the files of its current snapshot",
    ),
    "Hudi": (r"(^|/)\.hoodie/", "an engine that knows Hudi reads its latest snapshot"),
    "Lance": (r"(^|/)_versions/[^/]*\.manifest$", "lance.dataset({uri!r}).to_table() reads its latest version"),
    "Spark streaming": (r"(^|/)_spark_metadata/", "spark.read of the folder reads the files that were committed"),
}
"""Format of a lake's table -> what its log is called, and the way out."""


def way_out(paths: Iterable[str]) -> str:
    """What to do about the first file of known data that is not read; empty if there is none."""
    for path in paths:
        name = path.rsplit("/", 1)[-1].lower()
        if suffix := next((suffix for suffix in _DATA if name.endswith(suffix)), None):
            return f"{suffix} is not read: {_DATA[suffix]}"
    return ""


def refuse_unreadable(paths: Iterable[str], glob: str) -> None:
    """See that no known data is left out.

    Args:
        paths: Files that are not read.
        glob: A URI that names the files that are read, and not these.

    Raises:
        InputError: One of them is data.
    """
    for path in paths:
        if hint := way_out([path]):
            raise InputError(
                f"{path} holds data, and would be left out",
                f"{hint}; or move it away, or name the files to read by a glob such as {glob}",
            )


def refuse_lake(uri: str, paths: Iterable[str]) -> None:
    """See that a folder is no table of a lake, where files that the log has removed lie beside those that count.

    Args:
        uri: For the message.
        paths: All files in the folder, relative to it.

    Raises:
        InputError: It is one, or has one in it.
    """
    for path in paths:
        for lake, (log, hint) in _LAKES.items():
            if re.search(log, path):
                raise InputError(
                    f"{uri} holds a table in {lake} format ({path}): its log says which of the files count, and it is not read",
                    f"{hint.format(uri=uri)}; copy those into a folder, or write the table out as plain Parquet",
                )
