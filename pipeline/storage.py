"""Bytes at a URI, local or on any store that fsspec opens.

Reading is pyarrow's where it can (S3, local disks: in C++, several requests at a time); listing, asking and writing is
fsspec's, which knows ETags and conditional PUTs. A request that may pass is repeated here, a bounded number of times, and said.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

from . import object_info
from .errors import InputError, StorageError, UnavailableError
from .local_disk import files_below, write_local
from .observe import say_seldom
from .storage_errors import is_taken, mapped, require_no_credentials

CHUNK_BYTES = 1 << 22
TRIES = 8
"""Of one request that may pass: with the pauses below about half a minute."""
FIRST_TRIES = 4
"""Of a store that has not answered this process yet: more likely a wrong endpoint than a bad moment."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 20.0
"""A store that is silent for so long is asked again."""
_S3 = ("s3", "s3a")
_Result = TypeVar("_Result")

_LOCAL = pafs.LocalFileSystem()
_answered: set[str] = set()
_repeating = threading.local()


@dataclass(frozen=True)
class Stored:
    """One object as a listing shows it; `modified_s` is infinite where the store does not say it."""

    size_bytes: int
    modified_s: float


def absolute(uri: str) -> str:
    """The URI that means the same from any working directory: local paths become absolute, others stay."""
    fs, path = locate(uri)
    return path if isinstance(fs, LocalFileSystem) else uri.rstrip("/")


def locate(uri: str) -> tuple[Any, str]:
    """The fsspec file system that serves a URI, and the path in it.

    Raises:
        StorageError: No file system is known for the URI's scheme, or it cannot be set up; or the URI carries credentials,
            which would end in the run's folder and in logs.
    """
    require_no_credentials(uri)
    options: dict[str, Any] = {}
    if _scheme(uri) in _S3:  # nothing remembered between two looks; no repeating below ours
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": ANSWER_TIMEOUT_S}
        options = {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}, **timeouts}}
    try:
        fs, path = fsspec.core.url_to_fs(os.path.expanduser(uri), **options)
    except (ValueError, ImportError, OSError) as error:
        raise StorageError(
            f"{uri}: {error}", "a local path, s3://bucket/key, or another scheme that fsspec opens"
        ) from error
    if options:
        fs.retries = 1
    return fs, str(path)


def data_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system that reads a URI, and the path in it. Raises StorageError."""
    if _scheme(uri) in _S3:
        require_no_credentials(uri)
        path = uri.split("://", 1)[1].rstrip("/")  # not by `locate`: it takes as long as a request to a near store
        with mapped(uri):
            return _s3(path.split("/", 1)[0]), path
    if "://" not in uri and "::" not in uri:
        return _LOCAL, os.path.abspath(os.path.expanduser(uri))
    fs, path = locate(uri)
    if isinstance(fs, LocalFileSystem):
        return _LOCAL, path
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


@lru_cache
def _s3(bucket: str) -> pafs.S3FileSystem:
    """The S3 of pyarrow, with what it does not take from the environment by itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region or (None if endpoint else pafs.resolve_s3_region(bucket)),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=ANSWER_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
    )


def _scheme(uri: str) -> str:
    return uri.split("://", 1)[0] if "://" in uri else ""


def retried(uri: str, action: Callable[[], _Result]) -> _Result:
    """Do something that may be done twice, again and again while the store says that it may pass.

    Inside another such action it is done once: the outermost repeats.

    Raises:
        UnavailableError: It did not pass; with the number of tries.
        InputError, StorageError: As `mapped`, at once.
    """
    if getattr(_repeating, "within", False):
        return _once(uri, action)
    started_s, store = time.monotonic(), _store(uri)
    for tried in range(1, TRIES + 1):
        tries = TRIES if store in _answered else FIRST_TRIES
        _repeating.within = True
        try:
            result = _once(uri, action)
            _answered.add(store)
            return result
        except UnavailableError as error:
            if tried >= tries:
                waited = f"tried {tried} times in {time.monotonic() - started_s:.0f} s"
                raise UnavailableError(f"{error.message}; {waited}", error.hint) from error
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (tried - 1)) * random.uniform(0.5, 1.5)
            say_seldom(store, f"warning: {error.message}; trying again, at most {tries} times")
        finally:
            _repeating.within = False
        time.sleep(pause_s)
    raise AssertionError("unreachable")


def _once(uri: str, action: Callable[[], _Result]) -> _Result:
    """Do something; where nothing is there, see whether that is for want of the bucket: a HEAD does not say."""
    try:
        with mapped(uri):
            return action()
    except InputError:
        store = _store(uri)
        if _scheme(uri) in _S3 and store not in _answered:
            fs, bucket = locate(store)
            with mapped(store):
                fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
            _answered.add(store)
        raise


def _store(uri: str) -> str:
    """What answers as one: scheme and bucket."""
    return "/".join(uri.split("/")[:3])


def exists(uri: str) -> bool:
    """Whether an object or folder stands at the URI. Raises StorageError: not to know is not a no."""
    try:
        stat(uri)
    except InputError:
        return False
    return True


