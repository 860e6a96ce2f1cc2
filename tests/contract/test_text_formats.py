"""JSON lines and CSV value by value: what a row is never depends on the rows that are read with it."""

import bz2
import csv
import gzip
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import Corpus
from pipeline.decode import decode
from pipeline.errors import InputError
from pipeline.formats import streams
from pipeline.plan import make_shards
from pipeline.queries import WHOLE_FILE_ROWS, read_queries
from pipeline.records import Column
from pipeline.spec import CorpusSection, QueriesSection
from pipeline.values import as_text, concat_rows, json_column, json_field

WANTED = {
    "a number": Column("x", ("x",)),
    "an integer": Column("x", ("x",), "int64"),
    "a double": Column("x", ("x",), "float64"),
    "a pair": Column("x", ("x",), "float32", (2,)),
    "a pair of integers": Column("x", ("x",), "int64", (2,)),
    "a square": Column("x", ("x",), "float32", (2, 2)),
    "text": Column("x", ("x",), "text"),
    "optional text": Column("x", ("x",), "text", optional=True),
    "messages": Column("x", ("x",), "messages"),
    "token ids": Column("x", ("x",), "tokens"),
    "optional token ids": Column("x", ("x",), "tokens", optional=True),
}
SPELLED = [
    "0x1",
    "0_2",
    "\u0661",
    " 1 ",
    "1e3",
    "+1",
    "1.",
    ".5",
    "-0",
    "007",
    "1,234",
    "nan",
    "inf",
    "1e999",
    "--1",
    "1d",
    "NA",
]
SPELLED += ["true", "null", "[1, 2]", "[[1, 2], [3, 4]]", "[1, 2.5]", "9007199254740993", str(2**63), "9" * 5000, "a"]
numbers = st.sampled_from(
    [0, 1, -3, 2**53 + 1, 2**63 - 1, 2**63, 2**70, 0.5, 1.0, -0.0, 1e300, float("nan"), float("inf")]
)
leaves = numbers | st.sampled_from([None, True, False, "", " ", "red", *SPELLED])
message = st.fixed_dictionaries({"role": st.just("user"), "content": st.just("hi")}, optional={"name": st.just("n")})
values = (
    leaves
    | st.lists(numbers, max_size=3)
    | st.lists(st.integers(0, 3) | st.floats(0, 3), min_size=2, max_size=2)
    | st.lists(leaves, max_size=3)
    | st.lists(st.lists(numbers, min_size=2, max_size=2), max_size=2)
    | st.lists(message, max_size=2)
    | st.dictionaries(st.sampled_from("ab"), leaves, max_size=2)
)


def corpus(uri, **fields):
    return Corpus(CorpusSection(uri=str(uri), **fields))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["id", "x"], *([row["id"], row["x"]] for row in rows)])
    path.write_bytes(text.getvalue().encode())


def read(opened, wanted, rows_each):
    """Everything that is known of every row, shard by shard."""
    shards = make_shards(opened.measure(opened.list_files(), [wanted]), rows_each)
    parts = [opened.read(shard, [wanted]) for shard in shards]
    tables = [
        opened.payload(shard, list(range(shard.row_start, shard.row_start + shard.rows)), ["x"]) for shard in shards
    ]
    return {
        "values": [repr(value) for part in parts for value in part.arrays["x"].tolist()],
        "ids": [one for part in parts for one in part.example_id_N.to_pylist()],
        "sources": [one for part in parts for one in part.source_N.to_pylist()],
        "rejects": [reject for part in parts for reject in part.rejects],
        "payload": repr(concat_rows(tables).to_pylist()),
    }


def as_table(kind, rows):
    """Rows of one column as the formats make a table of them."""
    array = json_column(rows) if kind == "jsonl" else pa.array([row or None for row in rows], pa.string())
    return pa.table([array], pa.schema([json_field("x", array.type) if kind == "jsonl" else pa.field("x", array.type)]))


