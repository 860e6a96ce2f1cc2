"""What fsspec's `info` says of an object, by whatever names its file system has for that."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
"""Names of the time of the last change."""


def modified_s(info: dict[str, Any]) -> float:
    """When it was last written, in Unix seconds; infinite if that is not said: gc takes it for young and spares it."""
    value = next((info[name] for name in _TIMES if info.get(name)), math.inf)
    return value.timestamp() if isinstance(value, datetime) else float(value)


def version(info: dict[str, Any]) -> str:
    """Its state: its ETag, or the time of its last change."""
    return str(next((info[name] for name in ("ETag", "etag", *_TIMES) if info.get(name)), ""))
