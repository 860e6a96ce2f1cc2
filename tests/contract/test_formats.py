"""Every format: the same rows whichever way a file is cut, stable ids, and bad rows and files told by place."""

import csv
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import formats
from pipeline.corpus import Corpus
from pipeline.errors import InputError
from pipeline.extensions import load_format
from pipeline.formats import parquet
from pipeline.formats.base import list_files
from pipeline.formats.text import STRIDE
from pipeline.plan import make_shards
from pipeline.queries import WHOLE_FILE_ROWS, read_queries
from pipeline.reader import SUFFIXES
from pipeline.records import Column
from pipeline.spec import CorpusSection, QueriesSection

SIDE = 4
MANY = 2 * STRIDE + 88


def picture(row):
    """Pixels of one example, [4, 4] bytes, another for every row."""
    return ((np.arange(SIDE * SIDE) * 7 + row * 13) % 256).astype(np.uint8).reshape(SIDE, SIDE)


def plain_rows(rows, labels=None, first=0):
    """Rows as the files hold them: pixels as floats, a label, an id."""
    labels = [0] * rows if labels is None else labels
    return [
        {"pixels": (picture(first + i) / np.float32(255)).tolist(), "label": labels[i], "id": f"id-{first + i:04d}"}
        for i in range(rows)
    ]


def write_parquet(path, rows, row_group_rows=100):
    kinds = {
        "pixels": pa.list_(pa.list_(pa.float32())),
        "label": pa.int64(),
        "id": pa.string(),
        "query_id": pa.string(),
    }
    names = list(rows[0]) if rows else ["pixels", "label", "id", "query_id"]
    table = pa.table({name: pa.array([row[name] for row in rows], kinds.get(name)) for name in names})
    pq.write_table(table, path, row_group_size=row_group_rows)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def csv_text(rows, newline="\n", quoting=csv.QUOTE_MINIMAL):
    names = list(rows[0]) if rows else ["pixels", "label", "id", "query_id"]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=newline, quoting=quoting)
    writer.writerow(names)
    writer.writerows([json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in rows)
    return text.getvalue()


def write_csv(path, rows):
    path.write_bytes(csv_text(rows).encode())


def write_images(path, rows):
    """A folder of class folders; `pixels` null is an image that cannot be decoded."""
    for i, row in enumerate(rows):
        folder = path / f"class-{row['label']}"
        folder.mkdir(parents=True, exist_ok=True)
        if row["pixels"] is None:
            (folder / f"{i:04d}.png").write_bytes(b"junk")
        else:
            pixels = np.rint(np.array(row["pixels"]) * 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:04d}.png")


def touch(path):
    """Another modification time; the contents stay."""
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))


def append_to(path):
    with path.open("ab") as file:
        file.write(b"\n")


def spoil_parquet(path):
    path.write_bytes(path.read_bytes()[:-20])


@dataclass(frozen=True)
class Case:
    """How to put a format under contract.

    Args:
        write: Writes rows to a path.
        name: File (or folder of class folders) to write to, below a folder.
        features: Column of the pixels.
        id_column: Column of ids that a file can repeat.
        spoil: Makes a written file unreadable as a whole.
        change: Changes a written file behind the manifest's back.
    """

    write: Callable
    name: str
    features: str
    id_column: str
    spoil: Callable
    change: Callable

    @property
    def columns(self):
        """What a task over these files reads."""
        return [
            Column("features", (self.features,), "float32", (1, SIDE, SIDE)),
            Column("label", ("label",), "int64"),
        ]


CASES = {
    "parquet": Case(write_parquet, "a.parquet", "pixels", "id", spoil_parquet, touch),
    "jsonl": Case(write_jsonl, "a.jsonl", "pixels", "id", lambda path: path.write_text("no json\n"), append_to),
    "csv": Case(write_csv, "a.csv", "pixels", "id", lambda path: path.write_bytes(b"\xff\xfe,\n1,2\n"), touch),
    "image_folder": Case(
        write_images,
        "a",
        "image",
        "path",
        lambda path: path.rename(path.parent / "b"),
        lambda path: sorted(path.rglob("*.png"))[-1].unlink(),
    ),
}
"""Format -> how to write it, and how to break it."""
every_format = pytest.mark.parametrize("word", CASES)
tables = pytest.mark.parametrize("word", ["parquet", "jsonl", "csv"])


def corpus(uri, **fields):
    return Corpus(CorpusSection(uri=str(uri), **fields))


def cut(opened, columns, rows_each=WHOLE_FILE_ROWS):
    return make_shards(opened.measure(opened.list_files(), columns), rows_each)


def read(opened, columns, rows_each=WHOLE_FILE_ROWS):
    """All examples of a corpus, read shard by shard and joined."""
    parts = [opened.read(shard, columns) for shard in cut(opened, columns, rows_each)]
    return {
        "ids": [one for part in parts for one in part.example_id_N.to_pylist()],
        "sources": [one for part in parts for one in part.source_N.to_pylist()],
        "rows": [int(row) for part in parts for row in part.row_N],
        "features": np.concatenate([part.arrays["features"] for part in parts]).tolist(),
        "labels": np.concatenate([part.arrays["label"] for part in parts]).tolist(),
        "rejects": [reject for part in parts for reject in part.rejects],
    }


