"""Members of an ensemble that a glob names, such as checkpoints of one training: found when a run is frozen, in natural order."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import islice

from fsspec.implementations.local import LocalFileSystem

from . import storage
from .errors import InputError, PipelineError
from .formats.base import Listing, has_wildcard, is_hidden, list_files, relative_path
from .model_folder import is_folder
from .observe import say
from .spec import Member, Spec
from .storage_errors import mapped

NAMES_SHOWN = 8
LOOKED_AT = 1000
"""Names of a folder in which checkpoints are looked for unasked: what S3 lists in one request."""
LOOKED_INTO = 64
"""Folders of which it is asked whether they hold a model, a request each; where there are more of a name, none is."""
_CHECKPOINT = re.compile(
    r"(?P<before>(?:.*[^a-z])?(?:step|epoch|checkpoint|ckpt|iter|iteration)s?[-_=.]?)[0-9]+(?P<after>(?:[^0-9].*)?)",
    re.I,
)
"""A name with a number of steps or the like in it."""
Found = dict[str, list[str]]
"""Absolute glob -> absolute URIs of the weights that it found, in natural order."""


def expand(spec: Spec, frozen: Mapping[str, Sequence[str]]) -> tuple[list[Member], Found]:
    """The members of an ensemble with absolute URIs, one for each model that a glob matches.

    A path that exists is that path, whatever characters are in it. The weights of `model`, and of members that are named
    by themselves or found by an earlier glob, are not taken again.

    Args:
        spec: The spec, with globs.
        frozen: What globs found when the run was frozen: they are not looked up again.

    Returns:
        The members, and what each glob found.

    Raises:
        InputError: A glob matches no model; or there is a glob, and `model.weights_uri` does not exist.
        StorageError: The store refuses.
    """
    uris = [storage.absolute(member.weights_uri) for member in spec.ensemble]
    globs = {uri for uri in uris if uri in frozen or _is_glob(uri)}
    if not globs:
        return [_member(uri, one) for uri, one in zip(uris, spec.ensemble, strict=True)], {}
    base_uri = storage.absolute(spec.model.weights_uri or "")
    taken = {_path(uri) for uri in (base_uri, *uris) if uri not in globs}
    members: list[Member] = []
    found: Found = {}
    for place, (uri, one) in enumerate(zip(uris, spec.ensemble, strict=True)):
        if uri not in globs:
            members.append(_member(uri, one))
            continue
        if uri in frozen:
            found[uri] = list(frozen[uri])
        else:
            found[uri] = _look_up(f"ensemble.{place}.weights_uri", uri, base_uri, taken)
        taken |= {_path(each) for each in found[uri]}
        members += [_member(each, one) for each in found[uri]]
    return members, found


def _member(uri: str, like: Member) -> Member:
    return like.model_copy(update={"weights_uri": uri})


def _is_glob(uri: str) -> bool:
    return has_wildcard(_path(uri)) and not storage.exists(uri)


def _path(uri: str) -> str:
    """The path in its store: s3:// and s3a:// are one."""
    return storage.locate(uri)[1].rstrip("/")


def _look_up(field: str, glob: str, base_uri: str, taken: set[str]) -> list[str]:
    """Weights that a glob matches, of the kind of the base's, but for those that are members already."""
    if not storage.exists(base_uri):
        raise InputError(f"model.weights_uri: {base_uri} does not exist")
    folders = is_folder(base_uri)
    listing = _listing(f"{glob}/*" if folders else glob)
    every = [] if listing is None else [file.path for file in listing.files]
    if folders:
        models = {path.rsplit("/", 1)[0] for path in every if path.endswith("/config.json")}
        every = list({path.rsplit("/", 1)[0] for path in every})
    else:
        suffix = os.path.splitext(glob)[1]
        if not suffix or has_wildcard(suffix):
            suffix = os.path.splitext(base_uri)[1]
        models = {path for path in every if path.endswith(suffix)}
    if listing is not None:
        models = {path for path in models if not is_hidden(relative_path(path, listing.root), ".")}
    others = {path for path in models if _path(path) not in taken}
    if not others:
        kind = "folder with a config.json" if folders else "file of weights"
        but = " but the weights of other members" if models else ""
        raise InputError(
            f"{field}: no {kind} matches {glob}{but}",
            f"model.weights_uri is a {'folder' if folders else 'file'}, and so are its members; check the glob",
        )
    chosen = sorted(others, key=natural)
    say(f"{glob}: {len(chosen)} members: {names_of(chosen)}")
    if left := sorted(set(every) - others, key=natural):
        say(f"{glob}: left out, since they are members already or no weights: {names_of(left)}")
    return chosen


