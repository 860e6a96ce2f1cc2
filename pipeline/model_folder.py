"""A model's folder in Hugging Face format, wherever it lies: its config, a digest of it, and a copy on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from . import storage
from .errors import InputError, StorageError

CONFIG_FILES = ("*.json",)
TOKENIZER_FILES = (*CONFIG_FILES, "*.txt", "*.model", "*.jinja", "*.tiktoken")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
"""What is read of a folder: no pickled code."""
_HEADS = {"config.json", "tokenizer_config.json", "adapter_config.json"}
"""Files of which a folder of a model, a tokenizer or an adapter has one."""
CACHE = "MIRRORSCOPE_CACHE"
"""Environment variable: where copies go; else the machine's temporary folder."""


def cache_folder() -> Path:
    """Where copies go; it need not exist yet."""
    return Path(os.environ.get(CACHE) or Path(tempfile.gettempdir()) / f"mirrorscope-{os.getuid()}")


def _files(uri: str, patterns: Sequence[str]) -> list[str]:
    """Names of what is read of a folder. Raises InputError, StorageError."""
    found = [name for name in storage.names(uri) if any(fnmatch(name, pattern) for pattern in patterns)]
    if not _HEADS & set(found):
        raise InputError(
            f"{uri} is no folder of a model: no config.json in it",
            "save one with model.save_pretrained(...) and tokenizer.save_pretrained(...)",
        )
    return found


def is_folder(uri: str) -> bool:
    """Whether a URI is a folder of a model, rather than a file of weights. Raises StorageError."""
    return any(name in _HEADS for name in storage.names(uri))


def read_config(uri: str) -> dict[str, Any]:
    """What config.json says; nothing for a folder of a tokenizer alone. Raises InputError, StorageError."""
    if "config.json" not in _files(uri, CONFIG_FILES):
        return {}
    try:
        found = json.loads(storage.read_bytes(f"{uri}/config.json"))
    except ValueError as error:
        raise InputError(f"{uri}/config.json cannot be read: {error}") from error
    return dict(found)


def model_digest(uri: str, patterns: Sequence[str] = MODEL_FILES) -> str:
    """sha256 of a file of weights, or of names and contents of what is read of a folder. Raises InputError, StorageError."""
    if not is_folder(uri):
        return storage.file_digest(uri)
    lines = [f"{name} {storage.file_digest(f'{uri}/{name}')}" for name in _files(uri, patterns)]
    return storage.bytes_digest("\n".join(lines).encode())


def local_copy(uri: str, patterns: Sequence[str] = MODEL_FILES) -> str:
    """A folder on this machine with these files: the folder itself, or a copy that all processes here share.

    A copy is known by the versions of what was copied: a folder that changed is copied anew. Raises InputError, StorageError.
    """
    names = _files(uri, patterns)
    place = storage.absolute(uri)
    if "://" not in place:
        return place
    versions = [f"{name} {storage.stat(f'{place}/{name}')}" for name in names]
    digest = hashlib.sha256("\n".join([place, *versions]).encode()).hexdigest()[:24]
    cache = cache_folder()
    copy = cache / digest
    if copy.exists():
        return str(copy)
    unfinished = cache / f".{digest}-{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        for name in names:
            storage.download(f"{place}/{name}", unfinished / name)
        unfinished.rename(copy)
    except OSError as error:
        if not copy.exists():  # another process was faster
            raise StorageError(
                f"{uri} cannot be copied to {cache}: {error}", f"make room there, or set {CACHE} to another folder"
            ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(copy)
