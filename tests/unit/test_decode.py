"""Decoding: Arrow columns become checked arrays; a row is good as a whole, or rejected with what was got."""

import io
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.decode import decode, type_problem
from pipeline.records import Column, Reject

FIRST_ROW = 100


def column(dtype="float32", shape=(), columns=("x",)):
    return Column("x", tuple(columns), dtype, tuple(shape))


def decoded(values, wanted, kind=None):
    """Array of the good rows, and {position in values: what was got} of the others."""
    table = pa.table({"x": pa.array(values, kind)})
    arrays, good_N, rejects = decode(table, np.arange(FIRST_ROW, FIRST_ROW + len(table)), [wanted])
    assert len(table) - int(good_N.sum()) == len(rejects)
    assert [wanted.expected] * len(rejects) == [reject.expected for reject in rejects]
    return arrays["x"], {reject.row - FIRST_ROW: reject.got for reject in rejects}


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


GRAY = np.arange(20, dtype=np.uint8).reshape(4, 5) * 12
RGB = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=-1)
PAIR, SQUARE = (2,), (2, 2)
LIST, NESTED = pa.list_(pa.float64()), pa.list_(pa.list_(pa.float64()))

GOOD = {
    "integers": ([1, 2], pa.int16(), "float32", (), [1.0, 2.0]),
    "half floats": ([np.float16(0.5)], pa.float16(), "float32", (), [0.5]),
    "booleans": ([True, False], pa.bool_(), "float32", (), [1.0, 0.0]),
    "labels": ([3, 0], pa.uint8(), "int64", (), [3, 0]),
    "labels from integral floats": ([3.0, 0.0], pa.float64(), "int64", (), [3, 0]),
    "lists": ([[1, 2], [3, 4]], LIST, "float32", PAIR, [[1.0, 2.0], [3.0, 4.0]]),
    "large lists": ([[1, 2]], pa.large_list(pa.int8()), "float32", PAIR, [[1.0, 2.0]]),
    "fixed-size lists": ([[1, 2], [3, 4]], pa.list_(pa.float32(), 2), "float32", PAIR, [[1.0, 2.0], [3.0, 4.0]]),
    "a flat list into a shape": ([[1, 2, 3, 4]], LIST, "float32", SQUARE, [[[1.0, 2.0], [3.0, 4.0]]]),
    "nested lists": ([[[1, 2], [3, 4]]], NESTED, "float32", SQUARE, [[[1.0, 2.0], [3.0, 4.0]]]),
    "nested fixed-size lists": (
        [[[1, 2], [3, 4]]],
        pa.list_(pa.list_(pa.int64(), 2), 2),
        "float32",
        SQUARE,
        [[[1.0, 2.0], [3.0, 4.0]]],
    ),
    "lists of integers": ([[7, 8]], pa.list_(pa.int64()), "int64", PAIR, [[7, 8]]),
    "a list of one as a number": ([[7], [8]], LIST, "float32", (), [7.0, 8.0]),
    "text of a number": (["3", " 4.5 "], pa.string(), "float32", (), [3.0, 4.5]),
    "text of a label": (["3", "4.0"], pa.string(), "int64", (), [3, 4]),
    "text of a list": (["[0.5, 2]"], pa.string(), "float32", PAIR, [[0.5, 2.0]]),
    "text of nested lists": (["[[1, 2], [3, 4]]"], pa.string(), "float32", SQUARE, [[[1.0, 2.0], [3.0, 4.0]]]),
}


@pytest.mark.parametrize(("values", "kind", "dtype", "shape", "expected"), GOOD.values(), ids=GOOD)
def test_good_rows_become_arrays_of_the_columns_dtype_and_shape(values, kind, dtype, shape, expected):
    """Numbers, lists, nested lists and their text decode to the same arrays."""
    array, bad = decoded(values, column(dtype, shape), kind)
    assert (expected, {}) == (array.tolist(), bad)
    assert (dtype, (len(values), *shape)) == (str(array.dtype), array.shape)


