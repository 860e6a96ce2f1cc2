"""What fsspec does not do well enough on a local disk: whole-object writes, and listings that miss nothing."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem


def write_local(_: Any, path: str, data: bytes, only_new: bool) -> None:
    """Write whole, or leave what was there. Raises OSError; FileExistsError if `only_new` and something stands there."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if only_new:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):  # renamed
            os.unlink(temporary)


def files_below(fs: Any, path: str, levels: float = math.inf) -> dict[str, dict[str, Any]]:
    """Path -> info of every file under a folder; a link that leads nowhere is of type `link`.

    Raises OSError: a local folder that cannot be listed is no empty one.

    Args:
        fs: fsspec file system.
        path: The folder.
        levels: 1 for what lies directly in it; a local disk need not look deeper, a flat listing of a store costs no more.
    """
    if not isinstance(fs, LocalFileSystem):
        return dict(fs.find(path, detail=True))
    found = {}
    depth = path.rstrip("/").count("/") + levels
    for folder, folders, names in _walk(path):
        if folder.count("/") + 1 >= depth:
            folders.clear()
        for name in names:
            file = os.path.join(folder, name)
            try:
                state = os.stat(file)
                found[file] = {"size": state.st_size, "mtime": state.st_mtime, "type": "file"}
            except FileNotFoundError:  # else a temporary file, renamed by now
                if os.path.islink(file):
                    found[file] = {"size": 0, "mtime": 0.0, "type": "link"}
    return found


def folders_below(fs: Any, path: str) -> list[str]:
    """Every folder under a folder, on a local disk; elsewhere none, since stores have no folders but those of their files."""
    if not isinstance(fs, LocalFileSystem):
        return []
    return [os.path.join(folder, name) for folder, folders, _ in _walk(path) for name in folders]


def _walk(path: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk; links to folders are followed, but those that lead back to a folder above them."""
    for folder, folders, names in os.walk(path, onerror=_unless_gone, followlinks=True):
        for name in [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            target = os.path.realpath(os.path.join(folder, name))
            if f"{os.path.realpath(folder)}/".startswith(f"{target.rstrip('/')}/"):
                folders.remove(name)
        yield folder, folders, names


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
