"""From Arrow columns to arrays a model takes, row by row checked: a row is good as a whole or rejected with its reason.

Columns of numbers and of regular lists are decoded without touching single rows; only the rows that do not fit are
looked at one by one.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .observe import printable
from .records import LANGUAGE, Column, Reject
from .values import python_values

SHOW_CHARS = 60
PICTURES = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that Pillow decodes itself, by no other program, and of which the header has the size."""
MAX_DIGITS = 1000
"""Of an integer in text: Python refuses more than 4,300."""
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.I | re.A)
"""How a number is spelt in text, with blanks around it: ASCII digits, no hexadecimal, no separators of thousands."""
_PLAIN_INTEGER, _PLAIN_NUMBER = "^-?[0-9]{1,18}$", r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"
"""Spellings in them that Arrow reads as Python does, many at a time."""


class _MisfitError(ValueError):
    """A picture can be read, and is none that the column takes."""


def decode(
    table: pa.Table, row_N: np.ndarray, columns: Sequence[Column]
) -> tuple[dict[str, np.ndarray], np.ndarray, list[Reject]]:
    """Decode the columns of a task.

    Args:
        table: N rows with every column that `columns` name.
        row_N: Position of each row in its file, for the rejects.
        columns: What the task reads.

    Returns:
        Column name -> array [G, *shape] of the G good rows; mask [N] of good rows; one Reject per other row.
    """
    good_N = np.ones(len(table), bool)
    rejects: list[Reject] = []
    arrays = {}
    for column in columns:
        arrays[column.name], bad = _column(table, column)
        rejects += [
            Reject(int(row_N[i]), ", ".join(column.columns), printable(got), column.expected)
            for i, got in bad.items()
            if good_N[i]
        ]
        good_N[list(bad)] = False
    if good_N.all():
        return arrays, good_N, rejects
    return {name: array[good_N] for name, array in arrays.items()}, good_N, rejects


def _column(table: pa.Table, column: Column) -> tuple[np.ndarray, dict[int, str]]:
    """Array [N, *shape] with zeros where a row is bad, and what was got in each bad row."""
    if column.dtype in LANGUAGE:
        return _language(table[column.columns[0]].combine_chunks(), column)
    if len(column.columns) == 1:
        return _values(table[column.columns[0]].combine_chunks(), column)
    scalar = Column(column.name, (), column.dtype)
    parts: list[np.ndarray] = []
    bad: dict[int, str] = {}
    for name in column.columns:
        part_N, part_bad = _values(table[name].combine_chunks(), scalar)
        parts.append(part_N)
        bad = {**{i: f"{name}: {got}" for i, got in part_bad.items()}, **bad}
    return np.stack(parts, axis=-1).reshape(len(table), *column.shape), bad


def _language(values: pa.Array, column: Column) -> tuple[np.ndarray, dict[int, str]]:
    """Texts, conversations or token ids as they are: [N] objects, and what was got in each bad row."""
    check = {"text": _a_text, "messages": _a_conversation, "tokens": _token_ids}[column.dtype]
    nothing: Any = "" if column.dtype == "text" else []
    out = np.empty(len(values), object)
    bad: dict[int, str] = {}
    for i, value in enumerate(python_values(values)):
        try:
            out[i] = nothing if column.optional and not value else check(value)
        except ValueError as error:
            bad[i] = str(error)
    return out, bad


def _a_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("null" if value is None else _shorten(repr(value)))
    if not value.strip():
        raise ValueError(f"an empty text {value[:SHOW_CHARS]!r}")
    return value


def _a_conversation(value: Any) -> list[dict[str, Any]]:
    messages = _parsed(value) if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages:
        raise ValueError("null" if value is None else _shorten(repr(value)))
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message without role: {_shorten(repr(message))}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"a message without content: {_shorten(repr(message))}")
    return messages


def _token_ids(value: Any) -> list[int]:
    ids = _parsed(value) if isinstance(value, str) else value
    if not isinstance(ids, list) or not ids:
        raise ValueError("null" if value is None else _shorten(repr(value)))
    if wrong := [each for each in ids if not isinstance(each, int) or isinstance(each, bool)]:
        raise ValueError(f"{_shorten(repr(wrong[0]))} among the token ids")
    return ids