BAD = {
    "a null number": (1.0, None, pa.float64(), "float32", (), "null"),
    "NaN": (1.0, math.nan, pa.float64(), "float32", (), "nan"),
    "infinity": (1.0, -math.inf, pa.float32(), "float32", (), "-inf"),
    "a fractional label": (1.0, 2.5, pa.float64(), "int64", (), "2.5"),
    "a label that is NaN": (1.0, math.nan, pa.float64(), "int64", (), "nan"),
    "a null list": ([1, 2], None, LIST, "float32", PAIR, "null"),
    "a null fixed-size list": ([1, 2], None, pa.list_(pa.float64(), 2), "float32", PAIR, "null"),
    "a short list": ([1, 2], [1], LIST, "float32", PAIR, "1 values"),
    "an empty list": ([1, 2], [], LIST, "float32", PAIR, "0 values"),
    "a long list": ([1, 2], [1, 2, 3], LIST, "float32", PAIR, "3 values"),
    "NaN in a list": ([1, 2], [1, math.nan], LIST, "float32", PAIR, "nan at position 1"),
    "infinity in a list": ([1, 2], [math.inf, 1], LIST, "float32", PAIR, "inf at position 0"),
    "null in a list": ([1, 2], [1, None], LIST, "float32", PAIR, "[1.0, None]"),
    "a fraction among integers": ([1, 2], [1, 0.5], LIST, "int64", PAIR, "0.5 at position 1"),
    "ragged lists": ([[1, 2], [3, 4]], [[1, 2], [3]], NESTED, "float32", SQUARE, "ragged lists [[1.0, 2.0], [3.0]]"),
    "too few inner lists": ([[1, 2], [3, 4]], [[1, 2]], NESTED, "float32", SQUARE, "1x2 values"),
    "null in nested lists": ([[1, 2], [3, 4]], [[1, 2], None], NESTED, "float32", SQUARE, "ragged lists"),
    "text that is no number": ("1", "abc", pa.string(), "float32", (), "'abc'"),
    "empty text": ("1", "", pa.string(), "float32", (), "''"),
    "text of a fraction for a label": ("1", "0.5", pa.string(), "int64", (), "0.5"),
    "text of NaN": ("1", "NaN", pa.string(), "float32", (), "nan"),
    "text of a number too large": ("1", "1e999", pa.string(), "float32", (), "inf"),
    "text of null": ("1", "null", pa.string(), "float32", (), "'null'"),
    "text of an object": ("1", '{"a": 1}', pa.string(), "float32", (), "'{\"a\": 1}'"),
    "text of half a list": ("[1, 2]", "[1, 2", pa.string(), "float32", PAIR, "'[1, 2'"),
    "text of a short list": ("[1, 2]", "[1]", pa.string(), "float32", PAIR, "1 values"),
    "text of words": ("[1, 2]", '["a", "b"]', pa.string(), "float32", PAIR, '\'["a", "b"]\''),
    "long text": ("1", "a" * 99, pa.string(), "float32", (), "'" + "a" * 59 + "..."),
    "text of lists without end": ("1", "[" * 100_000, pa.string(), "float32", (), "'" + "[" * 59 + "..."),
    "bytes that are no image": (png(GRAY), b"junk", None, "float32", (4, 5), "an image that cannot be decoded"),
    "half an image": (png(GRAY), png(GRAY)[:45], None, "float32", (4, 5), "an image that cannot be decoded"),
    "no bytes": (png(GRAY), b"", None, "float32", (4, 5), "an image that cannot be decoded"),
    "a null image": (png(GRAY), None, None, "float32", (4, 5), "null"),
    "an image of another size": (png(GRAY), png(GRAY.T), None, "float32", (4, 5), "an image of 5x4"),
}


@pytest.mark.parametrize(("good", "bad", "kind", "dtype", "shape", "got"), BAD.values(), ids=BAD)
def test_a_bad_row_is_rejected_and_its_neighbours_are_not(good, bad, kind, dtype, shape, got):
    """The reject says what was got; the rows around it decode as they do alone."""
    array, rejected = decoded([good, bad, good, good], column(dtype, shape), kind)
    alone, _ = decoded([good], column(dtype, shape), kind)
    assert [1] == list(rejected)
    assert got == rejected[1][: len(got)]
    assert np.array_equal(np.concatenate([alone] * 3), array)


