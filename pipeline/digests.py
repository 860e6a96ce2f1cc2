"""What a run was made of, by contents: digests of its queries, its weights, and of the corpus as it was listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from . import storage
from .errors import InputError, SpecError
from .formats.base import corpus_root, relative_path
from .model_folder import MODEL_FILES, TOKENIZER_FILES, model_digest
from .plan import corpus_digest
from .reader import Reader
from .records import Shard, SourceFile
from .sections import Section
from .spec import QueriesSection, Spec

MODEL_URIS = {
    "model": ("weights_uri", "adapter_uri"),
    "task": ("tokenizer_uri", "config_uri"),
    "producer": ("weights_uri", "adapter_uri"),
}
"""Fields of sections that name weights, or a folder of a model: made absolute, and by their contents part of a run's identity."""
_Section = TypeVar("_Section", bound=Section)
_SHORT = {"model weights_uri": "weights"}


def model_uris(kind: str, section: Section) -> dict[str, str]:
    """Fields of a section that name files of a model -> their URIs."""
    return {name: uri for name in MODEL_URIS[kind] if (uri := getattr(section, name, None)) is not None}


def with_absolute_uris(kind: str, section: _Section) -> _Section:
    """A section whose files of a model are named as from any working directory."""
    found = {name: storage.absolute(uri) for name, uri in model_uris(kind, section).items()}
    return section.model_copy(update=found)


def input_digests(spec: Spec, shards: Sequence[Shard]) -> dict[str, str]:
    """What decides the scores besides the spec: name -> digest. Raises InputError, StorageError."""
    root = corpus_root(spec.corpus.uri)
    relative = {path: relative_path(path, root) for path in {shard.path for shard in shards}}
    digests = {
        "queries": queries_digest(spec.queries, spec.corpus.classes) if spec.queries else "",
        "corpus": corpus_digest(shards, relative),
    }
    for section in MODEL_URIS:
        read = TOKENIZER_FILES if section == "task" else MODEL_FILES
        for name, uri in model_uris(section, getattr(spec, section)).items():
            digests[_SHORT.get(f"{section} {name}", f"{section} {name}")] = model_digest(uri, read)
    return digests | _ensemble_digests(spec, digests)


def member_digest(place: int) -> str:
    """Name of the digest of a member's weights in that of its ensemble."""
    return f"ensemble.{place - 1}.weights_uri" if place else "weights"


def _ensemble_digests(spec: Spec, digests: Mapping[str, str]) -> dict[str, str]:
    """Name -> digest of the weights of every further member. Raises SpecError for weights that come twice."""
    found: dict[str, str] = {}
    for place, member in enumerate(spec.ensemble, start=1):
        name = member_digest(place)
        try:
            digest = model_digest(member.weights_uri, MODEL_FILES)
        except InputError as error:
            raise InputError(f"{name}: {error.message}", error.hint) from error
        for before, known in {"model.weights_uri": digests["weights"], **found}.items():
            if digest == known:
                hint = "to make a model count more, give it a `weight`"
                raise SpecError(f"{name}: {member.weights_uri} holds the same weights as {before}", hint)
        found[name] = digest
    return found


def addition_digests(run_spec: Spec, shards: Sequence[Shard], queries: str | None) -> dict[str, str]:
    """What an addition brings: name -> digest.

    Args:
        run_spec: Of the run that grows.
        shards: Its new shards.
        queries: Digest of the contents of its query files; null if it has none.
    """
    root = corpus_root(run_spec.corpus.uri)
    relative = {path: relative_path(path, root) for path in {shard.path for shard in shards}}
    return {"corpus": corpus_digest(shards, relative), "queries": queries or ""}


def queries_digest(section: QueriesSection, classes: Sequence[str] | None) -> str:
    """sha256 of the contents of all query files. Raises InputError, StorageError."""
    files = Reader(section.uri, section.format, classes).files()
    contents = [digest for file in files for digest in _content_digests(file)]
    return storage.bytes_digest("\n".join(contents).encode())


def _content_digests(file: SourceFile) -> list[str]:
    paths = [file.path] if file.members is None else [f"{file.path}/{member}" for member in file.members]
    return [storage.file_digest(path) for path in paths]
