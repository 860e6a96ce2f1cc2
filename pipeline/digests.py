"""What a run was made of, by contents: digests of its queries, its weights, and of the corpus as it was listed."""

from __future__ import annotations

from collections.abc import Sequence

from . import storage
from .corpus import open_format
from .formats.base import corpus_root, relative_path
from .model_folder import MODEL_FILES, TOKENIZER_FILES, model_digest
from .plan import corpus_digest
from .records import Shard, SourceFile
from .spec import QueriesSection, Spec

MODEL_URIS = {
    "model": ("weights_uri", "adapter_uri"),
    "task": ("tokenizer_uri", "config_uri"),
    "producer": ("weights_uri", "adapter_uri"),
}
"""Fields of sections that name weights, or a folder of a model: made absolute, and by their contents part of a run's identity."""
_SHORT = {"model weights_uri": "weights"}


def input_digests(spec: Spec, shards: Sequence[Shard]) -> dict[str, str]:
    """What decides the scores besides the spec: name -> digest. Raises InputError, StorageError."""
    root = corpus_root(spec.corpus.uri)
    relative = {path: relative_path(path, root) for path in {shard.path for shard in shards}}
    digests = {
        "queries": queries_digest(spec.queries, spec.corpus.classes) if spec.queries else "",
        "corpus": corpus_digest(shards, relative),
    }
    for section, names in MODEL_URIS.items():
        read = TOKENIZER_FILES if section == "task" else MODEL_FILES
        for name in names:
            if (uri := getattr(getattr(spec, section), name, None)) is not None:
                digests[_SHORT.get(f"{section} {name}", f"{section} {name}")] = model_digest(uri, read)
    return digests


def queries_digest(section: QueriesSection, classes: Sequence[str] | None) -> str:
    """sha256 of the contents of all query files. Raises InputError, StorageError."""
    reader, _ = open_format(section.uri, section.format, classes)
    contents = [digest for file in reader.files(section.uri) for digest in _content_digests(file)]
    return storage.bytes_digest("\n".join(contents).encode())


def _content_digests(file: SourceFile) -> list[str]:
    paths = [file.path] if file.members is None else [f"{file.path}/{member}" for member in file.members]
    return [storage.file_digest(path) for path in paths]