def _values(values: pa.Array, column: Column) -> tuple[np.ndarray, dict[int, str]]:
    size = math.prod(column.shape)
    numbers = _plain_numbers(values, column) if pa.types.is_string(values.type) and size == 1 else values
    fits_N = _regular(numbers, column, size)
    out = np.zeros((len(values), size), column.dtype)
    bad: dict[int, str] = {}
    dense = _dense(numbers.filter(pa.array(fits_N)) if not fits_N.all() else numbers, size)
    if dense is None:
        fits_N = np.zeros(len(values), bool)
    else:
        bad = {int(np.flatnonzero(fits_N)[i]): got for i, got in _not_numbers(dense, column).items()}
        if bad:
            dense = dense.copy()
            dense[[row for row, i in enumerate(np.flatnonzero(fits_N)) if int(i) in bad]] = 0
        out[fits_N] = dense
    for i, value in zip(np.flatnonzero(~fits_N).tolist(), python_values(_others(values, fits_N)), strict=True):
        try:
            out[i] = decode_value(value, column).reshape(-1)
        except (ValueError, TypeError, OverflowError) as error:
            bad[i] = str(error)
    return out.reshape(len(values), *column.shape), bad


def _others(values: pa.Array, fits_N: np.ndarray) -> pa.Array:
    return values.filter(pa.array(~fits_N)) if fits_N.any() else values  # no copy of a shard of pictures


def _plain_numbers(texts: pa.Array, column: Column) -> pa.Array:
    """Texts (CSV knows no other values) as numbers, null where one is not spelt plainly: each by itself, whatever the others."""
    integers = column.dtype.startswith("int")
    plain_N = pc.match_substring_regex(texts, _PLAIN_INTEGER if integers else _PLAIN_NUMBER)
    return pc.if_else(plain_N, texts, pa.scalar(None, pa.string())).cast(pa.int64() if integers else pa.float64())


def _regular(values: pa.Array, column: Column, size: int) -> np.ndarray:
    """Mask [N] of rows that may be decoded together: valid numbers, or valid lists of the column's shape."""
    if not _is_list(values.type):
        valid_N = values.is_valid().to_numpy(zero_copy_only=False)
        return np.asarray(valid_N & (size == 1 and not _no_number(values.type)), bool)
    inner = _inner_shape(values.flatten())
    lengths_N = pc.list_value_length(values).fill_null(-1).to_numpy(zero_copy_only=False)
    if inner is None:
        return np.zeros(len(values), bool)
    return np.isin(lengths_N, [length for length in np.unique(lengths_N) if _same_shape((int(length), *inner), column)])


def _inner_shape(values: pa.Array) -> tuple[int, ...] | None:
    """Shape that all elements have in common; null if they differ."""
    if not _is_list(values.type):
        return ()
    lengths = np.unique(pc.list_value_length(values).fill_null(-1).to_numpy(zero_copy_only=False))
    inner = _inner_shape(values.flatten())
    return (int(lengths[0]), *inner) if len(lengths) == 1 and lengths[0] >= 0 and inner is not None else None


def _same_shape(shape: tuple[int, ...], column: Column) -> bool:
    """Whether values of this shape are the column's: flat, or nested in the same order, where axes of 1 do not matter."""
    if len(shape) <= 1:
        return math.prod(shape) == math.prod(column.shape)
    return [axis for axis in shape if axis != 1] == [axis for axis in column.shape if axis != 1]


def _dense(values: pa.Array, size: int) -> np.ndarray | None:
    """Numbers [N, size], or null if the lists turn out ragged, hold nulls, or hold no numbers."""
    leaf = values
    while _is_list(leaf.type):
        leaf = leaf.flatten()
    if leaf.null_count or len(leaf) != len(values) * size or _no_number(leaf.type):
        return None
    return np.asarray(leaf.to_numpy(zero_copy_only=False)).reshape(len(values), size)


def _not_numbers(dense: np.ndarray, column: Column) -> dict[int, str]:
    """Rows of [N, size] with a value that the column's dtype cannot hold."""
    if column.dtype.startswith("int"):
        limits = np.iinfo(column.dtype)
        fine = (dense >= limits.min) & (dense < 2.0**63 if dense.dtype.kind == "f" else dense <= limits.max)
        if dense.dtype.kind == "f":
            fine &= dense == np.floor(dense)
    elif dense.dtype.kind == "f":
        fine = np.abs(dense) <= np.finfo(column.dtype).max  # false for NaN and infinities
    else:
        return {}
    rows = np.flatnonzero(~fine.all(axis=1))
    return {int(i): _misfit(dense[i], int(np.argmin(fine[i]))) for i in rows}


