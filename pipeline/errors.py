"""Every error a person can meet, in one tree.

    PipelineError               exit 1
    ├── SpecError               exit 2   the spec is wrong: typo, type, contradiction
    ├── InputError              exit 3   corpus, queries or weights files are missing, unreadable or malformed
    ├── ContractError           exit 4   a model, task or producer does not keep its side of the protocol
    ├── NumericsError           exit 5   losses or weights are not finite
    ├── ArtifactError           exit 6   a run folder is damaged or belongs to another spec
    │   └── ForeignError        exit 6   it holds artifacts of two runs
    ├── StorageError            exit 7   the store refused
    │   └── UnavailableError    exit 7   it did not answer, or asked to slow down, to the last try
    ├── ClusterError            exit 8   Ray cannot give what was asked for, or a worker died too often
    │   └── ClusterLostError    exit 8   Ray's own processes are gone
    └── QuarantineError         exit 9   shards are quarantined; all others are scored

A message says what failed, where, got against expected; the hint says what to do. Errors cross process borders: they
pickle with message and hint.
"""

from __future__ import annotations

from .observe import without_credentials

MAX_NAMES_SHOWN = 8
"""In a message."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says first."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class PipelineError(Exception):
    """Base of all errors that the pipeline raises on purpose.

    Args:
        message: What failed, where, got against expected.
        hint: What the reader can do about it; may be empty.
    """

    exit_code = 1
    retryable = False

    def __init__(self, message: str, hint: str = "") -> None:
        message, hint = without_credentials(message), without_credentials(hint)  # errors go to logs and receipts
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class SpecError(PipelineError):
    """The spec does not say something that can be run."""

    exit_code = 2


class InputError(PipelineError):
    """Corpus, queries or weights cannot be read as the spec describes them."""

    exit_code = 3


class ContractError(PipelineError):
    """A model, task, producer or checkpoint does not fit its protocol."""

    exit_code = 4


class NumericsError(PipelineError):
    """A loss, gradient or weight stopped being a finite number."""

    exit_code = 5


class ArtifactError(PipelineError):
    """A run folder is incomplete, damaged, or was made by another spec."""

    exit_code = 6


class ForeignError(ArtifactError):
    """A run folder holds an artifact that another run made."""


class StorageError(PipelineError):
    """The store refused an operation."""

    exit_code = 7


class UnavailableError(StorageError):
    """The store did not answer or asked to slow down; the same may work later."""

    retryable = True


class ClusterError(PipelineError):
    """Ray cannot give the resources asked for, or workers died too often."""

    exit_code = 8


class ClusterLostError(ClusterError):
    """Ray's own processes are gone: what this process still asks of Ray is never answered."""


class QuarantineError(PipelineError):
    """Shards could not be scored after bounded attempts; every other shard is scored and committed."""

    exit_code = 9
