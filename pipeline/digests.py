"""What a run was made of, by contents: digests of its queries, its weights, and of the corpus as it was listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from . import storage
from .artifacts import Run
from .errors import InputError, SpecError
from .formats.base import corpus_root, relative_path
from .frozen_files import FrozenFiles, loaded_as_frozen
from .model_folder import MODEL_FILES, TOKENIZER_FILES, digest_of, model_files
from .observe import say
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


def input_digests(spec: Spec, shards: Sequence[Shard], files: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What decides the scores besides the spec: name -> digest.

    Args:
        spec: The spec.
        shards: Of its corpus.
        files: Those of its models: see `input_files`.

    Raises:
        SpecError: Two members of an ensemble have the same weights.
        InputError, StorageError: Files cannot be read.
    """
    root = corpus_root(spec.corpus.uri)
    relative = {path: relative_path(path, root) for path in {shard.path for shard in shards}}
    digests = {name: digest_of(some) for name, some in files.items()}
    _require_different_members(spec, digests)
    return {
        "queries": queries_digest(spec.queries, spec.corpus.classes) if spec.queries else "",
        "corpus": corpus_digest(shards, relative),
        **digests,
    }


def input_files(spec: Spec) -> dict[str, dict[str, str]]:
    """Name, as in `resolved.digests` -> file -> sha256, of each model, tokenizer and adapter. Raises InputError, StorageError."""
    found = {name: model_files(uri, patterns) for name, _, uri, patterns in _model_inputs(spec)}
    for place, member in enumerate(spec.ensemble, start=1):
        name = member_digest(place)
        try:
            found[name] = model_files(member.weights_uri)
        except InputError as error:
            raise InputError(f"{name}: {error.message}", error.hint) from error
    return found


def _model_inputs(spec: Spec) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Name in `resolved.digests`, field, URI and patterns of what a spec names of models; further members aside."""
    for section in MODEL_URIS:
        patterns = TOKENIZER_FILES if section == "task" else MODEL_FILES
        for name, uri in model_uris(section, getattr(spec, section)).items():
            yield _SHORT.get(f"{section} {name}", f"{section} {name}"), f"{section}.{name}", uri, patterns


def as_frozen(run: Run) -> AbstractContextManager[None]:
    """Around loads of a run's model, task and producer: their files must be what the run was frozen with, else InputError."""
    files = run.resolved.files
    return loaded_as_frozen(
        [FrozenFiles(field, uri, patterns, files[name]) for name, field, uri, patterns in _model_inputs(run.spec)]
    )


def member_digest(place: int) -> str:
    """Name of the digest of a member's weights in that of its ensemble."""
    return f"ensemble.{place - 1}.weights_uri" if place else "weights"


def files_of_model(field: str, section: Section) -> list[FrozenFiles]:
    """What a model's section names, as it is now; `field` is the section's place in its spec. Raises InputError, StorageError."""
    uris = model_uris("model", section)
    return [FrozenFiles(f"{field}.{name}", uri, MODEL_FILES, model_files(uri)) for name, uri in uris.items()]


def without_copies(
    spec: Spec, files: Mapping[str, dict[str, str]], found: Mapping[str, Sequence[str]]
) -> tuple[Spec, dict[str, dict[str, str]], dict[str, list[str]]]:
    """An ensemble without the weights of which a glob found copies, as of a last checkpoint that `model` is a copy of.

    Args:
        spec: With members that globs found.
        files: See `input_files`.
        found: Glob -> weights that it found.

    Returns:
        The three arguments without the copies.

    Raises:
        SpecError: A glob found nothing but copies.
    """
    by_glob = {uri for uris in found.values() for uri in uris}
    uris = [member.weights_uri for member in spec.ensemble]
    known = {_weights(files[member_digest(0)])} if spec.ensemble else set()
    known |= {_weights(files[member_digest(p)]) for p, uri in enumerate(uris, 1) if uri not in by_glob}
    members, copies = [], []
    kept_files = {name: some for name, some in files.items() if not name.startswith("ensemble.")}
    for place, (uri, member) in enumerate(zip(uris, spec.ensemble, strict=True), start=1):
        weights = _weights(files[member_digest(place)])
        if uri in by_glob and weights in known:
            copies.append(uri)
            continue
        known.add(weights)
        members.append(member)
        kept_files[member_digest(len(members))] = files[member_digest(place)]
    if copies:
        say(f"left out of the ensemble, since they hold the weights of other members: {', '.join(copies)}")
    kept = {glob: [uri for uri in some if uri not in copies] for glob, some in found.items()}
    for glob, some in kept.items():
        if not some:
            raise SpecError(f"ensemble: {glob} matches nothing but copies of other members", "check the glob")
    return spec.model_copy(update={"ensemble": members}), kept_files, kept


def _weights(files: Mapping[str, str]) -> tuple[str, ...]:
    """Digests of the files that hold tensors: the same weights may lie beside another tokenizer or config."""
    return tuple(sorted(digest for name, digest in files.items() if not name or name.endswith(".safetensors")))


def _require_different_members(spec: Spec, digests: Mapping[str, str]) -> None:
    """See that no weights come twice in an ensemble. Raises SpecError."""
    known: dict[str, str] = {}
    for place in range(len(spec.ensemble) + 1 if spec.ensemble else 0):
        name = member_digest(place)
        if (before := known.setdefault(digests[name], name)) != name:
            field = "model.weights_uri" if before == "weights" else before
            hint = "to make a model count more, give it a `weight`"
            raise SpecError(f"{name}: {spec.ensemble[place - 1].weights_uri} holds the same weights as {field}", hint)


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
