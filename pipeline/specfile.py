"""Specs as files: YAML and `--set` in, a Spec or one SpecError with every problem out, and back to YAML."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from . import storage
from .choices import HfTransformers, LanguageTask
from .errors import InputError, SpecError
from .judge import Judge
from .sections import Extension, Section, unknown_word
from .spec import Spec

_Tree = TypeVar("_Tree", bound=Section)


def load_spec(uri: str, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec.

    Args:
        uri: YAML file, local or any fsspec URI.
        overrides: `path=value` each, as in `producer.lr=0.01`; values are YAML. They win over the file.

    Raises:
        SpecError: The file is missing or not YAML, an override is malformed, or the tree is wrong; every problem is
            named with its path.
    """
    return parse_spec(_read_tree(uri), overrides, origin=uri)


def load_judge(uri: str, overrides: Sequence[str] = ()) -> Judge:
    """Read what is to be judged, and how. Raises SpecError as `load_spec` does."""
    return parse_tree(Judge, _read_tree(uri), overrides, origin=uri)


def _read_tree(uri: str) -> Any:
    try:
        return yaml.safe_load(storage.read_bytes(uri))
    except InputError as error:
        raise SpecError(f"spec {error.message}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"spec {uri} is not YAML: {error}") from error


def parse_spec(tree: Any, overrides: Sequence[str] = (), origin: str = "spec") -> Spec:
    """A parsed YAML tree as a Spec; `origin` names it in messages. Raises SpecError as `load_spec` does."""
    return _with_tokenizer(parse_tree(Spec, tree, overrides, origin))


def parse_tree(kind: type[_Tree], tree: Any, overrides: Sequence[str] = (), origin: str = "spec") -> _Tree:
    """A parsed YAML tree as a tree of sections. Raises SpecError as `load_spec` does."""
    if not isinstance(tree, dict):
        expected = ", ".join(name for name in kind.model_fields if name != "resolved")
        raise SpecError(f"{origin}: got {type(tree).__name__}, expected a mapping with {expected}")
    for override in overrides:
        _override(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(kind, details) for details in error.errors(include_url=False)]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise SpecError(f"{origin}: {count}\n" + "\n".join(f"  {problem}" for problem in problems)) from error


def _with_tokenizer(spec: Spec) -> Spec:
    """The spec with the model's own tokenizer and config, where its task needs them and names none."""
    if not isinstance(spec.task, LanguageTask) or not isinstance(spec.model, HfTransformers):
        return spec
    uris = {name: getattr(spec.task, name) or spec.model.weights_uri for name in ("tokenizer_uri", "config_uri")}
    return spec.model_copy(update={"task": spec.task.model_copy(update=uris)})


def dump_spec(spec: Spec) -> str:
    """A Spec as YAML that loads to an equal Spec."""
    return yaml.safe_dump(
        spec.model_dump(mode="json"), sort_keys=False, width=120
    )  # escapes: raw, YAML loses some line breaks


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise SpecError(f"--set {override}: expected path=value, as in --set producer.lr=0.01")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {override}: the value is not YAML: {error}") from error
    *parents, leaf = path.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise SpecError(f"--set {override}: {parent} is {child!r} in the spec, not a section")
        node = child
    node[leaf] = value


def _problem(kind: type[Section], details: ErrorDetails) -> str:
    """One pydantic error as `path: what (got ...)`."""
    section, path = _walk(kind, details["loc"])
    dotted = ".".join(path)
    match details["type"]:
        case "extra_forbidden":
            return f"{dotted}: {unknown_word(path[-1], section.model_fields if section else ())}{_whose(section)}"
        case "missing":
            return f"{dotted}: missing; {_description(section, path[-1])}".rstrip("; ")
        case "model_type" | "model_attributes_type":
            return f"{dotted}: got {details['input']!r}, expected a mapping, as in {{name: ...}}"
        case "value_error":
            return f"{dotted}: {details['ctx']['error']}".removeprefix(": ")
    return f"{dotted}: {details['msg'][0].lower()}{details['msg'][1:]} (got {details['input']!r})"


def _whose(section: type[Section] | None) -> str:
    """Which implementation's fields were meant, where a section may be of several: the spec need not have named it."""
    if section is None or not issubclass(section, Extension):
        return ""
    word = section.model_fields[section.selector].default
    return f"; these are fields of {word}" if isinstance(word, str) else ""


def _walk(kind: type[Section], loc: Sequence[str | int]) -> tuple[type[Section] | None, list[str]]:
    """The section that holds the last element of a pydantic location, and the location without union tags."""
    section: type[Section] | None = kind
    path: list[str] = []
    position = 0
    while position < len(loc):
        word = str(loc[position])
        path.append(word)
        position += 1
        if position == len(loc) or section is None or word not in section.model_fields:
            continue
        annotation, metadata = section.model_fields[word].annotation, section.model_fields[word].metadata
        choices = _sections(annotation, metadata)
        if len(choices) > 1:
            section = choices.get(str(loc[position]))
            position += 1
        else:
            section = next(iter(choices.values()), None)
    return section, path


def _sections(annotation: Any, metadata: Sequence[Any] = ()) -> dict[str, type[Section]]:
    """Tag -> section for every section that a field's type allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        tag = next((item.tag for item in metadata if hasattr(item, "tag")), annotation.__name__)
        return {tag: annotation} if issubclass(annotation, Section) else {}
    if hasattr(annotation, "__metadata__"):
        inner, *rest = get_args(annotation)
        return _sections(inner, rest)
    if get_origin(annotation) in (Union, types.UnionType, list):
        return {tag: kind for item in get_args(annotation) for tag, kind in _sections(item).items()}
    return {}


def _description(section: type[Section] | None, name: str) -> str:
    field = section.model_fields.get(name) if section else None
    return (field.description or "") if field else ""


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[str]:
    """Leaves at which two trees differ, as `path: before -> after`; what one of them has not is `left out`."""
    found: list[str] = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changed_fields(old, new, f"{path}{key}.")
        elif old != new:
            shown = (repr(tree[key]) if key in tree else "left out" for tree in (before, after))
            found.append(f"{path}{key}: {' -> '.join(shown)}")
    return found


def sections_of(section: type[Section] = Spec, path: str = "") -> dict[str, type[Section]]:
    """Dotted path (and, where there is a choice, the word that chooses) -> section, for documentation."""
    found: dict[str, type[Section]] = {} if path else {"spec": section}
    for name, field in section.model_fields.items():
        choices = _sections(field.annotation, field.metadata)
        for tag, kind in choices.items():
            label = f"{path}{name}" + (f" ({tag})" if len(choices) > 1 else "")
            found |= {label: kind} | sections_of(kind, f"{path}{name}.")
    return found