def known(tables, wanted):
    """Everything that becomes of the rows of some tables."""
    starts = np.cumsum([0, *map(len, tables)])
    found = [
        (decode(table, np.arange(len(table)) + start, [wanted]), as_text(table, "x").to_pylist())
        for table, start in zip(tables, starts, strict=False)
    ]
    return {
        "values": [repr(value) for (arrays, _, _), _ in found for value in arrays["x"].tolist()],
        "good": [bool(good) for (_, good_N, _), _ in found for good in good_N],
        "rejects": {reject.row: reject for (_, _, rejects), _ in found for reject in rejects},
        "texts": [text for _, texts in found for text in texts],
        "payload": (concat_rows(tables).schema.types, repr(concat_rows(tables).to_pylist())),
    }


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@settings(max_examples=20, deadline=None)
@given(st.lists(values, min_size=1, max_size=6))
def test_a_value_of_json_is_the_same_alone_as_among_others(wanted, rows):
    """Its array, its reject with what was got, its text and its payload, for every kind of column."""
    alone = known([as_table("jsonl", [row]) for row in rows], wanted)
    assert alone == known([as_table("jsonl", rows)], wanted)


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(["", *SPELLED]) | numbers.map(str), min_size=1, max_size=6))
def test_a_value_of_csv_is_the_same_alone_as_among_others(wanted, rows):
    """Its array, its reject with what was got, its text and its payload, for every kind of column."""
    alone = known([as_table("csv", [row]) for row in rows], wanted)
    assert alone == known([as_table("csv", rows)], wanted)


EVERYTHING = [
    1,
    1.5,
    None,
    "1",
    "0x1",
    True,
    [1, 2],
    [1, 2.5],
    [[1]],
    {"a": 1},
    [{"role": "user", "content": "hi"}],
    "red",
]


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_row_of_a_file_is_the_same_in_any_shard(name, wanted, tmp_path):
    """Values of every type in one column, read one by one, in twos and together."""
    rows = [{"id": f"r{i}", "x": x} for i, x in enumerate(EVERYTHING)]
    (write_csv if name == "a.csv" else write_jsonl)(tmp_path / name, rows)
    opened = corpus(tmp_path, example_id="id", source="x")
    whole = read(opened, wanted, WHOLE_FILE_ROWS)
    assert [whole] * 2 == [read(opened, wanted, 1), read(opened, wanted, 2)]


INTEGERS = {
    "2": 2, " 2 ": 2, "+2": 2, "-2": -2, "007": 7, "2.0": 2, "2e0": 2, "2.": 2, "9007199254740993": 2**53 + 1, "true": 1,
    "0x1": None, "0_2": None, "\u0661": None, "\uff12": None, "1,234": None, "2.5": None, "1e": None, "--1": None, "two": None,
    "9223372036854775808": None, "NA": None, "1 2": None,
}  # fmt: skip


@pytest.mark.parametrize("beside", ["1", "0.5", "junk", "[1]", ""])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_integers_are_spelt_in_decimal_digits(name, beside, tmp_path):
    """Blanks, a sign and a whole fraction are no matter; hexadecimal, underscores and other digits are rejected."""
    rows = [{"id": f"r{i}", "x": text} for i, text in enumerate([*INTEGERS, beside])]
    (write_csv if name == "a.csv" else write_jsonl)(tmp_path / name, rows)
    opened = corpus(tmp_path, example_id="id")
    [shard] = make_shards(opened.measure(opened.list_files(), [WANTED["an integer"]]), WHOLE_FILE_ROWS)
    got = opened.read(shard, [WANTED["an integer"]])
    found = dict(zip(got.row_N.tolist(), got.arrays["x"].tolist(), strict=True))
    assert list(INTEGERS.values()) == [found.get(i) for i in range(len(INTEGERS))]


IDS = {
    1: "1", 1.5: "1.5", 2**53 + 1: "9007199254740993", 2**64: "18446744073709551616", "7": "7", "a": "a", -0.25: "-0.25",
    "größe": "größe",
}  # fmt: skip


@pytest.mark.parametrize("rows_each", [1, 2, 3, WHOLE_FILE_ROWS])
def test_ids_of_json_are_their_own_text(rows_each, tmp_path):
    """`1` beside `1.5` is not `1.0`, and no digit of a large integer is lost; the same of sources."""
    write_jsonl(tmp_path / "a.jsonl", [{"id": one, "s": one, "x": 0} for one in IDS])
    got = read(corpus(tmp_path, example_id="id", source="s"), WANTED["a number"], rows_each)
    assert [list(IDS.values())] * 2 == [got["ids"], got["sources"]]


