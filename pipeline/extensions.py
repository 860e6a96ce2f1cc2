"""From a word in the spec to an object: built-in by a table, your own by `package.module:Class`.

One mechanism serves tasks, producers, loaders and formats; the folders' `__init__` hold the tables.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from . import formats, loaders, producers, tasks
from .errors import ClusterError, ContractError, PipelineError, SpecError
from .formats.base import Format
from .spec import ModelSection, ProducerSection, TaskSection

if TYPE_CHECKING:
    from torch.nn import Module

    from .loaders.base import Loader
    from .producers.base import Producer
    from .tasks.base import Task


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


def load_format(name: str, keywords: Mapping[str, Any]) -> Format:
    """The reader of a corpus format. Raises SpecError."""
    return cast(Format, construct(name, formats.BUILTIN, keywords, "corpus.format"))


def load_task(section: TaskSection) -> Task:
    """The task a spec names. Raises SpecError."""
    return cast("Task", construct(section.implementation, tasks.BUILTIN, section.keywords, "task"))


def load_producer(section: ProducerSection) -> Producer:
    """The producer a spec names. Raises SpecError."""
    return cast("Producer", construct(section.implementation, producers.BUILTIN, section.keywords, "producer"))


def load_model(section: ModelSection, device: str, seed: int) -> Module:
    """The base model a spec names, in eval mode on its device.

    Args:
        section: From the spec.
        device: torch device, `cpu` or `cuda`.
        seed: Seeds torch before the model is made, for factories that draw weights.

    Raises:
        SpecError: The loader or factory cannot be imported.
        InputError: The weights cannot be read.
        ContractError: The weights do not fit the model.
    """
    loader = cast("Loader", construct(section.implementation, loaders.BUILTIN, section.keywords, "model"))
    return loader.load(device=device, seed=seed)


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Around code of a model, task or producer: whatever it raises says what was being done.

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
            raise ClusterError(f"{what}: {error}", "lower score.batch_rows, or give the worker a larger GPU") from error
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ContractError(f"{what}: {kind}: {error} (at {place.filename}:{place.lineno}, {place.name})") from error
