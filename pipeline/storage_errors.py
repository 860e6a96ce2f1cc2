"""What file systems raise, as our own errors: fsspec, s3fs over botocore, pyarrow. What is foreign is known here only."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import InputError, PipelineError, StorageError, UnavailableError
from .observe import has_credentials

_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PASSING = (errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.EREMOTEIO)
"""s3fs: EBUSY for SlowDown, ServiceUnavailable and 409; EREMOTEIO for InternalError."""
_FOREIGN = ("botocore", "aiobotocore", "aiohttp", "urllib3", "s3fs", "fsspec")
_REFUSALS = re.compile(r"Credential|ParamValidation|Profile|Region|ConfigParse|Partial|UnknownEndpoint|InvalidEndpoint")
_AWS_ERROR = re.compile(r"AWS Error (?:\[code \d+\]|(\w+)(?: \(HTTP status (\d+)\))?) during")
"""How pyarrow says what S3 answered; the status stands where the answer had no body, as to every HEAD."""
_PASSING_STATUS = re.compile(r"5\d\d|429|408")
_AWS_REFUSALS = ("DENIED", "INVALID", "SIGNATURE", "MISSING", "VALIDATION", "MALFORMED", "OPT_IN", "UNRECOGNIZED")
_ENVIRONMENT = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL in the environment, of workers too"
_DENIED = "check the path's permissions or the credentials in the environment, of workers too"


def require_no_credentials(uri: str) -> None:
    """Refuse a URI that lets anybody in who reads it. Raises StorageError, which does not repeat them."""
    if has_credentials(uri):
        raise StorageError(f"{uri}: a URI with credentials in it", "put them into the environment")


@contextmanager
def mapped(uri: str) -> Iterator[None]:
    """Map what file systems raise: a missing file is an InputError, anything else a StorageError.

    Raises:
        InputError: Nothing is there.
        UnavailableError: The store did not answer or asked to slow down: the same may work in a moment.
        StorageError: It refused.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # what is no store's doing goes on as it was
        ours = as_ours(uri, error)
        if ours is None:
            raise
        raise ours from error


def is_store_error(error: OSError) -> bool:
    """Whether an OSError came from the store; pyarrow raises bare ones, without a number, for damaged files as well."""
    return error.errno is not None or type(error) is not OSError or bool(_AWS_ERROR.search(str(error)))


def is_taken(error: BaseException) -> bool:
    """Whether a conditional PUT was refused because something stands there; stores and s3fs versions say it in three ways."""
    if isinstance(error, FileExistsError):
        return True
    return _s3_code(error) in ("PreconditionFailed", "412")


def _s3_code(error: BaseException) -> str:
    """What S3 called it, where s3fs hands that on."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def as_ours(uri: str, error: Exception) -> PipelineError | None:
    """The error of our tree that a foreign one is, if it is a store's."""
    if isinstance(error, ValueError) and "Invalid endpoint" in str(error):  # botocore has no error of its own for it
        return StorageError(f"{uri}: {error}", "AWS_ENDPOINT_URL is a URL, as in http://host:port")
    if not type(error).__module__.startswith(_FOREIGN):  # of botocore's own some are OSErrors too, without a number
        return _of_os_error(uri, error) if isinstance(error, OSError) else None
    name = type(error).__name__
    if "Credential" in name:
        return StorageError(f"{uri}: {error}", _ENVIRONMENT)
    if _REFUSALS.search(name) or name == "ClientError":
        return StorageError(f"{uri}: {error}")
    return UnavailableError(f"{uri}: {error or name}", _ENVIRONMENT)


def _of_os_error(uri: str, error: OSError) -> PipelineError:
    if _s3_code(error) == "NoSuchBucket":
        return StorageError(f"{uri}: the bucket does not exist", "make it, or check the URI and AWS_ENDPOINT_URL")
    if isinstance(error, _MISSING) or (error.errno is None and str(error).endswith("is a directory")):
        return InputError(f"{uri} does not exist or is not a file")
    if isinstance(error, PermissionError):
        return StorageError(f"{uri}: access denied ({error.strerror or error})", _DENIED)
    if error.errno in _FULL:
        return StorageError(
            f"{uri}: {error.strerror}", "make room, then run the same command again: it goes on from there"
        )
    answered = _AWS_ERROR.search(str(error))
    if answered:
        return _of_aws_answer(uri, str(answered[1] or ""), str(answered[2] or ""), str(error))
    if isinstance(error, TimeoutError | ConnectionError) or error.errno in _PASSING:
        return UnavailableError(f"{uri}: {error or type(error).__name__}", _ENVIRONMENT)
    return StorageError(f"{uri}: {error}")


def _of_aws_answer(uri: str, word: str, status: str, message: str) -> PipelineError:
    """What pyarrow's S3 says in one line of text alone."""
    if "DENIED" in word or "SIGNATURE" in word or "ACCESS_KEY" in word:
        return StorageError(f"{uri}: access denied ({word})", _DENIED)
    if word.startswith("NO_SUCH") or word.endswith("NOT_FOUND"):
        return InputError(f"{uri} does not exist or is not a file")
    if any(refusal in word for refusal in _AWS_REFUSALS) or (status and not _PASSING_STATUS.fullmatch(status)):
        return StorageError(f"{uri}: {message}")
    return UnavailableError(f"{uri}: {message}", _ENVIRONMENT)
