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
from .base import Listing, corpus_root, is_hidden, relative_path

LABELS_SHOWN = 50
COLUMNS = {"image": pa.binary(), "label": pa.int64(), "class": pa.string(), "path": pa.string()}


class ImageFolder:
    """`root/<class>/<image>`.

    Args:
        uri: The folder.
        classes: Sub-folders in label order; null sorts those that are there, empty ones too, as torchvision does.
    """

    suffixes: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

    def __init__(self, uri: str, classes: Sequence[str] | None = None) -> None:
        self._root = corpus_root(uri)
        self.classes = list(classes) if classes is not None else None

    def files(self, listing: Listing) -> list[SourceFile]:
        """See Format. Raises InputError for an image whose folder is not one of the classes, or is hidden from view."""
        images = listing.pick(
            self.suffixes, [file for file in listing.files if not _is_passed_over(listing, file.path)]
        )
        folders: dict[str, list[SourceFile]] = {}
        for image in images:
            folders.setdefault(_above(image.path), []).append(image)
        names = {_name(folder) for folder in folders}
        if self.classes is None:
            self.classes = sorted(names | _empty_classes(listing))
            _refuse_dotted(listing, self.suffixes)
        if strangers := sorted(names - set(self.classes)):
            raise InputError(f"{listing.uri}: folder {strangers[0]!r} is not one of the classes {self.classes}")
        return [_folder(path, images) for path, images in folders.items()]

    def labels(self, files: Sequence[SourceFile]) -> str:
        """Which folder became which label, for people."""
        images = dict.fromkeys(self.classes or (), 0)
        for file in files:
            images[_name(file.path)] += len(file.members or ())
        shown = [f"{i} {name}{'' if images[name] else ' (no images)'}" for i, name in enumerate(images)]
        rest = [f"... {len(shown) - LABELS_SHOWN} more"] if len(shown) > LABELS_SHOWN else []
        return f"labels: {', '.join(shown[:LABELS_SHOWN] + rest)}"

    def measure(self, file: SourceFile) -> Measured:
        """See Format."""
        return Measured(file, len(file.members or ()), COLUMNS)

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """See Format."""
        name = _name(shard.path)
        members = shard.members or ()
        values: dict[str, list[Any]] = {}
        if "image" in columns:
            values["image"] = [storage.read_bytes(f"{shard.path}/{member}") for member in members]
        values["label"] = [(self.classes or []).index(name)] * len(members)
        values["class"] = [name] * len(members)
        values["path"] = [f"{relative_path(shard.path, self._root)}/{member}" for member in members]
        table = pa.table({column: pa.array(values[column], COLUMNS[column]) for column in columns if column in COLUMNS})
        return Rows(table, np.arange(shard.row_start, shard.row_start + shard.rows))


def _above(path: str) -> str:
    return path.rsplit("/", 1)[0]


def _name(folder: str) -> str:
    return folder.rsplit("/", 1)[-1]


def _is_passed_over(listing: Listing, path: str) -> bool:
    """As any hidden file, but a class may be called `_unknown`: only what lies above it, and the image itself, must not be so."""
    *above, _, name = ["", *relative_path(path, listing.root).split("/")]
    return is_hidden("/".join([*above, name])) or is_hidden(_above(relative_path(path, listing.root)), ".")


def _empty_classes(listing: Listing) -> set[str]:
    """Names of folders without sub-folders in which there are no images: they count as classes, or labels would shift."""
    parents = {_above(folder) for folder in listing.folders}
    return {
        _name(folder)
        for folder in listing.folders
        if folder not in parents and not _is_passed_over(listing, f"{folder}/x")
    }


def _refuse_dotted(listing: Listing, suffixes: tuple[str, ...]) -> None:
    """See that no folder of images is hidden by a dot: torchvision would give it a label. Raises InputError."""
    for file in listing.files:
        folder = _above(relative_path(file.path, listing.root))
        if (
            _name(folder).startswith(".")
            and file.path.lower().endswith(suffixes)
            and not is_hidden(_above(f"/{folder}"))
        ):
            raise InputError(
                f"{listing.uri}: folder {folder!r} holds images, and its name begins with a dot",
                "rename or delete it, or list corpus.classes in label order, without it",
            )


def _folder(path: str, images: list[SourceFile]) -> SourceFile:
    """A class's folder as one file, whose version changes with any of its images."""
    state = hashlib.sha256("\n".join(f"{image.path} {image.size_bytes} {image.version}" for image in images).encode())
    return SourceFile(
        path=path,
        size_bytes=sum(image.size_bytes for image in images),
        version=state.hexdigest(),
        members=tuple(image.path.rsplit("/", 1)[-1] for image in images),
    )
