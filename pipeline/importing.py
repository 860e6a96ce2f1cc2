"""From `package.module:attribute` in a spec to the object, with an error that says what is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from .errors import SpecError


def resolve(name: str, field: str) -> Callable[..., Any]:
    """The object at `package.module:attribute`.

    Args:
        name: Where it is.
        field: The spec's field, for messages.

    Raises:
        SpecError: The module cannot be imported, or lacks the attribute.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SpecError(
            f"{field}: {name}: cannot import {module_name}: {error}",
            "run from the folder that holds it, or install it; on a cluster ship it in the job's working_dir",
        ) from error
    if not hasattr(module, attribute):
        raise SpecError(f"{field}: {name}: module {module_name} has no {attribute!r}")
    return cast("Callable[..., Any]", getattr(module, attribute))


def construct(name: str, builtin: Mapping[str, str], keywords: Mapping[str, Any], field: str) -> Any:
    """An implementation, made from the spec's fields.

    Raises:
        SpecError: It cannot be imported, or does not take these keywords.
    """
    factory = resolve(builtin.get(name, name), field)
    try:
        return factory(**keywords)
    except TypeError as error:
        raise SpecError(f"{field}: {name} does not take these options: {error}") from error
