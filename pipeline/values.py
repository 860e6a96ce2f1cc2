"""Columns of JSON values, where every value is of a type of its own, and columns of any kind as text.

A column whose values have one type is that Arrow type; any other holds the JSON text of every value (`arrow.json`). So what a
value is does not depend on the values that are read with it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

from .errors import InputError

_MARK = {b"values": b"json"}
"""Metadata of a field whose values come from JSON: its type is that of the values at hand, no declared one."""
EXACT = 1 << 53
"""Integers up to it are floats without loss."""
_SCALARS = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}


def json_field(name: str, kind: pa.DataType) -> pa.Field:
    """The field of a column that `json_column` made."""
    return pa.field(name, kind, metadata=_MARK)


def json_column(values: Sequence[Any]) -> pa.Array:
    """Values as `json.loads` gives them as one column: of their Arrow type where all have the same, else of JSON texts.

    In a list of numbers that has a float, integers are floats too.
    """
    kind = _one_type([value for value in values if value is not None])
    if kind is None:
        values = [_as_floats(value) if isinstance(value, list) else value for value in values]
        kind = _one_type([value for value in values if value is not None])
    if kind is not None:
        try:
            return pa.array(values, kind)
        except (pa.ArrowInvalid, OverflowError):  # an integer of more than 64 bits
            pass
    texts = [None if value is None else json.dumps(value) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def _one_type(values: Sequence[Any]) -> pa.DataType | None:
    """The Arrow type that all values have, to the last leaf; null if they differ, or hold nulls that a type would not tell."""
    kinds = set(map(type, values))
    if not kinds:
        return pa.null()
    if len(kinds) > 1:
        return None
    [kind] = kinds
    if kind is list:
        leaf = _one_type(list(chain.from_iterable(values)))
        return None if leaf is None else pa.list_(leaf)
    if kind is dict:
        return _one_struct(values)
    return _SCALARS.get(kind)  # of a null in a list there is none


def _as_floats(value: list[Any]) -> list[Any]:
    """A (nested) list of integers and floats as floats: `[0, 0.5]` is what `[0.0, 0.5]` is. Any other list as it is."""
    leaves: list[Any] = value
    depth = 1
    while set(map(type, leaves)) == {list}:
        leaves, depth = list(chain.from_iterable(leaves)), depth + 1
    if set(map(type, leaves)) != {int, float} or any(abs(leaf) > EXACT for leaf in leaves if type(leaf) is int):
        return value
    return _floats(value, depth)


def _floats(value: list[Any], depth: int) -> list[Any]:
    return list(map(float, value)) if depth == 1 else [_floats(inner, depth - 1) for inner in value]


def _one_struct(values: Sequence[dict[str, Any]]) -> pa.DataType | None:
    names = list(values[0])
    if not names or any(list(value) != names for value in values):
        return None
    kinds = {name: _one_type([value[name] for value in values]) for name in names}
    return None if None in kinds.values() else pa.struct(list(kinds.items()))


def is_from_json(field: pa.Field) -> bool:
    """Whether `json_column` made a column."""
    return (field.metadata or {}).get(b"values") == b"json"


def is_json(kind: pa.DataType) -> bool:
    """Whether a column holds JSON texts."""
    return isinstance(kind, pa.JsonType)


def python_values(array: pa.Array) -> Iterator[Any]:
    """A column's values as Python has them, JSON texts parsed, one at a time: a shard of pictures is not held twice."""
    if not is_json(array.type):
        return (value.as_py() for value in array)
    return (None if (text := value.as_py()) is None else json.loads(text) for value in array.storage)


