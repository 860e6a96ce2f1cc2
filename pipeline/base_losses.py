"""Losses under the base model, kept for other runs of the same model over the same corpus.

Where they lie is told by names: of the model, the task and the batches (a fingerprint), and of the shard. Whether they are
right is told by contents: each object carries a digest of itself and one of all that went through the model.

Shapes: S items (see batches.py).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

from . import storage
from .artifacts import Run
from .batches import Batch
from .digests import member_digest, model_uris
from .ensemble import member_spec, number_of_members
from .errors import InputError, StorageError
from .formats.base import corpus_root, relative_path
from .observe import say, say_seldom
from .records import Shard
from .sealed import DIGEST_BYTES, sealed, unsealed
from .sections import Section
from .spec import Spec

LAYOUT = 1
"""Of the objects, and of what goes into their names; another number, and none of before is found."""
PACKAGES = ("mirrorscope", "torch")


@dataclass(frozen=True)
class ShardLosses:
    """Where losses of one shard's items under the base model are kept.

    An object is an array as numpy saves it, behind it the digest of the inputs, behind that the digest of all before.

    Args:
        uri: The object.
        inputs: Digest of what the losses are of: see `inputs_digest`.
    """

    uri: str
    inputs: bytes

    def read(self) -> np.ndarray | None:
        """The losses, float32 or float64 [S], to the bit as they were written; null if they cannot be had, which is said."""
        try:
            data = storage.read_bytes(self.uri)
        except InputError:
            return None
        except StorageError as error:
            say_seldom(self.uri.rsplit("/", 1)[0], f"warning: base losses cannot be read: {error.message}")
            return None
        if (body := unsealed(data)) is None:
            say(f"warning: {self.uri} is damaged: these base losses are computed anew")
            return None
        if body[-DIGEST_BYTES:] != self.inputs:
            say(
                f"warning: {self.uri} is of other contents than the corpus has now: these base losses are computed anew"
            )
            return None
        return np.asarray(np.load(io.BytesIO(body), allow_pickle=False))

    def write(self, base_S: np.ndarray) -> None:
        """Keep losses, whole; a store that refuses is named, and does no harm."""
        buffer = io.BytesIO()
        np.save(buffer, base_S, allow_pickle=False)
        body = buffer.getvalue() + self.inputs
        try:
            storage.write_bytes(self.uri, sealed(body))
        except StorageError as error:
            say_seldom(self.uri.rsplit("/", 1)[0], f"warning: base losses are not kept: {error.message}")


@dataclass(frozen=True)
class BaseLosses:
    """Where base losses of one run are kept.

    Args:
        run: Its spec says where (`score.base_losses`).
    """

    run: Run

    @cached_property
    def _folder(self) -> str:
        return f"{self.run.spec.score.base_losses}/{fingerprint(self.run.spec, self.run.resolved.digests)}"

    @cached_property
    def _root(self) -> str:
        return corpus_root(self.run.spec.corpus.uri)

    def of(self, shard: Shard, batches: Iterable[Batch]) -> ShardLosses:
        """Those of one shard, whose items go through the model in these batches."""
        return ShardLosses(f"{self._folder}/{_object(shard, self._root)}", inputs_digest(batches))


def fingerprint(spec: Spec, digests: Mapping[str, str]) -> str:
    """Digest of what decides base losses but the corpus: model and task by contents, batches, device, threads, versions.

    Args:
        spec: A resolved spec.
        digests: What it was resolved with.
    """
    files = {
        name: digest for name, digest in digests.items() if name == "weights" or name.startswith(("model ", "task "))
    }
    resources = spec.resources.score
    about = {
        "layout": LAYOUT,
        "model": _apart_from_place("model", spec.model),
        "task": _apart_from_place("task", spec.task),
        "files": files,
        "seed": None if "weights" in files else spec.seed,
        "batches": [spec.score.batch_rows, spec.score.batch_tokens],
        "worker": [resources.gpus > 0, max(1, int(resources.cpus))],
        "versions": [version(package) for package in PACKAGES],
    }
    if spec.score.compile:
        about["compiled"] = True
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _apart_from_place(kind: str, section: Section) -> dict[str, Any]:
    """A section without the URIs of files that are known by their contents."""
    return section.model_dump(mode="json", exclude=set(model_uris(kind, section)))


def inputs_digest(batches: Iterable[Batch]) -> bytes:
    """Digest of all that goes through a model, and in which batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, array in {"": batch.item_B, **batch.arrays}.items():
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _object(shard: Shard, root: str) -> str:
    """Name of a shard's losses, of its file as it was listed and its rows: not of its number."""
    path = relative_path(shard.path, root)
    about = [path, shard.size_bytes, shard.version, shard.row_start, shard.rows, shard.members]
    return f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.npy"


def rows_kept(run: Run) -> int:
    """Examples of a run whose base losses are there by name, those of an ensemble's members added up. Raises StorageError."""
    if run.spec.score.base_losses is None:
        return 0
    root = corpus_root(run.spec.corpus.uri)
    names = [(shard.rows, _object(shard, root)) for shard in run.shards]
    kept = 0
    for mark in _fingerprints(run):
        there = set(storage.names(f"{run.spec.score.base_losses}/{mark}"))
        kept += sum(rows for rows, name in names if name in there)
    return kept


def _fingerprints(run: Run) -> Iterator[str]:
    """Of the run's model, or of those of all its members."""
    digests = run.resolved.digests
    if not run.spec.ensemble:
        yield fingerprint(run.spec, digests)
    for place in range(number_of_members(run)):
        yield fingerprint(member_spec(run.spec, place), {**digests, "weights": digests[member_digest(place)]})
