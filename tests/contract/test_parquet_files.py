"""Parquet as others write it: ids of any type, columns of one name, damage of any kind."""

import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import Corpus
from pipeline.decode import decode
from pipeline.errors import InputError
from pipeline.formats.base import list_files
from pipeline.formats.parquet import Parquet
from pipeline.plan import make_shards
from pipeline.queries import read_queries
from pipeline.records import Column
from pipeline.spec import CorpusSection, QueriesSection

ROWS = 12
COLUMNS = [Column("x", ("x",), "float32", (2,)), Column("label", ("label",), "int64")]


def rows_of(ids, **columns):
    some = {"id": ids, "x": [[float(i), 0.5] for i in range(len(ids))], "label": [i % 3 for i in range(len(ids))]}
    return pa.table({**some, **columns})


def corpus(path, **fields):
    return Corpus(CorpusSection(uri=str(path), **{"example_id": "id", **fields}))


def cut(opened, rows_each=5):
    return make_shards(opened.measure(opened.list_files(), COLUMNS), rows_each)


def read(path, **fields):
    """Everything that is read of a file, by every way that there is."""
    opened = corpus(path, **fields)
    shards = cut(opened)
    found = []
    for shard in shards:
        part = opened.read(shard, COLUMNS)
        payload = opened.payload(shard, [shard.row_start], ["x", "label"]).to_pydict()
        arrays = {name: array.tolist() for name, array in part.arrays.items()}
        found.append((part.example_id_N.to_pylist(), arrays, [reject.row for reject in part.rejects], payload))
    return found


UUIDS = [uuid.UUID(int=i * 7**20) for i in range(3)]
DIGESTS = [bytes([i, 255, 0, 1]) * 4 for i in range(3)]
IDS = {
    "uuid": (pa.array([one.bytes for one in UUIDS], pa.uuid()), [str(one) for one in UUIDS]),
    "16 bytes": (pa.array(DIGESTS, pa.binary(16)), [one.hex() for one in DIGESTS]),
    "16 bytes that spell a text": (pa.array([b"sixteen letters!"] * 3, pa.binary(16)), [b"sixteen letters!".hex()] * 3),
    "bytes that spell texts": (pa.array(["größe", "a", "b"]).cast(pa.binary()), ["größe", "a", "b"]),
    "bytes that spell none": (pa.array(DIGESTS, pa.binary()), [one.hex() for one in DIGESTS]),
    "some of both": (pa.array([b"a", b"\xff\x00", None], pa.large_binary()), ["a", "ff00", None]),
    "a dictionary of bytes": (pa.array([b"a", b"\xff", b"a"]).dictionary_encode(), ["a", "ff", "a"]),
    "a dictionary of texts": (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
    "integers": (pa.array([2**63 - 1, -1, 0]), ["9223372036854775807", "-1", "0"]),
    "unsigned": (pa.array([2**64 - 1, 1, 0], pa.uint64()), ["18446744073709551615", "1", "0"]),
    "booleans": (pa.array([True, False, None]), ["true", "false", None]),
    "dates": (pa.array([0, 1, None], pa.date32()), ["1970-01-01", "1970-01-02", None]),
    "decimals": (pa.array([1, 2, 3], pa.int64()).cast(pa.decimal128(30, 2)), ["1.00", "2.00", "3.00"]),
}


@pytest.mark.parametrize(("ids", "texts"), IDS.values(), ids=IDS)
def test_ids_and_sources_of_any_type_are_their_text(ids, texts, tmp_path):
    """UUIDs as they are written, bytes of fixed size in hexadecimal digits, others as text if they spell one."""
    pq.write_table(rows_of(ids, source=ids, name=["a", "b", "c"]), tmp_path / "a.parquet")
    opened = corpus(tmp_path, example_id="name", source="source")
    [shard] = cut(opened)
    assert texts == opened.read(shard, COLUMNS).source_N.to_pylist()
    opened = corpus(tmp_path)
    assert [text for text in texts if text is not None] == opened.read(shard, COLUMNS).example_id_N.to_pylist()
    if len(set(texts)) == len(texts):
        opened.check_ids([shard])
    else:
        with pytest.raises(InputError, match="column 'id' must be unique"):
            opened.check_ids([shard])


@given(st.lists(st.binary(max_size=4) | st.text(max_size=3).map(str.encode), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_the_text_of_bytes_does_not_depend_on_their_neighbours(values):
    """Each value decides for itself."""
    from pipeline.values import as_text

    alone = [as_text(pa.table({"id": pa.array([value])}), "id")[0].as_py() for value in values]
    assert alone == as_text(pa.table({"id": pa.array(values)}), "id").to_pylist()


@pytest.mark.parametrize("field", ["example_id", "source"])
@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.struct({"a": pa.int64()}), pa.map_(pa.string(), pa.int64())], ids=str
)
def test_a_type_that_has_no_text_is_told_before_any_row_is_read(kind, field, tmp_path):
    """Ids and sources are checked with the columns."""
    pq.write_table(rows_of(["a"], odd=pa.nulls(1, kind)), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"corpus.{field}: column 'odd': got .*, expected a type that has a text"):
        cut(corpus(tmp_path, **{field: "odd"}))


def test_two_columns_of_one_name_are_refused_where_they_are_read(tmp_path):
    """Neither wins; one that nobody reads is no matter."""
    table = rows_of(["a", "b"], note=["n", "m"])
    twice = table.append_column("note", pa.array([1, 2]))
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"corpus.payload: column 'note' comes more than once in the file"):
        cut(corpus(tmp_path, payload=["note"]))
    assert [["a", "b"]] == [part[0] for part in read(tmp_path)]
    pq.write_table(table.append_column("label", pa.array([1, 2])), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"task column 'label': column 'label' comes more than once"):
        cut(corpus(tmp_path))
    pq.write_table(twice.append_column("query_id", pa.array(["q", "q"])), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"queries: column 'note' comes more than once"):
        read_queries(QueriesSection(uri=str(tmp_path)), COLUMNS, None)