def test_payload_of_one_json_type_keeps_it_and_of_several_is_json_text(tmp_path):
    """Numbers stay numbers to whoever reads the ranked table; a value is never changed for the sake of another."""
    rows = [
        {"n": 1, "mixed": 1, "f": [0, 0.5], "s": {"a": 1}, "o": {"a": 1}},
        {"n": 2, "mixed": 1.5, "f": [1, 1], "s": {"a": 2}, "o": {"b": 2}},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    opened = corpus(tmp_path)
    for rows_each in (1, 2):
        shards = make_shards(opened.measure(opened.list_files(), []), rows_each)
        names = list(rows[0])
        payload = concat_rows(
            [opened.payload(s, list(range(s.row_start, s.row_start + s.rows)), names) for s in shards]
        )
        assert [
            {"n": 1, "mixed": "1", "f": [0.0, 0.5], "s": {"a": 1}, "o": '{"a": 1}'},
            {"n": 2, "mixed": "1.5", "f": [1.0, 1.0], "s": {"a": 2}, "o": '{"b": 2}'},
        ] == payload.to_pylist()


# --- columns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ['{"x": 1, "x": 2}', '{"x": 1, "n": {"a": 1, "a": 1}}', '{"x": 1, "\\u0078": 2}'])
def test_a_json_object_with_a_key_twice_is_rejected(line, tmp_path):
    """Which of the values counts, nobody knows; the rows around it are read."""
    (tmp_path / "a.jsonl").write_text(f'{{"x": 0}}\n{line}\n{{"x": 2}}\n')
    opened = corpus(tmp_path)
    [shard] = make_shards(opened.measure(opened.list_files(), [WANTED["a number"]]), 3)
    got = opened.read(shard, [WANTED["a number"]])
    assert ([0.0, 2.0], [1]) == (got.arrays["x"].tolist(), [reject.row for reject in got.rejects])
    assert "more than once" in got.rejects[0].got


def csv_of(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("field", ["example_id", "source", "payload", "task"])
def test_two_columns_of_one_name_are_refused_where_they_are_read(field, tmp_path):
    """The last one does not win; columns that nobody reads may be called what they like."""
    csv_of(tmp_path / "a.csv", "x,id,y,y\n1,a,2,3\n")
    twice = {"example_id": {"example_id": "y"}, "source": {"source": "y"}, "payload": {"payload": ["y"]}, "task": {}}[
        field
    ]
    wanted = Column("x", ("y" if field == "task" else "x",))
    opened = corpus(tmp_path, **twice)
    with pytest.raises(InputError, match=r"column 'y' comes more than once in the file"):
        opened.measure(opened.list_files(), [wanted])
    assert ["1.0"] == read(corpus(tmp_path, example_id="id"), WANTED["a number"], 1)["values"]


def test_queries_are_read_whole_so_no_column_may_come_twice(tmp_path):
    """Every column of a query's file is kept."""
    csv_of(tmp_path / "q.csv", "query_id,x,y,y\nq,1,2,3\n")
    with pytest.raises(InputError, match=r"queries: column 'y' comes more than once"):
        read_queries(QueriesSection(uri=str(tmp_path)), [WANTED["a number"]], None)


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("files", [1, 2])
def test_a_json_key_may_come_late_and_is_null_where_it_is_absent(files, escaped, tmp_path):
    """After any number of rows, or in one file of several."""
    lines = [json.dumps({"x": i}) for i in range(120)]
    lines[110] = '{"x": 110, "s\\u0069te": "a"}' if escaped else '{"x": 110, "site": "a"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines[: 120 // files]) + "\n")
    if files == 2:
        (tmp_path / "b.jsonl").write_text("\n".join(lines[60:]) + "\n")
    sources = read(corpus(tmp_path, source="site"), WANTED["a number"], 50)["sources"]
    assert [None] * 110 + ["a"] + [None] * 9 == sources


def test_a_json_key_that_no_row_has_is_told_with_the_nearest_one(tmp_path):
    """A slip of the pen does not make every row null."""
    write_jsonl(tmp_path / "a.jsonl", [{"x": 1, "site": "a"}] * 150)
    opened = corpus(tmp_path, source="sites")
    with pytest.raises(InputError, match=r"corpus.source: column 'sites' is not known; did you mean 'site'"):
        opened.measure(opened.list_files(), [WANTED["a number"]])


def test_queries_keep_keys_that_come_late(tmp_path):
    """A note on the last of many query rows is in queries.parquet."""
    rows = [{"query_id": f"q{i}", "x": i} for i in range(120)]
    rows[-1]["note"] = "late"
    write_jsonl(tmp_path / "q.jsonl", rows)
    table = read_queries(QueriesSection(uri=str(tmp_path)), [WANTED["a number"]], None)
    assert [None] * 119 + ["late"] == table["note"].to_pylist()


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [10, 100, 700])
def test_json_nested_without_end_rejects_its_row_only(depth, opening, closing, tmp_path):
    """Whatever reads it, as number, id or payload; ten levels are fine where nobody asks for numbers."""
    deep = f'{{"id": "deep", "note": {opening * depth}1{closing * depth}, "x": 1}}'
    lines = ['{"id": "a", "note": [[[]]], "x": 0}', deep, '{"id": "b", "note": [[[]]], "x": 2}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    opened = corpus(tmp_path, example_id="id", source="note")
    [shard] = make_shards(opened.measure(opened.list_files(), [WANTED["a number"]]), 3)
    got = opened.read(shard, [WANTED["a number"]])
    assert (["a", "deep", "b"] if depth == 10 else ["a", "b"]) == got.example_id_N.to_pylist()
    assert [reject.row for reject in got.rejects] == ([] if depth == 10 else [1])
    assert got.row_N.tolist() == opened.payload(shard, got.row_N.tolist(), ["x"])["x"].to_pylist()


# --- compressed --------------------------------------------------------------------------------------------------------

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
ROWS = 700
TEXTS = {
    ".jsonl": "".join(json.dumps({"id": f"r{i}", "x": i}) + "\n" for i in range(ROWS)).encode(),
    ".ndjson": "".join(json.dumps({"id": f"r{i}", "x": i}) + "\n" for i in range(ROWS)).encode(),
    ".csv": ("id,x\n" + "".join(f"r{i},{i}\n" for i in range(ROWS))).encode(),
}
compressed = pytest.mark.parametrize("codec", COMPRESS)
plain = pytest.mark.parametrize("suffix", TEXTS)


@compressed
@plain
def test_compressed_text_holds_the_same_rows_whichever_way_it_is_cut(suffix, codec, tmp_path):
    """Beside plain files, in several members, in any shards."""
    assert set(COMPRESS) == set(streams.CODECS)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / f"a{suffix}").write_bytes(TEXTS[suffix])
    half = len(TEXTS[suffix]) // 2
    members = COMPRESS[codec](TEXTS[suffix][:half]) + COMPRESS[codec](TEXTS[suffix][half:])
    (tmp_path / f"a{suffix}{codec}").write_bytes(members)
    expected = read(corpus(tmp_path / "plain", example_id="id"), WANTED["a number"], WHOLE_FILE_ROWS)
    for rows_each in (1 << 20, 256, 99):
        opened = corpus(f"{tmp_path}/a*", example_id="id")
        assert expected == read(opened, WANTED["a number"], rows_each)
    assert 2 * ROWS == len(read(corpus(tmp_path, example_id="id"), WANTED["a number"], 256)["ids"])


def test_shards_of_a_compressed_file_in_order_decompress_it_once(tmp_path, monkeypatch):
    """The file stays open for the shards behind; going back begins again, with the same rows."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(TEXTS[".jsonl"]))
    opened = corpus(tmp_path, example_id="id")
    shards = make_shards(opened.measure(opened.list_files(), []), 100)
    begun, reading = [], streams.storage.reading
    monkeypatch.setattr(streams.storage, "reading", lambda uri: begun.append(uri) or reading(uri))
    ids = [opened.read(shard, []).example_id_N.to_pylist() for shard in shards]
    assert ([f"r{i}" for i in range(ROWS)], 1) == ([one for some in ids for one in some], len(begun))
    before = len(begun)
    assert (ids[2], before + 1) == (opened.read(shards[2], []).example_id_N.to_pylist(), len(begun))


@compressed
@pytest.mark.parametrize("damage", ["cut", "flipped", "junk"])
def test_damaged_compressed_text_is_an_input_error_that_names_it(damage, codec, tmp_path):
    """It is found when the corpus is measured, before any work: no row is lost at a broken end."""
    data = bytearray(COMPRESS[codec](TEXTS[".jsonl"]))
    if damage == "cut":
        data = data[:-20]
    elif damage == "flipped":
        data[len(data) // 2 if codec != ".zst" else 3] ^= 255  # Arrow's zstd has no checksum of its contents
    else:
        data = bytearray(b"no such thing" * 9)
    path = tmp_path / f"a.jsonl{codec}"
    path.write_bytes(data)
    opened = corpus(tmp_path)
    with pytest.raises(InputError, match=rf"{path.name} cannot be read as"):
        opened.measure(opened.list_files(), [])


def test_a_reject_shows_one_line_that_steers_no_terminal(tmp_path):
    """Control characters and marks of direction are shown as escapes, and no more than a line of them."""
    lines = ['{"x": "\x1b[2J\\u202e' + "a" * 500 + '"}', '{"x": "\\u001b[2J\\u202eb"}']
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n' + "\n".join(lines) + "\n")
    got = read(corpus(tmp_path), WANTED["a number"], 3)["rejects"]
    assert [1, 2] == [reject.row for reject in got]
    assert all(reject.got.isprintable() and r"\x1b" in reject.got and len(reject.got) < 500 for reject in got)