def pixels_of(rows):
    return [np.float32([row["pixels"]]).tolist() for row in rows]


def test_every_format_is_under_contract():
    """A new word in the table gets its row here."""
    assert set(formats.BUILTIN) == set(CASES)


def test_auto_knows_every_suffix_of_every_format():
    """What a format reads when it is named, `auto` finds by itself."""
    for word in formats.BUILTIN:
        suffixes = load_format(word, {"uri": "."} if word == "image_folder" else {}).suffixes
        assert dict.fromkeys(suffixes, word) == {suffix: SUFFIXES.get(suffix) for suffix in suffixes}


@every_format
def test_rows_come_back_as_written(word, tmp_path):
    """Values, labels and positions, in the order of the file; the format is known by the suffix."""
    case, rows = CASES[word], plain_rows(5)
    case.write(tmp_path / case.name, rows)
    got = read(corpus(tmp_path), case.columns)
    assert (pixels_of(rows), [0] * 5, [0, 1, 2, 3, 4], []) == tuple(
        got[name] for name in ("features", "labels", "rows", "rejects")
    )


@pytest.mark.slow
@every_format
@pytest.mark.parametrize(
    ("rows", "rows_each"),
    [
        (1, 1),
        (5, 1),
        (5, 2),
        (STRIDE, STRIDE),
        (STRIDE + 1, STRIDE),
        (MANY, 64),
        (MANY, 100),
        (MANY, STRIDE - 1),
        (MANY, STRIDE),
        (MANY, STRIDE + 1),
        (MANY, MANY - 1),
    ],
)
def test_the_rows_are_the_same_whichever_way_a_file_is_cut(word, rows, rows_each, tmp_path):
    """Ids, positions, values: shard by shard as in one piece."""
    case = CASES[word]
    case.write(tmp_path / case.name, plain_rows(rows, labels=[i * 2 // rows for i in range(rows)]))
    opened = corpus(tmp_path)
    whole = read(opened, case.columns)
    assert rows == len(whole["rows"])
    assert whole == read(opened, case.columns, rows_each)


@tables
def test_all_table_formats_and_images_hold_the_same_examples(word, tmp_path):
    """The same pixels decode to the same bits from Parquet, text and PNG."""
    rows = plain_rows(40)
    for one in (word, "image_folder"):
        (tmp_path / one).mkdir()
        CASES[one].write(tmp_path / one / CASES[one].name, rows)
    table, images = (read(corpus(tmp_path / one), CASES[one].columns) for one in (word, "image_folder"))
    assert images["features"] == table["features"]


@every_format
def test_made_ids_come_from_path_and_row_and_are_unique_across_files(word, tmp_path):
    """Two files of equal rows in nested folders: every id says where its example lies."""
    case = CASES[word]
    for folder in ("one", "two/deep"):
        (tmp_path / folder).mkdir(parents=True)
        case.write(tmp_path / folder / case.name, plain_rows(3))
    ids = read(corpus(tmp_path), case.columns)["ids"]
    names = [f"class-0/{i:04d}.png" for i in range(3)] if word == "image_folder" else None
    expected = [
        f"{folder}/{case.name}/{names[i]}" if names else f"{folder}/{case.name}#{i}"
        for folder in ("one", "two/deep")
        for i in range(3)
    ]
    assert expected == ids


@every_format
def test_made_ids_do_not_depend_on_where_the_corpus_lies(word, tmp_path):
    """The same folder elsewhere has the same ids, named with or without a slash at its end."""
    case, found = CASES[word], []
    for place in ("here", "there/deeper"):
        (tmp_path / place / "part").mkdir(parents=True)
        case.write(tmp_path / place / "part" / case.name, plain_rows(3))
        found += [read(corpus(f"{tmp_path}/{place}{slash}"), case.columns)["ids"] for slash in ("", "/")]
    assert [found[0]] * 4 == found


@every_format
def test_a_column_of_ids_is_taken_as_it_is(word, tmp_path):
    """`example_id` names it; every shard has its own part."""
    case = CASES[word]
    case.write(tmp_path / case.name, plain_rows(5))
    ids = read(corpus(tmp_path, example_id=case.id_column), case.columns, 2)["ids"]
    expected = [f"a/class-0/{i:04d}.png" if word == "image_folder" else f"id-{i:04d}" for i in range(5)]
    assert expected == ids


@every_format
def test_a_source_column_comes_back_as_text(word, tmp_path):
    """Labels as sources are their text; without a source column all are null."""
    case = CASES[word]
    case.write(tmp_path / case.name, plain_rows(4, labels=[0, 0, 1, 1]))
    assert ["0", "0", "1", "1"] == read(corpus(tmp_path, source="label"), case.columns, 3)["sources"]
    assert [None] * 4 == read(corpus(tmp_path), case.columns, 3)["sources"]


@tables
@pytest.mark.parametrize("rows_each", [1, 2, WHOLE_FILE_ROWS])
def test_a_null_id_rejects_its_row(word, rows_each, tmp_path):
    """The reject says which column; the rows around it stay."""
    case, rows = CASES[word], plain_rows(4)
    rows[2]["id"] = None
    case.write(tmp_path / case.name, rows)
    got = read(corpus(tmp_path, example_id="id"), case.columns, rows_each)
    assert (["id-0000", "id-0001", "id-0003"], [0, 1, 3]) == (got["ids"], got["rows"])
    assert pixels_of([rows[i] for i in (0, 1, 3)]) == got["features"]
    assert [(2, "id", "null", "an id")] == [(r.row, r.column, r.got, r.expected) for r in got["rejects"]]


@every_format
@pytest.mark.parametrize("rows_each", [1, 2, WHOLE_FILE_ROWS])
def test_a_bad_row_becomes_a_reject_with_its_position_and_id(word, rows_each, tmp_path):
    """An example without pixels: neighbours are read, and the reject carries its id."""
    case, rows = CASES[word], plain_rows(5)
    rows[2]["pixels"] = None
    case.write(tmp_path / case.name, rows)
    got = read(corpus(tmp_path, example_id=case.id_column), case.columns, rows_each)
    assert [0, 1, 3, 4] == got["rows"]
    assert pixels_of([rows[i] for i in (0, 1, 3, 4)]) == got["features"]
    expected = "a/class-0/0002.png" if word == "image_folder" else "id-0002"
    assert [(2, case.features, expected)] == [(r.row, r.column, r.example_id) for r in got["rejects"]]


@tables
def test_ids_that_come_twice_are_told_with_both_places(word, tmp_path):
    """Across files and shards; an id that comes once is not told."""
    case = CASES[word]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        case.write(tmp_path / folder / case.name, plain_rows(3) if folder == "one" else plain_rows(1))
    opened = corpus(tmp_path, example_id=case.id_column)
    shards = cut(opened, case.columns, 1)
    with pytest.raises(InputError, match=f"column '{case.id_column}' must be unique") as caught:
        opened.check_ids(shards)
    told = str(caught.value)
    assert ("0000" in told, "0001" in told) == (True, False)
    assert [True, True] == [f"{tmp_path}/{one}/{case.name} row 0" in told for one in ("one", "two")]


@every_format
def test_ids_are_not_checked_where_they_are_made_or_the_spec_says_so(word, tmp_path):
    """Made ids are unique by construction; `check_ids: false` saves the read."""
    case = CASES[word]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        case.write(tmp_path / folder / case.name, plain_rows(2))
    for fields in ({}, {"example_id": case.id_column, "check_ids": False}):
        opened = corpus(tmp_path, **fields)
        assert opened.check_ids(cut(opened, case.columns)) is None


@tables
def test_null_ids_are_no_duplicates(word, tmp_path):
    """They become rejects, not a reason to stop."""
    case, rows = CASES[word], plain_rows(4)
    rows[1]["id"] = rows[3]["id"] = None
    case.write(tmp_path / case.name, rows)
    opened = corpus(tmp_path, example_id="id")
    shards = cut(opened, case.columns)
    opened.check_ids(shards)
    assert [1, 3] == [reject.row for shard in shards for reject in opened.read(shard, case.columns).rejects]


@tables
def test_integer_ids_are_their_text(word, tmp_path):
    """7 and "7" are one id, in any format."""
    case = CASES[word]
    rows = [{**row, "number": i + 7} for i, row in enumerate(plain_rows(3))]
    case.write(tmp_path / case.name, rows)
    assert ["7", "8", "9"] == read(corpus(tmp_path, example_id="number"), case.columns)["ids"]


@every_format
def test_an_unreadable_file_is_an_input_error_that_names_it(word, tmp_path):
    """A whole file that is not what its name says stops the run before any work."""
    case = CASES[word]
    path = tmp_path / case.name
    case.write(path, plain_rows(3))
    case.spoil(path / "class-0" if word == "image_folder" else path)
    fields = {"classes": ["class-0"]} if word == "image_folder" else {}
    with pytest.raises(InputError, match=case.name):
        read(corpus(tmp_path, format=word, **fields), case.columns)


@every_format
@pytest.mark.parametrize("rows_each", [2, WHOLE_FILE_ROWS])
def test_a_file_changed_after_listing_is_refused(word, rows_each, tmp_path):
    """Scores of rows that are not those that were frozen are never made."""
    case = CASES[word]
    path = tmp_path / case.name
    case.write(path, plain_rows(6))
    opened = corpus(tmp_path)
    shards = cut(opened, case.columns, rows_each)
    case.change(path)
    with pytest.raises(InputError, match=case.name):
        _ = [opened.read(shard, case.columns) for shard in shards]


@tables
def test_a_file_that_is_gone_after_listing_is_refused(word, tmp_path):
    """The message names it."""
    case = CASES[word]
    case.write(tmp_path / case.name, plain_rows(3))
    opened = corpus(tmp_path)
    [shard] = cut(opened, case.columns)
    (tmp_path / case.name).unlink()
    with pytest.raises(InputError, match=f"{case.name} does not exist"):
        opened.read(shard, case.columns)


@tables
def test_a_missing_column_is_told_with_the_nearest_one(word, tmp_path):
    """All problems of a file stand in one message, with the spec's fields."""
    case = CASES[word]
    case.write(tmp_path / case.name, plain_rows(3))
    columns = [Column("features", ("pixel",), "float32", (1, SIDE, SIDE)), *case.columns[1:]]
    with pytest.raises(InputError, match=f"{case.name}:\n") as caught:
        cut(corpus(tmp_path, example_id="ident", source="labels"), columns)
    told = str(caught.value)
    assert "task column 'features': column 'pixel' is not known; did you mean 'pixels'" in told
    assert "corpus.example_id: column 'ident' is not known" in told
    assert "corpus.source: column 'labels' is not known; did you mean 'label'" in told


@tables
def test_a_corpus_without_rows_is_refused(word, tmp_path):
    """Files are there, rows are not."""
    case = CASES[word]
    case.write(tmp_path / case.name, [])
    with pytest.raises(InputError, match="has no rows in 1 file"):
        cut(corpus(tmp_path), case.columns)


@tables
def test_an_empty_file_among_others_is_passed_over(word, tmp_path):
    """A part without rows makes no shard and no complaint."""
    case = CASES[word]
    case.write(tmp_path / case.name, plain_rows(2))
    case.write(tmp_path / f"empty-{case.name}", [])
    assert [0, 1] == read(corpus(tmp_path), case.columns)["rows"]


@every_format
def test_nothing_there_is_an_input_error(word, tmp_path):
    """The message names the folder and the suffixes looked for."""
    with pytest.raises(InputError, match=f"{tmp_path} does not exist, or is an empty folder"):
        corpus(tmp_path, format=word).list_files()


@every_format
def test_a_path_that_does_not_exist_is_an_input_error(word, tmp_path):
    """A typo in the URI is told by the URI."""
    with pytest.raises(InputError, match="nowhere"):
        corpus(tmp_path / "nowhere", format=word).list_files()


def write_mixed(folder):
    for word, case in CASES.items():
        (folder / word).mkdir()
        case.write(folder / word / case.name, plain_rows(2, first=10))


@every_format
def test_a_folder_of_mixed_formats_is_refused_unless_the_spec_says_which(word, tmp_path):
    """`auto` names what it found; `format` picks one and leaves the others unread."""
    write_mixed(tmp_path)
    with pytest.raises(InputError, match=r"files of 4 formats .csv, image_folder, jsonl, parquet.") as caught:
        corpus(tmp_path)
    assert "format:" in caught.value.hint
    assert 2 == len(read(corpus(tmp_path, format=word), CASES[word].columns)["rows"])


@every_format
def test_hidden_files_and_folders_are_passed_over(word, tmp_path):
    """Names that begin with a dot or an underscore are other programs' notes, wherever they lie below the corpus."""
    case = CASES[word]
    case.write(tmp_path / case.name, plain_rows(2))
    suffix = ".png" if word == "image_folder" else Path(case.name).suffix
    beside = tmp_path / case.name / "class-0" if word == "image_folder" else tmp_path
    for name in (f"._a{suffix}", f"_SUCCESS{suffix}"):
        (beside / name).write_bytes(b"junk")
    for folder in (".ipynb_checkpoints", "_temporary"):
        (tmp_path / folder).mkdir()
        case.write(tmp_path / folder / case.name, plain_rows(1))
    assert [0, 1] == read(corpus(tmp_path), case.columns)["rows"]


@every_format
def test_a_corpus_below_a_hidden_folder_is_read(word, tmp_path):
    """Only what lies below the corpus counts, not the way to it: ~/.cache holds data too."""
    case, home = CASES[word], tmp_path / ".cache" / "_data"
    home.mkdir(parents=True)
    case.write(home / case.name, plain_rows(2))
    assert [0, 1] == read(corpus(home), case.columns)["rows"]


@tables
def test_a_glob_reads_what_matches_with_ids_from_its_fixed_part(word, tmp_path):
    """Wildcards in file and folder names; ids are relative to what precedes the first wildcard."""
    case, suffix = CASES[word], Path(CASES[word].name).suffix
    for name in ("x-1/train-a", "x-1/test-a", "x-2/train-b", "y/train-c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        case.write(tmp_path / f"{name}{suffix}", plain_rows(1))
    ids = read(corpus(f"{tmp_path}/x-*/train-?{suffix}"), case.columns)["ids"]
    assert [f"x-1/train-a{suffix}#0", f"x-2/train-b{suffix}#0"] == ids


@tables
def test_one_file_by_name_is_a_corpus(word, tmp_path):
    """Its neighbours are not read; ids carry the file's name alone."""
    case = CASES[word]
    case.write(tmp_path / case.name, plain_rows(2))
    case.write(tmp_path / f"other-{case.name}", plain_rows(2))
    assert [f"{case.name}#0", f"{case.name}#1"] == read(corpus(tmp_path / case.name), case.columns)["ids"]


@every_format
def test_suffixes_may_be_in_capitals(word, tmp_path):
    """Cameras and old systems write .PNG and .CSV."""
    case = CASES[word]
    path = tmp_path / case.name
    case.write(path, plain_rows(1))
    for file in list(tmp_path.rglob("*.*")):
        file.rename(file.with_suffix(file.suffix.upper()))
    assert [0] == read(corpus(tmp_path), case.columns)["rows"]


@every_format
def test_payload_columns_of_single_rows_come_in_the_order_asked(word, tmp_path):
    """What ranking fetches for its few rows, also behind a row that could not be parsed."""
    case = CASES[word]
    case.write(tmp_path / case.name, plain_rows(6))
    opened = corpus(tmp_path)
    shard = cut(opened, case.columns, 4)[1]
    got = opened.payload(shard, [5, 4], [case.id_column])
    expected = [f"a/class-0/{i:04d}.png" if word == "image_folder" else f"id-{i:04d}" for i in (5, 4)]
    assert {case.id_column: expected} == got.to_pydict()


# --- queries -----------------------------------------------------------------------------------------------------------


def queries(uri, **fields):
    return QueriesSection(uri=str(uri), **fields)


def query_rows(ids):
    return [{"query_id": one, **row} for one, row in zip(ids, plain_rows(len(ids)), strict=True)]


@tables
def test_queries_come_with_their_id_first_and_every_column_of_their_file(word, tmp_path):
    """Rows of one query may stand apart and in several files."""
    case = CASES[word]
    case.write(tmp_path / case.name, query_rows(["a", "b", "a"]))
    case.write(tmp_path / f"b-{case.name}", query_rows(["b"]))
    table = read_queries(queries(tmp_path), case.columns, ["class-0", "class-1", "class-2"])
    assert (["query_id", "pixels", "label", "id"], ["a", "b", "a", "b"]) == (
        table.column_names,
        table["query_id"].to_pylist(),
    )


def test_every_image_of_a_query_folder_is_a_query(tmp_path):
    """Named by class and file; labels follow the corpus's classes."""
    write_images(tmp_path, plain_rows(2, labels=[1, 2]))
    table = read_queries(queries(tmp_path), CASES["image_folder"].columns, ["class-0", "class-1", "class-2"])
    assert (["class-1/0000.png", "class-2/0001.png"], [1, 2]) == (
        table["query_id"].to_pylist(),
        table["label"].to_pylist(),
    )


def test_a_query_image_of_no_known_class_is_refused(tmp_path):
    """Its label would mean nothing to the model."""
    write_images(tmp_path, plain_rows(1, labels=[7]))
    with pytest.raises(InputError, match=r"'class-7' is not one of the classes \['class-0'\]"):
        read_queries(queries(tmp_path), CASES["image_folder"].columns, ["class-0"])


@tables
def test_another_column_can_be_the_query_id(word, tmp_path):
    """`queries.query_id` names it, and it stays among the columns; integers become text."""
    case = CASES[word]
    case.write(tmp_path / case.name, [{**row, "number": 7} for row in plain_rows(2)])
    table = read_queries(queries(tmp_path, query_id="number"), case.columns, None)
    assert (["7", "7"], True) == (table["query_id"].to_pylist(), "number" in table.column_names)


@tables
def test_the_query_id_asked_for_wins_over_a_column_of_that_name(word, tmp_path):
    """A file may hold both; there is one query_id, the one the spec names."""
    case = CASES[word]
    case.write(tmp_path / case.name, query_rows(["a", "b"]))
    table = read_queries(queries(tmp_path, query_id="id"), case.columns, None)
    assert 1 == table.column_names.count("query_id")
    assert ["id-0000", "id-0001"] == table["query_id"].to_pylist()


@tables
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_query_row_without_an_id_is_an_input_error_that_names_it(word, row, tmp_path):
    """A query is never silently smaller."""
    case = CASES[word]
    ids = ["a", "b", "c"]
    ids[row] = None
    case.write(tmp_path / case.name, query_rows(ids))
    with pytest.raises(InputError, match=rf"query row {row} of .*{case.name}: query_id is null"):
        read_queries(queries(tmp_path), case.columns, ["class-0", "class-1", "class-2"])


@every_format
def test_a_bad_query_row_is_an_input_error_that_names_it(word, tmp_path):
    """Row, file, column, what was got and what was expected."""
    case = CASES[word]
    rows = query_rows(["a", "b", "c"])
    rows[1]["pixels"] = None
    case.write(tmp_path / case.name, rows)
    expected = (
        rf"query row 1 of .*{case.name}.*: column {case.features}: got .*, expected finite numbers of shape 1x4x4"
    )
    with pytest.raises(InputError, match=expected):
        read_queries(queries(tmp_path), case.columns, ["class-0", "class-1", "class-2"])


@tables
def test_queries_without_rows_are_refused(word, tmp_path):
    """The hint says what a query is."""
    case = CASES[word]
    case.write(tmp_path / case.name, [])
    with pytest.raises(InputError, match="no rows") as caught:
        read_queries(queries(tmp_path), case.columns, ["class-0", "class-1", "class-2"])
    assert "share a query_id" in caught.value.hint


# --- Parquet -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_group_rows", [1, 3, 7, 20])
@pytest.mark.parametrize("rows_each", [1, 3, 5, 20])
@pytest.mark.parametrize("kept_bytes", [10**6, 500, 0])
def test_row_groups_and_shards_need_not_agree(row_group_rows, rows_each, kept_bytes, tmp_path, monkeypatch):
    """Any row groups, any shards, any room to keep rows: the same rows."""
    monkeypatch.setattr(parquet, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(parquet, "DECODED_ROWS", 3)
    rows = plain_rows(20)
    write_parquet(tmp_path / "a.parquet", rows, row_group_rows)
    got = read(corpus(tmp_path, example_id="id"), CASES["parquet"].columns, rows_each)
    assert ([row["id"] for row in rows], pixels_of(rows)) == (got["ids"], got["features"])


@pytest.fixture
def opened_files(monkeypatch):
    """URIs of files opened for reading, in order."""
    opened, reading = [], parquet.storage.reading
    monkeypatch.setattr(parquet.storage, "reading", lambda uri: opened.append(uri) or reading(uri))
    return opened


@pytest.fixture
def large_group(tmp_path, monkeypatch):
    """A file of one row group, of which 3 rows are decoded at a time; shards of 8, 8 and 4 rows."""
    monkeypatch.setattr(parquet, "DECODED_ROWS", 3)
    path = tmp_path / "a.parquet"
    write_parquet(path, plain_rows(20), 20)
    opened = parquet.Parquet()
    shards = make_shards([opened.measure(*opened.files(list_files(str(path))))], 8)
    assert [8, 8, 4] == [shard.rows for shard in shards]
    return path, opened, shards


@pytest.mark.parametrize(("kept_bytes", "order", "times"), [
    (10**6, (0, 1, 2), 1), (10**6, (2, 0, 1), 1), (0, (0, 1, 2), 1), (0, (0, 2, 1), 2), (0, (2, 1, 0), 3),
])  # fmt: skip
def test_a_group_larger_than_shards_is_decoded_once(kept_bytes, order, times, large_group, opened_files, monkeypatch):
    """From first to last as shards ask for it; anew for one whose rows are no longer in memory, or for other columns."""
    monkeypatch.setattr(parquet, "KEPT_BYTES", kept_bytes)
    path, opened, shards = large_group
    whole = pq.read_table(path)
    for shard in (shards[i] for i in order):
        assert whole.select(["id"]).slice(shard.row_start, shard.rows).equals(opened.read(shard, ["id"]).table)
    assert times == len(opened_files)
    assert whole.select(["label"]).slice(0, 8).equals(opened.read(shards[0], ["label"]).table)
    assert times + 1 == len(opened_files)


def test_threads_share_a_large_group(large_group, opened_files):
    """Two shards asked for at the same time: one decodes, the other waits for it."""
    path, opened, shards = large_group
    with ThreadPoolExecutor(3) as pool:
        read = list(pool.map(lambda shard: opened.read(shard, ["id"]).table, shards))
    assert pq.read_table(path, columns=["id"]).equals(pa.concat_tables(read))
    assert len(opened_files) == 1


def test_a_large_group_is_opened_anew_after_an_error(large_group, opened_files):
    """What broke is not gone on with."""
    path, opened, shards = large_group
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    path.write_bytes(bytes(footer) + whole[footer:])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        opened.read(shards[0], ["id"])
    path.write_bytes(whole)
    assert all(shard.rows == len(opened.read(shard, ["id"]).table) for shard in shards)
    assert len(opened_files) == 2


def test_a_column_of_the_wrong_type_is_told_before_any_row_is_read(tmp_path):
    """Parquet knows its types: one message instead of a reject per row."""
    pq.write_table(pa.table({"pixels": ["a", "b"], "label": [0.5, 1.5]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet:\n") as caught:
        cut(corpus(tmp_path), CASES["parquet"].columns)
    told = str(caught.value)
    assert "column 'pixels': got string, expected finite numbers of shape 1x4x4" in told
    assert "column 'label': got double, expected an integer" in told


def test_ids_that_have_no_text_are_an_input_error(tmp_path):
    """A column of lists names no example."""
    rows = plain_rows(2)
    write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(InputError, match="pixels"):
        read(corpus(tmp_path, example_id="pixels"), CASES["parquet"].columns)


# --- text --------------------------------------------------------------------------------------------------------------

NUMBERS = [Column("features", ("x",)), Column("label", ("label",), "int64")]
SPELLINGS = {
    "plain": lambda text: text.encode(),
    "no line break at the end": lambda text: text.rstrip("\n").encode(),
    "blank lines": lambda text: text.replace("\n", "\n\n \n").encode(),
    "blank lines at the end": lambda text: (text + "\n\n\n").encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CRLF and blank lines": lambda text: text.replace("\n", "\r\n\r\n").encode(),
    "byte order mark": lambda text: text.encode("utf-8-sig"),
}
TEXTS = {
    "a.csv": "x,label,id\n" + "".join(f"{i}.5,{i},größe {i}\n" for i in range(MANY)),
    "a.jsonl": "".join(json.dumps({"x": i + 0.5, "label": i, "id": f"größe {i}"}) + "\n" for i in range(MANY)),
}


@pytest.mark.parametrize("rows_each", [100, STRIDE, WHOLE_FILE_ROWS])
@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("name", TEXTS)
def test_spellings_of_one_text_hold_the_same_rows(name, spell, rows_each, tmp_path):
    """Blank lines are no rows; line ends and byte order marks are no part of a value."""
    (tmp_path / name).write_bytes(spell(TEXTS[name]))
    got = read(corpus(tmp_path, example_id="id"), NUMBERS, rows_each)
    expected = (list(range(MANY)), [i + 0.5 for i in range(MANY)], [f"größe {i}" for i in range(MANY)], [])
    assert expected == tuple(got[part] for part in ("labels", "features", "ids", "rejects"))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("rows_each", [1, 100, STRIDE, WHOLE_FILE_ROWS])
def test_quoted_line_breaks_commas_and_quotes_are_part_of_their_value(newline, rows_each, tmp_path):
    """A CSV record ends where its quotes do, in whichever shard."""
    rows = [{"x": i, "label": i, "id": f'{i} says "a,\n\nb"'} for i in range(STRIDE + 10)]
    (tmp_path / "a.csv").write_bytes(csv_text(rows, newline).encode())
    got = read(corpus(tmp_path, example_id="id"), NUMBERS, rows_each)
    assert ([row["id"] for row in rows], []) == (got["ids"], got["rejects"])


cells = st.text(st.sampled_from('ab,"\n\r é'), max_size=6)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(cells, min_size=1, max_size=12), st.integers(1, 5), st.sampled_from(["\n", "\r\n"]))
def test_any_quoted_text_is_read_back(tmp_path, values, rows_each, newline):
    """Whatever stands between quotes, in any shards, is one row with that text."""
    rows = [{"x": i, "label": i, "id": f"{i}{value}"} for i, value in enumerate(values)]
    (tmp_path / "a.csv").write_bytes(csv_text(rows, newline, csv.QUOTE_ALL).encode())
    got = read(corpus(tmp_path, example_id="id"), NUMBERS, rows_each)
    assert ([row["id"] for row in rows], []) == (got["ids"], got["rejects"])


MALFORMED = {
    "JSON that breaks off": ("a.jsonl", b'{"x": 1, "label"', "a JSON object"),
    "JSON that is no object": ("a.jsonl", b"[1, 2]", "a JSON object"),
    "JSON that is not UTF-8": ("a.jsonl", b'{"x": "\xff"}', "a JSON object"),
    "JSON of lists without end": ("a.jsonl", b"[" * 100_000, "a JSON object"),
    "CSV with a value too few": ("a.csv", b"1,2", "3 values"),
    "CSV with a value too many": ("a.csv", b"1,2,3,4", "3 values"),
    "CSV that is not UTF-8": ("a.csv", b"1,2,\xff", "CSV in UTF-8"),
}


@pytest.mark.parametrize("rows_each", [1, 2, WHOLE_FILE_ROWS])
@pytest.mark.parametrize(("name", "line", "expected"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_becomes_a_reject_with_its_position(name, line, expected, rows_each, tmp_path):
    """The lines around it are read; the reject shows its beginning."""
    good = TEXTS[name].encode().splitlines()[:5]
    (tmp_path / name).write_bytes(b"\n".join([*good[:3], line, *good[3:]]) + b"\n")
    row = 2 if name == "a.csv" else 3
    got = read(corpus(tmp_path, example_id="id"), NUMBERS, rows_each)
    assert [(row, "(row)", expected)] == [(r.row, r.column, r.expected) for r in got["rejects"]]
    assert [i for i in range(len(good) + (name != "a.csv")) if i != row] == got["rows"]
    assert line[:10].decode("utf-8", "replace").strip() in got["rejects"][0].got


def test_json_text_that_no_table_can_hold_rejects_its_row_only(tmp_path):
    """Half a surrogate pair is legal JSON and no text: its row is rejected, the others are read."""
    lines = [{"x": i, "label": i, "id": f"id-{i}"} for i in range(3)]
    lines[1]["id"] = "\ud800"
    write_jsonl(tmp_path / "a.jsonl", lines)
    got = read(corpus(tmp_path, example_id="id"), NUMBERS)
    assert ([0, 2], [1]) == (got["rows"], [reject.row for reject in got["rejects"]])


def test_no_row_vanishes_behind_a_stray_quote(tmp_path):
    """Lines that a lone quote binds together are read, or shown in a reject: none is dropped without a word."""
    (tmp_path / "a.csv").write_bytes(b'x,label,id\n1,1,first\n2,2,5" disk\n3,3,third\n4,4,fourth\n')
    got = read(corpus(tmp_path, example_id="id"), NUMBERS)
    told = " ".join([*got["ids"], *(reject.got for reject in got["rejects"])])
    assert ["first", "disk", "third", "fourth"] == [
        word for word in ("first", "disk", "third", "fourth") if word in told
    ]


def test_a_long_csv_value_is_a_value_like_any_other(tmp_path):
    """The text of a 224 x 224 image is longer than the csv module's own limit."""
    pixels = [0.125] * 30_000
    (tmp_path / "a.csv").write_bytes(csv_text([{"x": pixels, "label": 1}]).encode())
    columns = [Column("features", ("x",), "float32", (30_000,)), NUMBERS[1]]
    got = read(corpus(tmp_path), columns)
    assert ([pixels], []) == (got["features"], got["rejects"])


@pytest.mark.parametrize("rows_each", [1, 2, WHOLE_FILE_ROWS])
def test_ids_of_mixed_json_types_do_not_depend_on_the_rows_read_with_them(rows_each, tmp_path):
    """A number beside words is its text, and the words are not quoted, in any shards."""
    ids = ["a", 7, "b", 2.5, True]
    write_jsonl(tmp_path / "a.jsonl", [{"x": i, "label": i, "id": one} for i, one in enumerate(ids)])
    got = read(corpus(tmp_path, example_id="id"), NUMBERS, rows_each)["ids"]
    assert ["a", "7", "b", "2.5", "true"] == got


def test_values_of_mixed_json_types_decode_as_each_alone(tmp_path):
    """Numbers, their text and lists of one in one column are numbers, whatever stands beside them."""
    write_jsonl(tmp_path / "a.jsonl", [{"x": x, "label": i} for i, x in enumerate([1, "2.5", [3], None, "no"])])
    opened = corpus(tmp_path)
    whole = read(opened, NUMBERS)
    assert ([1.0, 2.5, 3.0], [3, 4]) == (whole["features"], [reject.row for reject in whole["rejects"]])
    assert whole == read(opened, NUMBERS, 1)


def test_a_key_that_a_json_line_lacks_is_null(tmp_path):
    """The row is rejected for its column, not for its form."""
    (tmp_path / "a.jsonl").write_text('{"x": 1, "label": 0}\n{"label": 1}\n')
    got = read(corpus(tmp_path), NUMBERS)
    assert [(1, "x", "null")] == [(r.row, r.column, r.got) for r in got["rejects"]]


@pytest.mark.parametrize("content", [b"", b"\n\n"], ids=["nothing", "blank lines"])
def test_a_csv_without_a_header_is_unreadable(content, tmp_path):
    """The message names the file."""
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.csv cannot be read as CSV: it has no header line"):
        cut(corpus(tmp_path), NUMBERS)


# --- image folders -----------------------------------------------------------------------------------------------------


def test_labels_follow_the_sorted_names_of_the_class_folders(tmp_path):
    """10 before 2: names, not numbers; the run remembers the order."""
    write_images(tmp_path, plain_rows(3, labels=[2, 10, 1]))
    opened = corpus(tmp_path)
    assert [0, 1, 2] == read(opened, CASES["image_folder"].columns)["labels"]
    assert ["class-1", "class-10", "class-2"] == opened.resolved.classes


def test_labels_follow_the_classes_that_the_spec_names(tmp_path):
    """In the order given; one may have no images."""
    write_images(tmp_path, plain_rows(2, labels=[1, 2]))
    opened = corpus(tmp_path, classes=["class-2", "class-9", "class-1"])
    assert [2, 0] == read(opened, CASES["image_folder"].columns)["labels"]


def test_an_image_folder_has_four_columns(tmp_path):
    """The bytes, the label, the class's name and the path below the corpus."""
    write_images(tmp_path, plain_rows(1))
    opened = corpus(tmp_path)
    [shard] = cut(opened, CASES["image_folder"].columns)
    [row] = opened.payload(shard, [0], ["image", "label", "class", "path"]).to_pylist()
    data = (tmp_path / "class-0" / "0000.png").read_bytes()
    assert {"image": data, "label": 0, "class": "class-0", "path": "class-0/0000.png"} == row