def read_bytes(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """An object's bytes, or those from `start` to before `stop`. Raises InputError, StorageError."""

    def action() -> bytes:
        with reading(uri) as file:
            if start is None and stop is None:
                return file.read()
            end = file.size() if stop is None else stop
            return file.read_at(end - (start or 0), start or 0)

    return retried(uri, action)


@contextmanager
def reading(uri: str) -> Iterator[pa.NativeFile]:
    """An object open for reading, seekable. What is read is not repeated: see `retried`. Raises InputError, StorageError."""
    fs, path = data_filesystem(uri)
    with mapped(uri), fs.open_input_file(path) as file:
        yield file


def write_bytes(uri: str, data: bytes) -> None:
    """Write an object whole: on a local disk a temporary file renamed into place, elsewhere one PUT.

    Readers see the old bytes or the new ones, never a part. Raises StorageError.
    """
    _put(uri, data, only_new=False)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write an object whole if nothing stands there: a conditional PUT, or a hard link on a local disk.

    False if something does. That may be an earlier try of the same PUT, stored though its answer was lost: look and compare.
    Raises StorageError, also where the store does not know conditional PUTs (or ignores them: see `creates`).
    """
    try:
        _put(uri, data, only_new=True)
    except StorageError as error:
        if error.__cause__ is not None and is_taken(error.__cause__):
            return False
        raise
    return True


def creates(folder_uri: str) -> bool:
    """Whether the store keeps `create_bytes`'s promise, by trying. Raises StorageError if it cannot be written at all."""
    probe = f"{folder_uri}/.probe-{uuid.uuid4().hex}"
    write_bytes(probe, b"first")
    try:
        return not create_bytes(probe, b"second")
    except UnavailableError:
        raise
    except (StorageError, TypeError, NotImplementedError):
        return False
    finally:
        remove(probe)


def _put(uri: str, data: bytes, only_new: bool) -> None:
    fs, path = locate(uri)
    write = write_local if isinstance(fs, LocalFileSystem) else _write_remote
    try:
        retried(uri, lambda: write(fs, path, data, only_new))
    except InputError as error:  # "no such file" means something else where one is to be made
        raise StorageError(f"{uri} cannot be written: {error.__cause__}") from error


def _write_remote(fs: Any, path: str, data: bytes, only_new: bool) -> None:
    fs.pipe_file(path, data, mode="create" if only_new else "overwrite")


def names(uri: str) -> list[str]:
    """Sorted names of what lies directly in a folder; nothing if it is not there. Raises StorageError."""
    fs, path = locate(uri)
    try:
        found = retried(uri, lambda: fs.ls(path, detail=False))
    except InputError:
        return []
    below = (
        item.rstrip("/") for item in found if item.rstrip("/") != path.rstrip("/")
    )  # S3 lists the folder itself, too
    return sorted(name for item in below if not (name := item.rsplit("/", 1)[-1]).startswith("."))


def objects(uri: str) -> dict[str, Stored]:
    """Everything under a folder, hidden names too: path in the folder -> size and time. Raises StorageError."""
    fs, path = locate(uri)
    try:
        found = retried(uri, lambda: files_below(fs, path))
    except InputError:
        return {}
    start = len(path.rstrip("/")) + 1
    return {
        name[start:]: Stored(int(info["size"]), object_info.modified_s(info))
        for name, info in found.items()
        if info["type"] == "file" and name[start:]
    }


def modified_s(uri: str) -> float:
    """When an object was last written, Unix seconds by the store's clock; infinite if the store does not say.

    Raises InputError, StorageError.
    """
    fs, path = locate(uri)
    return object_info.modified_s(retried(uri, lambda: fs.info(path)))


def now_s(folder_uri: str) -> float:
    """The time by the clock that dates the objects of a folder, as `modified_s`: that of a probe. Raises StorageError."""
    probe = f"{folder_uri}/.probe-{uuid.uuid4().hex}"
    write_bytes(probe, b"probe")
    try:
        return modified_s(probe)
    finally:
        remove(probe)


def remove(uri: str) -> None:
    """Delete an object, if it is there. Raises StorageError."""
    fs, path = locate(uri)
    with suppress(InputError):
        retried(uri, lambda: fs.rm_file(path))


def remove_folder(uri: str) -> None:
    """Delete a folder and everything in it, if it is there. Raises StorageError."""
    fs, path = locate(uri)

    with suppress(InputError):
        retried(uri, lambda: fs.rm(path, recursive=True))


def stat(uri: str) -> tuple[int, str]:
    """Size in bytes and version of one object. Raises InputError, StorageError."""
    fs, path = locate(uri)
    info = retried(uri, lambda: fs.info(path))
    return int(info["size"] or 0), object_info.version(info)


def file_digest(uri: str) -> str:
    """sha256 of an object, streamed. Raises InputError, StorageError."""

    def action() -> str:
        digest = hashlib.sha256()
        with reading(uri) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    return retried(uri, action)


def download(uri: str, path: Path) -> None:
    """An object as a local file, streamed. Raises InputError, StorageError; OSError of the local disk."""

    def action() -> None:
        with reading(uri) as source, path.open("wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                file.write(chunk)

    retried(uri, action)


def bytes_digest(data: bytes) -> str:
    """sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()
