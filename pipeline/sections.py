"""What sections of a spec are made of: frozen pydantic models, URIs without secrets, and the choice of an implementation."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from .observe import has_credentials


def unknown_word(word: str, known: Iterable[str]) -> str:
    """Say that a word is not known, with the nearest one that is."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{word!r} is not known; {guess}known: {', '.join(known)}"


def without_password(uri: str) -> str:
    """Refuse a URI that carries a secret: it would stand in run.yaml, in messages and in logs."""
    if has_credentials(uri):
        raise ValueError("a URI with a password; credentials belong in the environment")
    return uri


Uri = Annotated[str, Field(min_length=1), AfterValidator(without_password)]


class Section(BaseModel):
    """Part of the tree: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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
