"""Image folders: one sub-folder per class, images in it. A sub-folder counts as one file whose rows are its images.

Columns: `image` (the file's bytes), `label` (position of the class), `class` (its name), `path` (below the folder).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .. import storage
from ..errors import InputError
from ..records import Measured, Rows, Shard, SourceFile
from .base import corpus_root, find_files, relative_path

COLUMNS = {"image": pa.binary(), "label": pa.int64(), "class": pa.string(), "path": pa.string()}


class ImageFolder:
    """`root/<class>/<image>`.

    Args:
        uri: The folder.
        classes: Sub-folders in label order; null sorts those that are there.
    """

    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

    def __init__(self, uri: str, classes: Sequence[str] | None = None) -> None:
        self._root = corpus_root(uri)
        self.classes = list(classes) if classes is not None else None

    def files(self, uri: str) -> list[SourceFile]:
        """See Format. Raises InputError for an image whose folder is not one of the classes."""
        folders: dict[str, list[SourceFile]] = {}
        for image in find_files(uri, self.suffixes):
            folders.setdefault(image.path.rsplit("/", 1)[0], []).append(image)
        names = [folder.rsplit("/", 1)[-1] for folder in folders]
        self.classes = self.classes if self.classes is not None else sorted(set(names))
        if strangers := sorted(set(names) - set(self.classes)):
            raise InputError(f"{uri}: folder {strangers[0]!r} is not one of the classes {self.classes}")
        return [_folder(path, images) for path, images in folders.items()]

    def measure(self, file: SourceFile) -> Measured:
        """See Format."""
        return Measured(file, len(file.members or ()), COLUMNS)

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """See Format."""
        name = shard.path.rsplit("/", 1)[-1]
        members = shard.members or ()
        values: dict[str, list[Any]] = {}
        if "image" in columns:
            values["image"] = [storage.read_bytes(f"{shard.path}/{member}") for member in members]
        values["label"] = [(self.classes or []).index(name)] * len(members)
        values["class"] = [name] * len(members)
        values["path"] = [f"{relative_path(shard.path, self._root)}/{member}" for member in members]
        table = pa.table({column: pa.array(values[column], COLUMNS[column]) for column in columns})
        return Rows(table, np.arange(shard.row_start, shard.row_start + shard.rows))


def _folder(path: str, images: list[SourceFile]) -> SourceFile:
    """A class's folder as one file, whose version changes with any of its images."""
    state = hashlib.sha256("\n".join(f"{image.path} {image.size_bytes} {image.version}" for image in images).encode())
    return SourceFile(
        path=path,
        size_bytes=sum(image.size_bytes for image in images),
        version=state.hexdigest(),
        members=tuple(image.path.rsplit("/", 1)[-1] for image in images),
    )
