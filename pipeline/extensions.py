"""From a word in the spec to an object: built-in by a table, your own by `package.module:Class`.

One mechanism serves tasks, producers, loaders and formats; the folders' `__init__` hold the tables.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from . import formats, loaders, producers, tasks
from .errors import ClusterError, ContractError, PipelineError
from .formats.base import Format
from .importing import construct
from .spec import ModelSection, ProducerSection, TaskSection

if TYPE_CHECKING:
    from torch.nn import Module

    from .loaders.base import Loader
    from .producers.base import Producer
    from .tasks.base import Task


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