def _listing(glob: str) -> Listing | None:
    """What a glob matches; null if that is nothing. Raises StorageError."""
    try:
        return list_files(glob)
    except InputError:
        return None


def names_of(uris: Sequence[str]) -> str:
    """The last parts of some paths, for people."""
    names = [uri.rstrip("/").rsplit("/", 1)[-1] for uri in uris[:NAMES_SHOWN]]
    return ", ".join(names) + (f" and {len(uris) - NAMES_SHOWN} more" if len(uris) > NAMES_SHOWN else "")


def natural(path: str) -> tuple[list[str | int], str]:
    """Sort key by which step-900 comes before step-1000."""
    parts = re.split(r"([0-9]+)", path)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path


def beside(weights_uri: str) -> tuple[str, int] | None:
    """A glob of other checkpoints that lie beside a model's weights or inside its folder, and how many it matches.

    They are told by their names, as step-500.safetensors, epoch_3.pt or checkpoint-500/. At most `LOOKED_AT` names of a folder
    are looked at, on local disks and S3; a folder that cannot be listed has none.

    Args:
        weights_uri: File of weights, or folder of a model.

    Returns:
        Glob and number, of the names of which there are most; null if there are none.
    """
    uri = storage.absolute(weights_uri)
    try:
        folders = is_folder(uri)
        above, own = uri.rsplit("/", 1)
        suffix = "" if folders else os.path.splitext(own)[1]
        names: dict[str, list[str]] = {}
        for place in (above, uri) if folders else (above,):
            for name in _some_names(place or "/"):
                glob = _glob_of(place, name, suffix)
                if glob is not None and f"{place}/{name}" != uri:
                    names.setdefault(glob, []).append(f"{place}/{name}")
        for glob, some in sorted(names.items(), key=lambda one: (-len(one[1]), one[0])):
            if folders and len(some) <= LOOKED_INTO:
                some = [name for name in some if storage.exists(f"{name}/config.json")]
            if some:
                return glob, len(some)
    except PipelineError:  # a hint is not worth an error
        pass
    return None


def _glob_of(folder: str, name: str, suffix: str) -> str | None:
    """The glob of checkpoints that are called like one, if it is called like one; those of other suffixes are not."""
    called = _CHECKPOINT.fullmatch(name.removesuffix(suffix)) if name.endswith(suffix) else None
    if called is None or has_wildcard(f"{folder}/{name}"):
        return None
    return f"{folder}/{called['before']}*{called['after']}{suffix}"


def _some_names(folder: str) -> list[str]:
    """Some names of what lies directly in a folder, by one request. Raises StorageError, InputError."""
    fs, path = storage.locate(folder)
    if isinstance(fs, LocalFileSystem):
        with mapped(folder), os.scandir(path) as entries:
            return [entry.name for entry in islice(entries, LOOKED_AT)]
    if not hasattr(fs, "call_s3"):
        return []
    bucket, _, key = path.partition("/")
    prefix = f"{key}/" if key else ""
    asked = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/", "MaxKeys": LOOKED_AT}
    page = storage.retried(folder, lambda: fs.call_s3("list_objects_v2", **asked))
    keys = [each["Key"] for each in page.get("Contents", [])]
    keys += [each["Prefix"].rstrip("/") for each in page.get("CommonPrefixes", [])]
    return [name for key in keys if (name := key.removeprefix(prefix))]