def test_a_text_that_is_not_utf_8_rejects_its_row(tmp_path):
    """Arrow does not look; the rows around it are read, and payload of them is theirs."""
    bad = pa.array([b"first", b"gr\xf6\xdfe", b"third"]).view(pa.string())
    pq.write_table(rows_of(bad), tmp_path / "a.parquet")
    opened = corpus(tmp_path)
    [shard] = cut(opened)
    got = opened.read(shard, COLUMNS)
    assert (["first", "third"], [0, 2]) == (got.example_id_N.to_pylist(), got.row_N.tolist())
    assert [(1, "id", "text in UTF-8")] == [(one.row, one.column, one.expected) for one in got.rejects]
    assert ["third", "first"] == opened.payload(shard, [2, 0], ["id"])["id"].to_pylist()
    opened.check_ids([shard])


PARQUET_VALUES = {
    "integers": (pa.list_(pa.int64()), st.lists(st.none() | st.integers(0, 9), max_size=3)),
    "floats": (pa.list_(pa.float64()), st.lists(st.none() | st.floats(width=32), max_size=3)),
    "texts": (pa.string(), st.sampled_from(["1", "0x1", "1e3", "[1, 2]", "[1, 2.5]", "", " ", "a", None])),
    "messages": (
        pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.none() | st.just("hi")}), max_size=2),
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "int64", "text", "messages", "tokens"])
@pytest.mark.parametrize(("kind", "some"), PARQUET_VALUES.values(), ids=PARQUET_VALUES)
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_a_value_of_parquet_is_the_same_alone_as_among_others(kind, some, dtype, data):
    """Its array, and its reject with what was got."""
    rows = data.draw(st.lists(st.none() | some, min_size=1, max_size=5))
    wanted = Column("x", ("x",), dtype, (2,) if dtype in ("float32", "int64") and pa.types.is_list(kind) else ())

    def known(parts):
        found = [decode(pa.table({"x": pa.array(part, kind)}), np.zeros(len(part), int), [wanted]) for part in parts]
        values = [repr(value) for arrays, _, _ in found for value in arrays["x"].tolist()]
        return (
            values,
            [bool(one) for _, good_N, _ in found for one in good_N],
            {r.got for _, _, some in found for r in some},
        )

    assert known([[row] for row in rows]) == known([rows])