TOO_LARGE = {
    "a float beyond float32": (1.0, 1e300, pa.float64(), "float32", ()),
    "a float beyond float32 in a list": ([1, 2], [1, 1e300], LIST, "float32", PAIR),
    "text beyond float32": ("1", "1e300", pa.string(), "float32", ()),
    "a float beyond int64": (1.0, 1e30, pa.float64(), "int64", ()),
    "text beyond int64": ("1", "1e30", pa.string(), "int64", ()),
    "an unsigned integer beyond int64": (1, 2**63 + 1, pa.uint64(), "int64", ()),
    "text of an integer beyond int64": ("1", str(2**63 + 1), pa.string(), "int64", ()),
}


@pytest.mark.parametrize(("good", "bad", "kind", "dtype", "shape"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_value_that_the_dtype_cannot_hold_is_rejected(good, bad, kind, dtype, shape):
    """Nothing overflows or wraps around silently on its way into the array."""
    array, rejected = decoded([good, bad, good], column(dtype, shape), kind)
    assert [1] == list(rejected)
    assert 2 == len(array)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bytes", "Hugging Face struct"])
@pytest.mark.parametrize(
    ("pixels", "shape", "expected"),
    [
        (GRAY, (4, 5), GRAY / 255),
        (GRAY, (1, 4, 5), GRAY[None] / 255),
        (GRAY, (3, 4, 5), np.stack([GRAY] * 3) / 255),
        (RGB, (3, 4, 5), RGB.transpose(2, 0, 1) / 255),
    ],
    ids=["gray", "gray with a channel", "gray as RGB", "RGB"],
)
def test_images_become_floats_from_0_to_1_channels_first(pixels, shape, expected, wrapped):
    """PNG bytes, bare or as Hugging Face stores them, decode to pixels / 255 in the shape asked for."""
    value = {"bytes": png(pixels), "path": "a.png"} if wrapped else png(pixels)
    array, bad = decoded([value, value], column(shape=shape))
    assert {} == bad
    assert np.array_equal(np.float32([expected, expected]), array)


def test_sixteen_bit_gray_images_keep_their_scale():
    """A pixel of 16 bits is divided by 65,535, or its row rejected; it is never clipped to white."""
    pixels = np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000
    array, bad = decoded([png(pixels)], column(shape=(4, 5)))
    assert bad or (pixels / 65535).ravel().tolist() == pytest.approx(array[0].ravel().tolist(), abs=1 / 255)


def test_bytes_for_a_column_that_is_no_image_are_rejected():
    """A shape that cannot be drawn takes no image bytes."""
    _, bad = decoded([b"1234"], column(shape=PAIR))
    assert {0: "4 bytes"} == bad


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 200))
def test_no_damage_to_an_image_stops_the_shard(changes, cut):
    """Whatever stands in an image's bytes, its row is good or rejected, and the next row is good."""
    data = bytearray(png(RGB))
    for position, value in changes:
        data[position % len(data)] = value
    array, bad = decoded([bytes(data[: len(data) - cut]), png(RGB)], column(shape=(3, 4, 5)))
    assert 2 == len(array) + len(bad)
    assert np.array_equal(np.float32(RGB.transpose(2, 0, 1) / 255), array[-1])


def test_several_numeric_columns_are_stacked_in_the_order_named():
    """Numbers and their text stand side by side in the last axis, reshaped to the column's shape."""
    table = pa.table({"a": [1, 2], "b": ["3", "4.5"], "c": [5.0, 6.0], "d": [True, False]})
    stacked = column(shape=SQUARE, columns=["b", "a", "c", "d"])
    arrays, good_N, rejects = decode(table, np.arange(2), [stacked])
    assert [[[3.0, 1.0], [5.0, 1.0]], [[4.5, 2.0], [6.0, 0.0]]] == arrays["x"].tolist()
    assert ([True, True], []) == (good_N.tolist(), rejects)


