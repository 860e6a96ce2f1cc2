"""From `package.module:attribute` in a spec to the object, and the fence around code that is not ours."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from .errors import ClusterError, ContractError, PipelineError, SpecError


def resolve(name: str, field: str) -> Callable[..., Any]:
    """The object at `package.module:attribute`.

    Args:
        name: Where it is.
        field: The spec's field, for messages.

    Raises:
        SpecError: The module cannot be found, or lacks the attribute.
        ContractError: The module fails while it is imported.
    """
    module_name, _, attribute = name.partition(":")
    with user_code(f"{field}: importing {module_name}"):
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
        ContractError: It fails while it is made.
    """
    factory = resolve(builtin.get(name, name), field)
    try:
        inspect.signature(factory).bind(**keywords)
    except TypeError as error:
        raise SpecError(f"{field}: {name} does not take these options: {error}") from error
    with user_code(f"{field}: {name}"):
        return factory(**keywords)


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around imports of packages that an extra of this one brings.

    Raises:
        SpecError: One is missing; `what` in the spec needs it.
    """
    try:
        yield
    except ImportError as error:
        raise SpecError(f"{what}: {error}", f"pip install 'mirrorscope[{name}]'") from error


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Around code that is not ours, of a model, task or producer: whatever it raises says what was being done.

    Raises:
        ClusterError: The accelerator's memory is too small.
        ContractError: Anything else that is not one of our own errors.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # user code may raise anything; it is named and passed on
        kind = type(error).__name__
        if kind == "OutOfMemoryError":
            raise ClusterError(
                f"{what}: {error}", "lower score.batch_rows (of texts: batch_tokens), or give the worker a larger GPU"
            ) from error
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ContractError(f"{what}: {kind}: {error} (at {place.filename}:{place.lineno}, {place.name})") from error