def _misfit(values: np.ndarray, position: int) -> str:
    return f"{values[position]}" if values.size == 1 else f"{values[position]} at position {position}"


def decode_value(value: Any, column: Column) -> np.ndarray:
    """One row's value, whatever its form, as numbers of the column's size. Raises ValueError whose text says what was got."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):  # an image as Hugging Face stores it
        value = value["bytes"]
    if value is None:
        raise ValueError("null")
    if isinstance(value, bytes):
        return _image(value, column)
    shown = value
    if isinstance(value, str):
        value = _number(value, column) if math.prod(column.shape) == 1 else None
        value = _parsed(shown) if value is None else value
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        raise ValueError(f"ragged lists {_shorten(repr(shown))}") from None
    if array.dtype.kind not in "iufb":
        raise ValueError(_shorten(repr(shown)))
    if not _same_shape(array.shape, column):
        raise ValueError(f"{'x'.join(map(str, array.shape)) or '1'} values")
    if misfits := _not_numbers(array.reshape(1, -1), column):
        raise ValueError(misfits[0])
    return array


def _number(text: str, column: Column) -> int | float | None:
    """The number that a text spells, or null."""
    text = text.strip()
    if column.dtype.startswith("int") and _INTEGER.fullmatch(text) and len(text) < MAX_DIGITS:
        return int(text)  # not by way of a float: all 64 bits count
    return float(text) if _NUMBER.fullmatch(text) else None


def _parsed(text: str) -> Any:
    """What a text says as JSON. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(_shorten(repr(text))) from None


def _image(data: bytes, column: Column) -> np.ndarray:
    """Image bytes as floats in [0, 1], (C, H, W) or (H, W) as the column's shape asks."""
    from PIL import Image

    if not column.is_image:
        raise ValueError(f"{len(data)} bytes")
    gray = len(column.shape) == 2 or column.shape[0] == 1
    try:
        with Image.open(io.BytesIO(data), formats=PICTURES) as image:
            if (image.height, image.width) != tuple(
                column.shape[-2:]
            ):  # by its header: what would be too large is not decoded
                raise _MisfitError(f"an image of {image.height}x{image.width}")
            if image.mode.startswith(("I", "F")):  # Pillow would clip 16 bits to 8
                raise _MisfitError(f"an image of mode {image.mode}, not 8 bits per channel")
            pixels = np.asarray(image.convert("L" if gray else "RGB"), np.float32) / 255
    except _MisfitError:
        raise
    except Exception as error:  # noqa: BLE001  foreign bytes make decoders raise almost anything
        why = _shorten(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ValueError(f"an image that cannot be decoded ({why}; {len(data)} bytes)") from None
    return pixels if gray else pixels.transpose(2, 0, 1)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _no_number(kind: pa.DataType) -> bool:
    return not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _shorten(text: str) -> str:
    return text if len(text) <= SHOW_CHARS else text[:SHOW_CHARS] + "..."


def type_problem(kind: pa.DataType, column: Column) -> str:
    """Why a column of this Arrow type can never be decoded; empty if it can, or if only its rows can tell."""
    if column.dtype in LANGUAGE:
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        fits = is_text or pa.types.is_null(kind) or (column.dtype != "text" and _is_list(kind))
        return "" if fits else f"got {kind}, expected {column.expected}"
    leaf, depth = kind, 0
    while _is_list(leaf):
        leaf, depth = leaf.value_type, depth + 1
    size = math.prod(column.shape) if len(column.columns) == 1 else 1
    if pa.types.is_null(leaf):  # text formats know no types
        fits = True
    elif _no_number(leaf):
        fits = column.is_image and depth == 0 and (pa.types.is_binary(leaf) or pa.types.is_struct(leaf))
    else:
        fits = (depth > 0 or size == 1) and not (column.dtype.startswith("int") and pa.types.is_floating(leaf))
    return "" if fits else f"got {kind}, expected {column.expected}"
