"""A model's folder in Hugging Face format, wherever it lies: its config, a digest of it, and a copy on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from . import storage
from .errors import InputError
from .private_copies import verified_copy

CONFIG_FILES = ("*.json",)
TOKENIZER_FILES = (*CONFIG_FILES, "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.codes", "*.tokenizer")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
"""What is read of a folder: no pickled code."""
_HEADS = {"config.json", "tokenizer_config.json", "adapter_config.json"}
"""Files of which a folder of a model, a tokenizer or an adapter has one."""


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
    return _joint_digest({name: storage.file_digest(f"{uri}/{name}") for name in _files(uri, patterns)})


def _joint_digest(digests: Mapping[str, str]) -> str:
    """One sha256 of the names of files and the sha256 of each."""
    return storage.bytes_digest("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode())


def local_copy(uri: str, patterns: Sequence[str] = MODEL_FILES, digest: str | None = None) -> str:
    """A folder on this machine with these files: the folder itself, or a private copy that this user's processes share.

    A copy is known by the versions of what was copied, so a folder that changed is copied again. Its files are compared with
    their digests on every call; one that differs is replaced.

    Args:
        uri: Folder of a model, a tokenizer or an adapter.
        patterns: Names of the files that are read of it.
        digest: What `model_digest` gave of it for the same patterns when the run was frozen. Null: not known.

    Raises:
        InputError: There is no such folder, it changes while it is copied, or its contents have another digest.
        StorageError: The store refuses, or no private folder on this machine takes the copy.
    """
    place = storage.absolute(uri)
    if "://" in place:
        names = _files(uri, patterns)
        folder, digests = verified_copy(place, names, lambda found: digest in (None, _joint_digest(found)))
        found = _joint_digest(digests)
    else:
        _files(uri, patterns)  # for its errors
        folder, found = place, model_digest(uri, patterns) if digest is not None else ""
    if digest not in (None, found):
        raise InputError(
            f"{uri} is not what the run was frozen with: sha256 of its files is {found}, expected {digest}",
            "put the former files back, or start a new run in another folder",
        )
    return folder