# --- damage ------------------------------------------------------------------------------------------------------------

WRITTEN = {
    "plain": {"compression": "none", "use_dictionary": False},
    "dictionaries": {"compression": "snappy", "row_group_size": 5},
    "second page version": {"compression": "zstd", "data_page_version": "2.0"},
}


def read_or_error(path):
    """What is read of a file, or what the error says; any error but an InputError fails the test."""
    try:
        return read(path)
    except InputError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("options", WRITTEN.values(), ids=WRITTEN)
def test_no_changed_byte_of_a_page_with_a_checksum_is_read(options, tmp_path):
    """Bytes all over the pages, changed one at a time: the right rows, or an error that names the file."""
    path = tmp_path / "a.parquet"
    pq.write_table(rows_of([f"r{i}" for i in range(ROWS)]), path, write_page_checksum=True, **options)
    whole, right = path.read_bytes(), read(path)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for place in range(4, footer, 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        found = read_or_error(path)
        assert found == right or "a.parquet" in found, place
        refused += found != right
    assert refused > footer // 13 // 3


@pytest.mark.parametrize("how", ["read", "payload", "check_ids", "queries"])
def test_a_page_whose_checksum_is_wrong_is_refused_wherever_it_is_read(how, tmp_path):
    """As a shard, as payload, as ids, as a query: the changed value is never used."""
    path = tmp_path / "a.parquet"
    pq.write_table(
        rows_of(["name0", "name1", "name2"], query_id=["q"] * 3),
        path,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"name1", b"nane1", 1))
    opened = corpus(path)
    ways = {
        "read": lambda: opened.read(cut(opened)[0], COLUMNS),
        "payload": lambda: opened.payload(cut(opened)[0], [0], ["id"]),
        "check_ids": lambda: opened.check_ids(cut(opened)),
        "queries": lambda: read_queries(QueriesSection(uri=str(path)), COLUMNS, None),
    }
    with pytest.raises(InputError, match=r"a\.parquet cannot be read as Parquet: .*(CRC|checksum)"):
        ways[how]()


@pytest.mark.slow
@pytest.mark.parametrize("options", WRITTEN.values(), ids=WRITTEN)
def test_a_damaged_footer_is_an_input_error_that_names_the_file(options, tmp_path):
    """Bytes all over it, changed one at a time, and the file cut anywhere: never a traceback, never fewer rows."""
    path = tmp_path / "a.parquet"
    pq.write_table(rows_of([f"r{i}" for i in range(ROWS)]), path, **options)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    changed = [
        whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :] for place in range(footer, len(whole), 9)
    ]
    cuts = [whole[:stop] for stop in range(0, len(whole), len(whole) // 9)]
    for data in [*changed, *cuts]:
        path.write_bytes(data)
        found = read_or_error(path)
        assert "a.parquet" in found or ROWS == sum(len(part[0]) + len(part[2]) for part in found)


def test_a_footer_that_disagrees_with_itself_is_refused(tmp_path):
    """Row groups that hold fewer rows than the file says would lose the rest without a word."""
    path = tmp_path / "a.parquet"
    pq.write_table(rows_of([f"r{i}" for i in range(ROWS)]), path)
    whole = path.read_bytes()
    counts = [place for place in range(len(whole) // 2, len(whole)) if whole[place : place + 2] == b"\x16\x18"]
    told = []
    for place in counts:  # 24 is how Thrift writes 12
        path.write_bytes(whole[: place + 1] + b"\x14" + whole[place + 2 :])
        try:
            Parquet().measure(*Parquet().files(list_files(str(path))))
        except InputError as error:
            told.append(str(error))
    assert any("its row groups hold 10 rows, expected 12" in text for text in told)
