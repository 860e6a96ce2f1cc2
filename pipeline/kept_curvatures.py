"""What `natural` fitted to the corpus, kept for other runs of the same model over the same corpus.

Where it lies is told by a name, a fingerprint of all that decides it. Whether it is right is told by contents: the object carries
a digest of itself and one of the rows that it was fitted to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import base_losses, storage
from .artifacts import Run
from .errors import InputError, StorageError
from .observe import say
from .sealed import sealed, unsealed

if TYPE_CHECKING:
    from .curvatures.base import Sample

TOLERANCE = 1e-3
"""By how much losses may be off from those that were kept: other threads and devices round differently."""
CHOSEN = {"sample_rows", "curvature"}
"""Fields of the producer that a budget may choose."""
DECIDES_NOTHING = {"curvatures", "step", "steps"}
"""Fields of the producer that what is fitted does not depend on."""


@dataclass(frozen=True)
class Kept:
    """What was kept.

    Args:
        fields: Of the producer, which a budget chose.
        sample: Digest of the rows that it was fitted to.
        losses: Of some of these rows under the model, in nats: they tell whether its code is what it was.
        details: As fitted/meta.json has them.
        tensors: As fitted/ has them.
    """

    fields: dict[str, Any]
    sample: str
    losses: list[float]
    details: dict[str, float | str]
    tensors: bytes


def place_of(run: Run) -> str | None:
    """Where a run's fit is kept, whether it is there or not; null if its spec names no folder."""
    folder = getattr(run.spec.producer, "curvatures", None)
    return folder and f"{folder}/{_fingerprint(run)}.safetensors"


def _fingerprint(run: Run) -> str:
    """Digest of what decides a fit: model, task, batches and versions as of base losses; corpus, seed and producer."""
    spec, digests = run.spec, run.resolved.digests
    about = {
        "base": base_losses.fingerprint(spec, digests),
        "corpus": digests["corpus"],
        "seed": spec.seed,
        "producer": spec.producer.model_dump(mode="json", exclude=DECIDES_NOTHING),
        "tune": spec.resources.tune.gpus > 0,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def read(uri: str) -> Kept | None:
    """What lies there; null if nothing does, or it cannot be used, which is said."""
    try:
        body = unsealed(storage.read_bytes(uri))
    except InputError:
        return None
    except StorageError as error:
        say(f"warning: a kept curvature cannot be read, and is fitted again: {error.message}")
        return None
    if body is None:
        say(f"warning: {uri} is damaged: the curvature is fitted again")
        return None
    header, _, tensors = body.partition(b"\n")
    try:
        kept = Kept(**json.loads(header), tensors=tensors)
    except (ValueError, TypeError):  # no JSON, or other fields
        kept = None
    if kept is None or not isinstance(kept.fields, dict) or not kept.fields.keys() <= CHOSEN:
        say(f"warning: {uri} was written by another version: the curvature is fitted again")
        return None
    return kept


def is_of(kept: Kept, fields: Mapping[str, Any], sample: str, losses: list[float]) -> bool:
    """Whether a fit is by this choice, of these rows and of a model that gives them these losses; if not, it is said."""
    if kept.fields != fields:
        say("warning: a kept curvature is of other rows than this run chose, and is fitted again")
        return False
    if kept.sample != sample:
        say("warning: a kept curvature is of other contents than the corpus has now, and is fitted again")
        return False
    if len(kept.losses) != len(losses) or not np.allclose(kept.losses, losses, rtol=TOLERANCE, atol=TOLERANCE):
        say("warning: a kept curvature is of a model of other code, or other versions, and is fitted again")
        return False
    return True


def write(uri: str, kept: Kept) -> None:
    """Keep a fit, whole; a store that refuses is named, and does no harm."""
    header = {name: value for name, value in asdict(kept).items() if name != "tensors"}
    try:
        storage.write_bytes(uri, sealed(json.dumps(header, sort_keys=True).encode() + b"\n" + kept.tensors))
    except StorageError as error:
        say(f"warning: the curvature is not kept: {error.message}")


def sample_digest(sample: Sample) -> str:
    """Digest of a sample's rows and their ids, those of all workers. All of them must call it together."""
    import torch.distributed as dist

    own = {number: _digest(batch) for number, batch in zip(sample.numbers, sample.batches, strict=True)}
    gathered = [own]
    if sample.is_split:
        gathered = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
    every: dict[int, str] = {number: digest for theirs in gathered for number, digest in theirs.items()}
    return hashlib.sha256("".join(every[number] for number in sorted(every)).encode()).hexdigest()


def _digest(batch: Mapping[str, Any]) -> str:
    import torch

    digest = hashlib.sha256("\n".join(map(str, getattr(batch, "example_B", ()))).encode())
    for name, value in batch.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
