"""A model's folder in Hugging Face format, wherever it lies: its config, a digest of it, and a copy on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from . import storage
from .errors import InputError, first_line
from .frozen_files import FrozenFiles, at_the_end, expected_of, identity
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
        found = json.loads(storage.read_bytes(f"{local_copy(uri, TOKENIZER_FILES)}/config.json"))
    except ValueError as error:
        raise InputError(f"{uri}/config.json cannot be read: {error}") from error
    return dict(found)


def own_code(uri: str) -> str:
    """Where a folder asks for code that lies beside its weights to be run; empty if it does not.

    transformers loads many such folders with classes of its own. It never runs that code here.

    Raises:
        StorageError: The store refuses.
    """
    for name in ("config.json", "tokenizer_config.json"):
        try:
            classes = json.loads(storage.read_bytes(f"{uri}/{name}")).get("auto_map")
        except (InputError, ValueError, AttributeError):  # it is not there, or damaged, which its reader says
            continue
        if classes:
            return f"auto_map in {name}: {json.dumps(classes)}"
    return ""


def load_error(uri: str, what: str, error: Exception, hint: str = "") -> InputError:
    """What transformers raised about a folder, as ours; where it would need code of the folder's own, with that as the reason.

    Args:
        uri: The folder.
        what: What cannot be done, as in `FOLDER cannot be loaded`.
        error: What it raised.
        hint: What to do.
    """
    if "trust_remote_code" in str(error) and (asked := own_code(uri)):  # its advice would be to run it
        return InputError(
            f"{what}: it asks for code of its own, which is never run ({asked})",
            "give a checkpoint of a class that transformers has; or write a loader or task of your own in code that you trust, "
            "and name it in the spec: package.module:Class",
        )
    return InputError(f"{what}: {first_line(error)}", hint)


def read_file(uri: str) -> bytes:
    """A file of weights; what is read is what the run was frozen with, if it is the run's. Raises InputError, StorageError."""
    data = storage.read_bytes(uri)
    if (frozen := expected_of(uri, MODEL_FILES)) is not None:
        frozen.require({"": storage.bytes_digest(data)})
    return data


def model_files(uri: str, patterns: Sequence[str] = MODEL_FILES) -> dict[str, str]:
    """Name -> sha256 of each file that is read of a folder; of a file of weights alone, whose name is then empty.

    Raises InputError, StorageError.
    """
    if not is_folder(uri):
        return {"": storage.file_digest(uri)}
    return {name: storage.file_digest(f"{uri}/{name}") for name in _files(uri, patterns)}


def model_digest(uri: str, patterns: Sequence[str] = MODEL_FILES) -> str:
    """One sha256 of what `model_files` gives. Raises InputError, StorageError."""
    return digest_of(model_files(uri, patterns))


def digest_of(files: Mapping[str, str]) -> str:
    """One sha256 of the names of files and the sha256 of each; of a single file its own."""
    return files[""] if "" in files else _joint_digest(files)


def _joint_digest(digests: Mapping[str, str]) -> str:
    """One sha256 of the names of files and the sha256 of each."""
    return storage.bytes_digest("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode())


def local_copy(uri: str, patterns: tuple[str, ...] = MODEL_FILES, digest: str | None = None) -> str:
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
    place, names, frozen = storage.absolute(uri), _files(uri, patterns), expected_of(uri, patterns)
    if frozen is not None:
        digest = digest_of(frozen.files)
    if "://" in place:
        folder, found = verified_copy(place, names, lambda found: digest in (None, _joint_digest(found)))
    else:
        before = {name: identity(f"{place}/{name}") for name in names}
        folder, found = place, model_files(place, patterns) if digest is not None else {}
        if frozen is not None:  # a library reads the folder itself after this
            at_the_end(lambda: _require_untouched(frozen, place, before))
    if frozen is not None:
        frozen.require(found)
    if digest is not None and digest != _joint_digest(found):
        raise InputError(
            f"{uri} is not what the run was frozen with: sha256 of its files is {_joint_digest(found)}, expected {digest}",
            "put the former files back, or start a new run in another folder",
        )
    return folder


def _require_untouched(frozen: FrozenFiles, place: str, before: Mapping[str, tuple[int, ...]]) -> None:
    """See that a local folder was not written to since its digests were compared. Raises InputError."""
    for name, then in before.items():
        try:
            now = identity(f"{place}/{name}")
        except OSError as error:
            raise InputError(f"{frozen.field}: {place}/{name} went away while it was read: {error}") from error
        if now[:-1] != then[:-1]:
            raise InputError(
                f"{frozen.field}: {place}/{name} was written while it was read: got size and time {now[2:4]}, "
                f"expected {then[2:4]}",
                "run the same command again when nobody writes there",
            )
        if now != then:  # metadata alone, as by chmod or a hard link; or times were put back
            frozen.require({**frozen.files, name: storage.file_digest(f"{place}/{name}")})
    new = set(_files(place, frozen.patterns)) - before.keys()
    frozen.require({**frozen.files, **{name: storage.file_digest(f"{place}/{name}") for name in new}})
