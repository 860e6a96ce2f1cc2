"""What sections of a spec are made of: frozen pydantic models, URIs without secrets, and the choice of an implementation."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .observe import has_credentials


def unknown_word(word: str, known: Iterable[str]) -> str:
    """Say that a word is not known, with the nearest one that is."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{word!r} is not known; {guess}known: {', '.join(known)}"


def without_password(uri: str) -> str:
    """Refuse a URI with a password, key or signature in it. Raises ValueError: it would stand in run.yaml and in logs."""
    if has_credentials(uri):
        raise ValueError("a URI with a password, key or signature in it; credentials belong in the environment")
    return uri


Uri = Annotated[str, Field(min_length=1)]


def _texts(value: Any) -> Iterator[str]:
    """The strings in a field's value; nested sections have seen to theirs."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _texts(item)


class Section(BaseModel):
    """Part of the tree: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _without_credentials(cls, value: Any) -> Any:
        """Refuse credentials in any field, arguments of a factory too: run.yaml holds them all."""
        for text in _texts(value):
            without_password(text)
        return value


def is_importable(name: str) -> bool:
    """Whether a word reads as `package.module:attribute`."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


class Extension(Section):
    """A section that names an implementation: a built-in word, or `package.module:Class`."""

    selector: ClassVar[str] = "name"

    @property
    def implementation(self) -> str:
        """The built-in word or `package.module:Class`."""
        return str(getattr(self, self.selector))

    @property
    def keywords(self) -> dict[str, Any]:
        """What the implementation's constructor is called with."""
        return self.model_dump(exclude={self.selector, "preset"})


class Custom(Extension):
    """Your own implementation, in a file outside this repository."""

    builtin: ClassVar[tuple[str, ...]] = ()

    options: dict[str, Any] = {}
    """Keyword arguments of the class."""

    @field_validator("name", "loader", check_fields=False)
    @classmethod
    def _importable_name(cls, value: str) -> str:
        if is_importable(value):
            return value
        raise ValueError(f"{unknown_word(value, cls.builtin)}; or your own: package.module:Class")

    @property
    def keywords(self) -> dict[str, Any]:
        """The options as given, with what else the section holds."""
        return {**self.options, **self.model_dump(exclude={self.selector, "options"})}
