"""Bytes at a URI, local or on any store that fsspec opens. Foreign errors are mapped to the tree here, and here only."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from .errors import InputError, StorageError

CHUNK_BYTES = 1 << 22


def absolute(uri: str) -> str:
    """The URI that means the same from any working directory: local paths become absolute, others stay."""
    fs, path = locate(uri)
    return path if isinstance(fs, LocalFileSystem) else uri.rstrip("/")


def locate(uri: str) -> tuple[Any, str]:
    """The file system that serves a URI, and the path in it.

    Raises:
        StorageError: No file system is known for the URI's scheme, or it cannot be set up.
    """
    try:
        fs, path = fsspec.core.url_to_fs(os.path.expanduser(uri))
    except (ValueError, ImportError, OSError) as error:
        raise StorageError(
            f"{uri}: {error}", "a local path, s3://bucket/key, or another scheme that fsspec opens"
        ) from error
    return fs, str(path)


@contextmanager
def mapped(uri: str) -> Iterator[None]:
    """Map what file systems raise: a missing file is an InputError, anything else a StorageError."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"{uri} does not exist or is not a file") from error
    except PermissionError as error:
        raise StorageError(
            f"{uri}: access denied", "check the path's permissions or the credentials in the environment"
        ) from error
    except OSError as error:
        raise StorageError(f"{uri}: {error}") from error


def exists(uri: str) -> bool:
    """Whether an object or folder stands at the URI."""
    fs, path = locate(uri)
    with mapped(uri):
        return bool(fs.exists(path))


def read_bytes(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """An object's bytes, or those from `start` to before `stop`. Raises InputError, StorageError."""
    fs, path = locate(uri)
    with mapped(uri):
        return bytes(fs.cat_file(path, start=start, end=stop))


@contextmanager
def reading(uri: str) -> Iterator[BinaryIO]:
    """An object open for reading, seekable. Raises InputError, StorageError."""
    fs, path = locate(uri)
    with mapped(uri), fs.open(path, "rb") as file:
        yield cast(BinaryIO, file)


def write_bytes(uri: str, data: bytes) -> None:
    """Write an object whole: on a local disk a temporary file renamed into place, elsewhere one PUT.

    Readers see the old bytes or the new ones, never a part. Raises StorageError.
    """
    fs, path = locate(uri)
    try:
        with mapped(uri):
            _write(fs, path, data)
    except InputError as error:  # "no such file" means something else where one is to be made
        raise StorageError(f"{uri} cannot be written: {error.__cause__}") from error


def _write(fs: Any, path: str, data: bytes) -> None:
    """Write whole, or leave what was there."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):  # not renamed: something failed
            os.unlink(temporary)


def names(uri: str) -> list[str]:
    """Sorted names of what lies directly in a folder; nothing if it is not there. Raises StorageError."""
    fs, path = locate(uri)
    with mapped(uri):
        try:
            found = (
                fs.ls(path, detail=False, refresh=True)
                if not isinstance(fs, LocalFileSystem)
                else fs.ls(path, detail=False)
            )
        except FileNotFoundError:
            return []
    return sorted(name for item in found if not (name := item.rstrip("/").rsplit("/", 1)[-1]).startswith("."))


def remove_folder(uri: str) -> None:
    """Delete a folder and everything in it, if it is there. Raises StorageError."""
    fs, path = locate(uri)
    with mapped(uri):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def version(info: dict[str, Any]) -> str:
    """What fsspec's `info` says of an object's state: its ETag, or its modification time."""
    return str(info.get("ETag") or info.get("LastModified") or info.get("mtime") or "")


def stat(uri: str) -> tuple[int, str]:
    """Size in bytes and version of one object. Raises InputError, StorageError."""
    fs, path = locate(uri)
    with mapped(uri):
        info = fs.info(path)
    return int(info["size"]), version(info)


def file_digest(uri: str) -> str:
    """sha256 of an object, streamed. Raises InputError, StorageError."""
    digest = hashlib.sha256()
    with reading(uri) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def bytes_digest(data: bytes) -> str:
    """sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()
