"""Bytes of text files, plain or compressed. Byte offsets count what is decompressed."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pyarrow as pa

from .. import storage
from ..records import Shard
from .base import readable_as

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Suffix of a compressed text file -> what pyarrow calls it."""
BUFFER_BYTES = 1 << 20


def with_compressed(*suffixes: str) -> tuple[str, ...]:
    """Suffixes of text files, plain and with each of the known compressions behind."""
    return tuple(f"{suffix}{codec}" for suffix in suffixes for codec in ("", *CODECS))


def _codec(path: str) -> str | None:
    return next((codec for suffix, codec in CODECS.items() if path.lower().endswith(suffix)), None)


@contextmanager
def open_text(path: str) -> Iterator[io.BufferedReader]:
    """A text file from its beginning, decompressed. Raises InputError for a damaged one, StorageError."""
    codec = _codec(path)
    with ExitStack() as stack:
        source = stack.enter_context(storage.reading(path))
        if codec:
            stack.enter_context(readable_as(codec, path))
            source = stack.enter_context(pa.CompressedInputStream(source, codec))
        yield io.BufferedReader(source, storage.CHUNK_BYTES)


class TextBytes:
    """The bytes of shards. Of a compressed file they can only be had from its beginning on: it stays open for the shards behind.

    So a worker that reads shards in the order of the file decompresses it once; one that goes back begins again. The last bytes
    are kept: shards overlap, since offsets are those of some rows only.
    """

    def __init__(self) -> None:
        self._reading = threading.Lock()
        self._file: tuple[tuple[str, int, str], io.BufferedReader] | None = None
        self._start, self._kept, self._open = 0, b"", ExitStack()

    def read(self, shard: Shard) -> bytes:
        """The bytes between a shard's two offsets; fewer where the file has fewer. Raises InputError, StorageError."""
        assert shard.byte_start is not None
        assert shard.byte_stop is not None
        if (codec := _codec(shard.path)) is None:
            return storage.read_bytes(shard.path, shard.byte_start, shard.byte_stop)
        with self._reading, readable_as(codec, shard.path):
            of, file = self._opened(shard)
            self._file = None  # after an error the file is opened again
            while shard.byte_start > self._start + len(self._kept):
                left = shard.byte_start - self._start - len(self._kept)
                self._start, self._kept = self._start + len(self._kept), file.read(min(left, storage.CHUNK_BYTES))
                if not self._kept:
                    break
            kept = self._kept[shard.byte_start - self._start :]
            more = max(0, shard.byte_stop - shard.byte_start - len(kept))
            self._start, self._kept = shard.byte_start, kept + file.read(more)
            self._file = of, file
            return self._kept[: shard.byte_stop - shard.byte_start]

    def _opened(self, shard: Shard) -> tuple[tuple[str, int, str], io.BufferedReader]:
        """The shard's file, read to no byte behind the shard's first but those that are kept."""
        of = (shard.path, shard.size_bytes, shard.version)
        if self._file is not None and self._file[0] == of and self._start <= (shard.byte_start or 0):
            return self._file
        self._open.close()
        self._start, self._kept, self._open = 0, b"", ExitStack()
        return of, self._open.enter_context(open_text(shard.path))