def test_a_reject_names_which_of_the_stacked_columns_is_bad():
    """With two bad columns the first named one is told."""
    table = pa.table({"a": [1.0, None, 3.0], "b": ["1", "no", "NaN"]})
    arrays, _, rejects = decode(table, np.array([5, 6, 7]), [column(shape=PAIR, columns=["a", "b"])])
    expected = [
        Reject(6, "a, b", "a: null", "finite numbers of shape 2"),
        Reject(7, "a, b", "b: nan", "finite numbers of shape 2"),
    ]
    assert expected == sorted(rejects, key=lambda reject: reject.row)
    assert [[1.0, 1.0]] == arrays["x"].tolist()


def test_a_row_bad_in_two_columns_is_rejected_once_and_leaves_every_array():
    """The first bad column of the task is told, and all arrays keep the same rows."""
    table = pa.table({"x": [1.0, None, 3.0, 4.0], "y": [0, None, None, 3]})
    arrays, good_N, rejects = decode(table, np.arange(4), [Column("x", ("x",)), Column("y", ("y",), "int64")])
    assert [(1, "x", "null", "a finite number"), (2, "y", "null", "an integer")] == [
        (reject.row, reject.column, reject.got, reject.expected) for reject in rejects
    ]
    assert ([1.0, 4.0], [0, 3], [True, False, False, True]) == (
        arrays["x"].tolist(),
        arrays["y"].tolist(),
        good_N.tolist(),
    )


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("float32", (), "a finite number"),
        ("float32", (1, 8, 8), "finite numbers of shape 1x8x8"),
        ("int64", (), "an integer"),
        ("int64", (5,), "integers of shape 5"),
    ],
)
def test_a_reject_says_what_a_good_value_looks_like(dtype, shape, expected):
    """`expected` follows from the column's dtype and shape."""
    _, _, rejects = decode(pa.table({"x": pa.array([None], pa.float32())}), np.arange(1), [column(dtype, shape)])
    assert [expected] == [reject.expected for reject in rejects]


@pytest.mark.parametrize("kind", [pa.null(), pa.string(), pa.float32(), LIST, pa.list_(pa.float32(), 4), NESTED])
def test_no_rows_decode_to_empty_arrays(kind):
    """A shard whose rows could not even be parsed has arrays of shape [0, ...]."""
    array, bad = decoded([], column(shape=SQUARE), kind)
    assert ((0, 2, 2), {}) == (array.shape, bad)


def test_chunks_and_slices_decode_as_the_whole():
    """How Arrow cut a column in memory does not matter."""
    whole = pa.array([[float(i), float(-i)] for i in range(10)], pa.list_(pa.float64(), 2))
    pieces = pa.chunked_array([whole[:3], whole[3:3], whole[3:10]])
    arrays, _, _ = decode(pa.table({"x": pieces}).slice(2, 6), np.arange(6), [column(shape=PAIR)])
    assert [[float(i), float(-i)] for i in range(2, 8)] == arrays["x"].tolist()


