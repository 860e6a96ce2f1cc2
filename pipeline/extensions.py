"""From a word in the spec to an object: built-in by a table, your own by `package.module:Class`.

One mechanism serves tasks, producers, loaders and formats; the folders' `__init__` hold the tables.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from . import formats, loaders, producers, tasks
from .batches import Arrays, Inputs
from .choices import ModelSection, ProducerSection, TaskSection
from .errors import ContractError
from .formats.base import Format
from .importing import construct, user_code

if TYPE_CHECKING:
    from torch.nn import Module

    from .loaders.base import Loader
    from .producers.base import Producer
    from .tasks.base import Task


def load_format(name: str, keywords: Mapping[str, Any]) -> Format:
    """The reader of a corpus format. Raises SpecError."""
    return cast(Format, construct(name, formats.BUILTIN, keywords, "corpus.format"))


def load_task(section: TaskSection) -> Task:
    """The task a spec names. Raises SpecError; ContractError, if its `sampled` is not called as `Samples` says."""
    task = construct(section.implementation, tasks.BUILTIN, section.keywords, "task")
    sampled = getattr(task, "sampled", None)
    try:
        if sampled is not None:
            inspect.signature(sampled).bind(None, None, uniforms=None)
    except TypeError as error:
        raise ContractError(
            f"task: {section.implementation}: got sampled{inspect.signature(sampled)}, expected "  # type: ignore[arg-type]
            "sampled(model, batch, uniforms)",
            "uniforms(*shape) gives random numbers [B, *shape] of each row's own, uniform in (0, 1): see pipeline/tasks/base.py",
        ) from error
    return cast("Task", task)


def prepared(task: Task, arrays: Mapping[str, np.ndarray]) -> Inputs:
    """Decoded columns as the task's model takes them: texts as tokens, else as it is. Raises what its `encode` does."""
    encode = getattr(task, "encode", None)
    return cast("Inputs", Arrays(arrays) if encode is None else encode(arrays))


def load_producer(section: ProducerSection) -> Producer:
    """The producer a spec names. Raises SpecError."""
    return cast("Producer", construct(section.implementation, producers.BUILTIN, section.keywords, "producer"))


def needs_query(producer: Producer) -> bool:
    """Whether a producer tunes on queries; one that does not has a single counterpart."""
    return bool(getattr(producer, "needs_query", True))


def sees_corpus(producer: Producer) -> bool:
    """Whether a producer wants to see rows of the corpus (a SampleProducer or CorpusProducer), else queries alone."""
    return getattr(producer, "sample_rows", 0) != 0


def is_joint(producer: Producer) -> bool:
    """Whether all workers make all counterparts together (a SampleProducer), else they share out the queries."""
    return hasattr(producer, "produce_all")


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
        NumericsError: They are not finite.
    """
    with user_code(f"model: {section.implementation}"):
        return load_loader(section).load(device=device, seed=seed)


def load_loader(section: ModelSection) -> Loader:
    """The loader a spec names, without its model. Raises SpecError."""
    return cast("Loader", construct(section.implementation, loaders.BUILTIN, section.keywords, "model"))