def text_problem(kind: pa.DataType) -> str:
    """Why values of an Arrow type are no text, as ids and sources are; empty if they are, or if each value decides."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_json(plain) or isinstance(plain, pa.UuidType) or _is_bytes(plain):
        return ""
    try:
        pa.array([], plain).cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError):
        return f"got {kind}, expected a type that has a text"
    return ""


def as_text(table: pa.Table, name: str) -> pa.Array:
    """A column as strings: of numbers their digits, of JSON values their JSON text (texts without quotes), of UUIDs their text.

    Bytes of fixed size are hexadecimal digits; other bytes are the text that they spell in UTF-8, or else hexadecimal digits,
    each value by itself.

    Raises:
        InputError: The type has no text.
    """
    field, array = table.schema.field(name), table[name].combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if is_json(array.type) or (is_from_json(field) and _by_value(array.type)):
        return pa.array(map(_json_text, python_values(array)), pa.string())
    if isinstance(array.type, pa.UuidType):
        return pa.array(
            [value if value is None else str(value) for value in map(_uuid, array.storage.to_pylist())], pa.string()
        )
    if _is_bytes(array.type):
        fixed = pa.types.is_fixed_size_binary(array.type)
        return pa.array([_bytes_text(value, fixed) for value in array.to_pylist()], pa.string())
    if problem := text_problem(array.type):
        raise InputError(f"column {name!r}: {problem}")
    return array if pa.types.is_string(array.type) else array.cast(pa.string())


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _by_value(kind: pa.DataType) -> bool:
    """Types whose text Arrow would write otherwise than JSON has it, or not at all."""
    return pa.types.is_floating(kind) or pa.types.is_nested(kind)


def _json_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _uuid(value: bytes | None) -> uuid.UUID | None:
    return None if value is None else uuid.UUID(bytes=value)


def _bytes_text(value: bytes | None, fixed: bool) -> str | None:
    if value is None or fixed:
        return value if value is None else value.hex()
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()


def concat_rows(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of the same columns as one, without columns of `arrow.json`.

    A column whose types differ takes the wider one; where there is none, or where values come from JSON, it becomes text:
    texts as they are, other values as JSON.
    """
    names = list(dict.fromkeys(name for table in tables for name in table.column_names))
    mixed = {name for name in names if _is_mixed(name, tables)}
    try:
        joined = _joined(tables, mixed)
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        mixed |= {name for name in names if len(_kinds(name, tables)) > 1}
        joined = _joined(tables, mixed)
    columns = {name: _settled(name, tables) if name in mixed else joined[name] for name in names}
    fields = [pa.field(name, columns[name].type) if name in mixed else joined.schema.field(name) for name in names]
    return pa.table(list(columns.values()), pa.schema(fields))


def _joined(tables: Sequence[pa.Table], without: Collection[str]) -> pa.Table:
    kept = [table.select([name for name in table.column_names if name not in without]) for table in tables]
    return pa.concat_tables(kept, promote_options="permissive")


def _is_mixed(name: str, tables: Sequence[pa.Table]) -> bool:
    fields = [table.schema.field(name) for table in tables if name in table.column_names]
    marked = any(map(is_from_json, fields))
    kinds = _kinds(name, tables)
    return any(map(is_json, kinds)) or (marked and len(kinds) > 1)


def _kinds(name: str, tables: Sequence[pa.Table]) -> set[pa.DataType]:
    kinds = {table.schema.field(name).type for table in tables if name in table.column_names}
    return {kind for kind in kinds if not pa.types.is_null(kind)}


def _settled(name: str, tables: Sequence[pa.Table]) -> pa.Array:
    """A column of several tables: of JSON values as `json_column` has it, or lists of numbers, or text."""
    values: list[Any] = []
    for table in tables:
        there = name in table.column_names
        values += python_values(table[name].combine_chunks()) if there else [None] * len(table)
    marked = any(name in table.column_names and is_from_json(table.schema.field(name)) for table in tables)
    array = json_column(values) if marked else None
    if array is None or is_json(array.type):
        array = _lists_of_numbers(values)
    if array is not None:
        return array
    return pa.array([v if v is None or isinstance(v, str) else json.dumps(v, default=str) for v in values], pa.string())


def _lists_of_numbers(values: Sequence[Any]) -> pa.Array | None:
    """Lists of integers and floats, such as features and pixels: they are numbers to everyone who reads the table."""
    if not all(value is None or isinstance(value, list) for value in values):
        return None
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return None
    leaf = array.type
    while pa.types.is_list(leaf):
        leaf = leaf.value_type
    return array if pa.types.is_integer(leaf) or pa.types.is_floating(leaf) else None