number = st.sampled_from([0.0, 1.0, -2.0, 0.5, math.nan, math.inf, None])
pair = st.none() | st.lists(number, max_size=3)
clean_pair = st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=2, max_size=2)
word = st.sampled_from(["3", "1.5", "no", "", "NaN", "[1, 2]", "[[1], [2]]", "[1, [2]]", "[1]", "null", "true", None])
COLUMNS = {
    "numbers": (pa.float64(), number),
    "lists": (LIST, clean_pair | pair),
    "nested lists": (NESTED, st.none() | st.lists(pair | clean_pair, max_size=2)),
    "fixed-size lists": (pa.list_(pa.float64(), 2), st.none() | st.lists(number, min_size=2, max_size=2)),
    "text": (pa.string(), word),
    "images": (pa.binary(), st.sampled_from([png(GRAY), png(RGB), png(GRAY.T), b"junk", None])),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "values"), COLUMNS.values(), ids=COLUMNS)
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_decoding_row_by_row_equals_decoding_the_whole(kind, values, data):
    """What a row decodes to, or why it is rejected, does not depend on the rows read with it."""
    shapes = [(4, 5), (3, 4, 5)] if kind == pa.binary() else [(), PAIR, SQUARE, (2, 1)]
    wanted = column(data.draw(st.sampled_from(["float32", "int64"])), data.draw(st.sampled_from(shapes)))
    rows = data.draw(st.lists(values, min_size=1, max_size=8))
    whole, bad = decoded(rows, wanted, kind)
    alone = [decoded([row], wanted, kind) for row in rows]
    assert {i: one_bad[0] for i, (_, one_bad) in enumerate(alone) if one_bad} == bad
    assert np.array_equal(np.concatenate([array for array, _ in alone]), whole)


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2), min_size=1, max_size=5))
def test_text_decodes_to_the_same_bits_as_the_numbers_it_spells(rows):
    """A list and its JSON text give equal arrays: CSV loses nothing against Parquet."""
    from_lists, _ = decoded(rows, column(shape=PAIR), LIST)
    from_text, _ = decoded([json.dumps(row) for row in rows], column(shape=PAIR), pa.string())
    assert from_lists.tobytes() == from_text.tobytes()


@pytest.mark.parametrize(
    ("kind", "dtype", "shape"),
    [
        (pa.null(), "float32", (1, 8, 8)),
        (pa.int64(), "int64", ()),
        (pa.bool_(), "float32", ()),
        (LIST, "float32", (8,)),
        (NESTED, "float32", (8, 8)),
        (pa.list_(pa.float32(), 64), "float32", (1, 8, 8)),
        (pa.binary(), "float32", (1, 8, 8)),
        (pa.struct({"bytes": pa.binary(), "path": pa.string()}), "float32", (3, 8, 8)),
    ],
    ids=str,
)
def test_types_whose_rows_may_be_good_pass(kind, dtype, shape):
    """A type that can hold good rows is no problem before the rows are read."""
    assert "" == type_problem(kind, column(dtype, shape))


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "expected"),
    [
        (pa.string(), "float32", (), "got string, expected a finite number"),
        (pa.float32(), "int64", (), "got float, expected an integer"),
        (pa.float32(), "float32", (8,), "got float, expected finite numbers of shape 8"),
        (pa.binary(), "float32", (8,), "got binary, expected finite numbers of shape 8"),
        (pa.list_(pa.string()), "float32", (8,), "got list<element: string>, expected finite numbers of shape 8"),
        (pa.timestamp("s"), "int64", (), "got timestamp[s], expected an integer"),
    ],
    ids=str,
)
def test_types_that_never_fit_are_told_before_any_row_is_read(kind, dtype, shape, expected):
    """A column of the wrong type is one problem of the file, not a reject per row."""
    assert expected == type_problem(kind, column(dtype, shape)).replace("item: ", "element: ")


def test_columns_to_be_stacked_are_checked_as_the_single_numbers_they_are():
    """Of several columns each holds one number, whatever the stacked shape."""
    stacked = column(shape=PAIR, columns=["a", "b"])
    assert ("", "got string, expected finite numbers of shape 2") == (
        type_problem(pa.float32(), stacked),
        type_problem(pa.string(), stacked),
    )


@pytest.mark.parametrize(("dtype", "value", "nothing"), [("text", "asked", ""), ("tokens", [3, 4], [])])
def test_an_optional_column_may_be_empty(dtype, value, nothing):
    """Null and empty are nothing at all, and no error; what is wrong is still said. Of other columns both are rejected."""
    values = [value, None, nothing]
    array, bad = decoded(values, Column("x", ("x",), dtype, optional=True))
    assert ([value, nothing, nothing], {}) == (array.tolist(), bad)
    assert {1, 2} == set(decoded(values, Column("x", ("x",), dtype))[1])
    if dtype == "tokens":
        assert ["'a' among the token ids"] == list(
            decoded(["[1]", '["a"]'], Column("x", ("x",), dtype, optional=True))[1].values()
        )
