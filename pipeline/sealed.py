"""Bytes with their digest behind them, for objects that nothing vouches for but themselves."""

from __future__ import annotations

import hashlib

DIGEST_BYTES = 32


def sealed(body: bytes) -> bytes:
    """The bytes, and behind them their digest."""
    return body + hashlib.sha256(body).digest()


def unsealed(data: bytes) -> bytes | None:
    """What `sealed` was given; null if it is not what it was."""
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    return body if hashlib.sha256(body).digest() == digest else None
