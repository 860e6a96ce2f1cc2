"""Which files are read: what lies beside them is said or refused, key=value folders are columns, paths are literal first."""

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.corpus import Corpus
from pipeline.errors import InputError, SpecError
from pipeline.freeze import require_apart
from pipeline.plan import make_shards
from pipeline.queries import read_queries
from pipeline.records import Column
from pipeline.spec import CorpusSection, QueriesSection

X = [Column("x", ("x",), "float32")]


def corpus(uri, **fields):
    return Corpus(CorpusSection(uri=str(uri), **fields))


def write_parquet(path, first=0, rows=2, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = range(first, first + rows)
    pq.write_table(pa.table({"id": [f"r{i}" for i in ids], "x": [float(i) for i in ids], **columns}), path)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def touch(path, data=b"data"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)


def ids(opened):
    return [one for part in parts(opened) for one in part.example_id_N.to_pylist()]


def sources(opened):
    return [one for part in parts(opened) for one in part.source_N.to_pylist()]


def parts(opened, columns=X):
    return [opened.read(shard, columns) for shard in make_shards(opened.measure(opened.survey_files(), columns), 100)]


# --- what is not read --------------------------------------------------------------------------------------------------


def test_files_that_are_not_read_are_said_in_one_line(tmp_path, capsys):
    """By suffix and number: notes, files without a suffix, hidden ones, links that lead nowhere."""
    write_parquet(tmp_path / "a.parquet")
    for name in ("README.md", "b.txt", "sub/c.TXT", "part-0", "_SUCCESS", ".a.parquet.crc", "_temporary/d.parquet"):
        touch(tmp_path / name)
    os.symlink(tmp_path / "nowhere.parquet", tmp_path / "dead.parquet")
    assert ["r0", "r1"] == ids(corpus(tmp_path, example_id="id"))
    said = capsys.readouterr().err.splitlines()
    assert [
        f"{tmp_path}: files that are not read: 2 .txt, 1 .md, 1 without a suffix, "
        "3 with names that begin with a dot or an underscore, 1 link(s) that lead nowhere"
    ] == said


def test_nothing_is_said_where_everything_is_read(tmp_path, capsys):
    """Compressed text beside plain text is read."""
    write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "x": 1}])
    touch(tmp_path / "b.jsonl.gz", gzip.compress(b'{"id": "b", "x": 2}\n'))
    touch(tmp_path / "c.json.gz", gzip.compress(b'{"id": "c", "x": 3}\n'))
    assert (["a", "b", "c"], "") == (ids(corpus(tmp_path, example_id="id")), capsys.readouterr().err)


DATA = [
    "b.parquet.gz", "b.arrow", "b.feather", "b.ORC", "b.avro", "b.tsv", "b.zip", "b.tar", "b.tar.gz", "b.xlsx", "b.sqlite",
    "b.jsonl.xz", "b.csv.lz4", "b.npy", "deep/er/b.arrow",
]  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_that_is_not_read_is_refused_with_a_way_out(name, tmp_path):
    """It is no note: its rows would be missing from every ranking. A glob that does not name it is the way out."""
    write_parquet(tmp_path / "a.parquet")
    touch(tmp_path / name)
    with pytest.raises(InputError, match=r"holds data, and would be left out") as caught:
        corpus(tmp_path).survey_files()
    assert (True, True) == (name in str(caught.value), f"{tmp_path}/**/*.parquet" in caught.value.hint)
    assert ["r0", "r1"] == ids(corpus(f"{tmp_path}/**/*.parquet", example_id="id"))


@pytest.mark.parametrize("name", ["b.arrow", "b.parquet.gz", "b.tsv"])
def test_a_folder_of_nothing_but_unreadable_data_names_the_way_out(name, tmp_path):
    """The hint is about the files that are there."""
    touch(tmp_path / name)
    with pytest.raises(InputError, match=r"none of 1 file\(s\) there ends in") as caught:
        corpus(tmp_path)
    assert "is not read: " in caught.value.hint


def test_files_of_a_format_that_the_spec_did_not_choose_are_said(tmp_path, capsys):
    """`format` picks one; the others are readable and were left out on purpose."""
    write_parquet(tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", [{"x": 1}])
    touch(tmp_path / "c.csv.gz", gzip.compress(b"x\n1\n"))
    assert ["r0", "r1"] == ids(corpus(tmp_path, format="parquet", example_id="id"))
    assert f"{tmp_path}: files that are not read: 1 .gz, 1 .jsonl\n" == capsys.readouterr().err


def test_one_file_by_name_has_no_neighbours(tmp_path, capsys):
    """Who names a file wants that file."""
    write_parquet(tmp_path / "a.parquet")
    touch(tmp_path / "b.arrow")
    assert (["r0", "r1"], "") == (ids(corpus(tmp_path / "a.parquet", example_id="id")), capsys.readouterr().err)


def test_unread_data_beside_queries_is_refused_too(tmp_path):
    """A query file that nobody reads is a query that nobody asked."""
    write_jsonl(tmp_path / "a.jsonl", [{"query_id": "q", "x": 1}])
    touch(tmp_path / "b.jsonl.xz")
    with pytest.raises(InputError, match=r"b\.jsonl\.xz holds data"):
        read_queries(QueriesSection(uri=str(tmp_path)), X, None)


LAKES = {
    "Delta": "_delta_log/00000000000000000000.json",
    "Iceberg": "metadata/00000-a.metadata.json",
    "Hudi": ".hoodie/hoodie.properties",
    "Lance": "_versions/1.manifest",
    "Spark streaming": "_spark_metadata/0",
}


@pytest.mark.parametrize("below", ["", "tables/one/"])
@pytest.mark.parametrize("lake", LAKES)
def test_a_table_of_a_lake_is_refused_with_the_way_out(lake, below, tmp_path):
    """Files that its log has removed still lie there, and would be read as training examples."""
    write_parquet(tmp_path / below / "data/a.parquet")
    touch(tmp_path / below / LAKES[lake])
    fields = {"format": "parquet"} if lake == "Iceberg" else {}
    with pytest.raises(
        InputError, match=rf"holds a table in {lake} format .*log says which of the files count"
    ) as caught:
        corpus(tmp_path, **fields).survey_files()
    assert "write the table out as plain Parquet" in caught.value.hint


def test_a_link_back_up_is_not_followed(tmp_path):
    """A loop holds nothing new; a link to another folder is read."""
    write_parquet(tmp_path / "c" / "a.parquet")
    write_parquet(tmp_path / "real" / "b.parquet", first=2)
    os.symlink(tmp_path / "c", tmp_path / "c" / "loop")
    os.symlink(tmp_path / "real", tmp_path / "c" / "link")
    assert ["r0", "r1", "r2", "r3"] == ids(corpus(tmp_path / "c", example_id="id"))


# --- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data[v1]", "p[0].parquet", "what?", "a*b", "[", "x[1-"])
def test_a_path_that_exists_is_that_path(name, tmp_path):
    """Whatever characters are in it; of a corpus as of queries, of a folder as of a file."""
    file = tmp_path / name if name.endswith(".parquet") else tmp_path / name / "a.parquet"
    write_parquet(file, query_id=["q", "q"])
    write_parquet(tmp_path / "datav" / "a.parquet", first=7)
    opened = corpus(tmp_path / name, example_id="id")
    assert ["r0", "r1"] == ids(opened)
    assert [f"{file.name}#0", f"{file.name}#1"] == ids(corpus(tmp_path / name))
    assert 2 == len(read_queries(QueriesSection(uri=str(tmp_path / name)), X, None))


def test_a_glob_that_names_no_path_is_a_glob(tmp_path):
    """Brackets are a set of characters where no file is called so."""
    for i in range(3):
        write_parquet(tmp_path / f"p{i}.parquet", first=2 * i)
    assert ["r0", "r1", "r4", "r5"] == ids(corpus(f"{tmp_path}/p[02].parquet", example_id="id"))


# --- folders as columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl", "p.csv"])
def test_folders_called_key_value_are_columns_where_the_spec_asks_for_them(name, tmp_path):
    """As source, as payload and as what the task reads; escapes are resolved, and Hive's word for null is null."""
    for i, folder in enumerate(("site=a%2Fb/n=1", "site=c d/n=2", "site=__HIVE_DEFAULT_PARTITION__/n=3")):
        file = tmp_path / folder / name
        file.parent.mkdir(parents=True)
        if name == "p.parquet":
            write_parquet(file, first=2 * i)
        elif name == "p.jsonl":
            write_jsonl(file, [{"id": f"r{2 * i + j}", "x": 0} for j in range(2)])
        else:
            file.write_text(f"id,x\nr{2 * i},0\nr{2 * i + 1},0\n")
    opened = corpus(tmp_path, example_id="id", source="site", payload=["n", "x"])
    columns = [*X, Column("n", ("n",), "int64")]
    shards = make_shards(opened.measure(opened.survey_files(), columns), 1)
    read = [opened.read(shard, columns) for shard in shards]
    found = {part.example_id_N[0].as_py(): (part.source_N[0].as_py(), part.arrays["n"].tolist()) for part in read}
    assert {
        "r0": ("a/b", [1]), "r1": ("a/b", [1]), "r2": ("c d", [2]), "r3": ("c d", [2]), "r4": (None, [3]), "r5": (None, [3])
    } == found  # fmt: skip
    assert ["n", "x"] == sorted(opened.payload(shards[0], [0], ["n", "x"]).column_names)


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl", "p.csv"])
def test_a_column_of_the_file_wins_over_its_folder(name, tmp_path):
    """What stands in the file was read before there were folders; only a row of JSON that lacks the key takes the folder's."""
    file = tmp_path / "site=folder" / name
    if name == "p.parquet":
        write_parquet(file, site=["own", None])
    elif name == "p.jsonl":
        write_jsonl(file, [{"x": 0, "site": "own"}, {"x": 1}])
    else:
        file.parent.mkdir()
        file.write_text("x,site\n0,own\n1,\n")
    assert ["own", "folder" if name == "p.jsonl" else None] == sources(corpus(tmp_path, source="site"))


def test_a_source_that_is_neither_column_nor_folder_is_told_with_both(tmp_path):
    """The folders' names are among the known columns."""
    write_parquet(tmp_path / "site=a" / "p.parquet")
    opened = corpus(tmp_path, source="sight")
    with pytest.raises(InputError, match=r"column 'sight' is not known; did you mean 'site'"):
        opened.measure(opened.survey_files(), X)


def test_queries_may_be_named_by_their_folders(tmp_path):
    """A folder per query, as Spark's partitionBy writes them."""
    for name in ("red", "green"):
        write_parquet(tmp_path / f"query_id={name}" / "p.parquet")
    assert ["green", "green", "red", "red"] == read_queries(QueriesSection(uri=str(tmp_path)), X, None)[
        "query_id"
    ].to_pylist()


# --- image folders -----------------------------------------------------------------------------------------------------

PIXELS = [Column("image", ("image",), "float32", (4, 4)), Column("label", ("label",), "int64")]


def labels(opened):
    found = {}
    for part in parts(opened, PIXELS):
        found |= dict(zip(part.example_id_N.to_pylist(), part.arrays["label"].tolist(), strict=True))
    return found


@pytest.mark.parametrize("odd", ["_unknown", "ant", "Bee", "bee 2"])
@pytest.mark.parametrize("empty", [False, True])
def test_every_sub_folder_is_a_class_in_sorted_order(odd, empty, tmp_path, capsys):
    """As torchvision numbers them: one that begins with an underscore and one without images count; the numbers are said."""
    for name in ("bee", "cat"):
        write_image(tmp_path / name / "a.png")
    if empty:
        (tmp_path / odd).mkdir()
    else:
        write_image(tmp_path / odd / "a.png")
    order = sorted(["bee", "cat", odd])
    expected = {f"{name}/a.png": i for i, name in enumerate(order) if not (empty and name == odd)}
    assert expected == labels(corpus(tmp_path))
    shown = ", ".join(f"{i} {name}{' (no images)' * (empty and name == odd)}" for i, name in enumerate(order))
    assert f"{tmp_path}: labels: {shown}\n" == capsys.readouterr().err


def test_torchvision_gives_the_same_labels(tmp_path):
    """Sorted names of all sub-folders: what its `find_classes` does, spelt out."""
    for name in ("b", "_a", "C", "a", "10", "9"):
        write_image(tmp_path / name / "x.png")
    assert {f"{name}/x.png": i for i, name in enumerate(sorted(os.listdir(tmp_path)))} == labels(corpus(tmp_path))


def test_a_folder_of_images_that_begins_with_a_dot_is_refused(tmp_path):
    """torchvision would give it a label; listing the classes says what is meant."""
    for name in (".old", "cat"):
        write_image(tmp_path / name / "a.png")
    with pytest.raises(InputError, match=r"folder '.old' holds images, and its name begins with a dot"):
        corpus(tmp_path).survey_files()
    assert {"cat/a.png": 0} == labels(corpus(tmp_path, classes=["cat"]))


def test_images_in_formats_that_are_not_read_are_refused(tmp_path):
    """A class may be nothing but photographs of a telephone."""
    write_image(tmp_path / "cat" / "a.png")
    touch(tmp_path / "dog" / "b.heic")
    with pytest.raises(InputError, match=r"b\.heic holds data") as caught:
        corpus(tmp_path).survey_files()
    assert "convert it to PNG or JPEG" in caught.value.hint


def test_portable_pixmaps_are_images(tmp_path):
    """MNIST and its like come as PGM."""
    write_image(tmp_path / "cat" / "a.pgm")
    [part] = parts(corpus(tmp_path), PIXELS)
    assert np.zeros((1, 4, 4)).tolist() == part.arrays["image"].tolist()


# --- the run's folder --------------------------------------------------------------------------------------------------

TOGETHER = [
    ("c", "c"), ("c/run", "c"), ("c/a/run", "c/"), ("run", "run/c"), ("run", "run/c.parquet"), ("c/run", "c/**/*.parquet"),
    ("c/run", "c/run/topk/*"), ("c/run", "c/*/*.parquet"),
]  # fmt: skip
APART = [("c-run", "c"), ("run", "c"), ("c/run", "c/a.parquet"), ("c/run", "c/*.parquet"), ("c/run", "c/part-*/**")]


@pytest.mark.parametrize("field", ["corpus.uri", "queries.uri"])
@pytest.mark.parametrize(("run", "inputs"), TOGETHER)
def test_a_run_in_its_inputs_and_inputs_in_a_run_are_refused(run, inputs, field, tmp_path):
    """The run's own tables would be read as training examples at the next start."""
    (tmp_path / "c").mkdir()
    with pytest.raises(SpecError, match=rf"run.uri: .* and {field} .* are in one another"):
        require_apart(f"{tmp_path}/{run}", {field: f"{tmp_path}/{inputs}"})


@pytest.mark.parametrize(("run", "inputs"), APART)
def test_a_run_beside_its_inputs_is_fine(run, inputs, tmp_path):
    """One file, or a glob that does not reach into the run, may lie in the folder above it."""
    (tmp_path / "c").mkdir()
    assert require_apart(f"{tmp_path}/{run}", {"corpus.uri": f"{tmp_path}/{inputs}", "queries.uri": None}) is None


def test_a_run_and_its_corpus_are_told_apart_behind_links(tmp_path):
    """A link to the corpus is the corpus."""
    (tmp_path / "c").mkdir()
    os.symlink(tmp_path / "c", tmp_path / "link")
    with pytest.raises(SpecError, match="are in one another"):
        require_apart(f"{tmp_path}/c/run", {"corpus.uri": f"{tmp_path}/link"})
    with pytest.raises(SpecError, match="are in one another"):
        require_apart("s3://lake/c/run", {"corpus.uri": "s3://lake/c"})
    assert require_apart("s3://lake/c/run", {"corpus.uri": f"{tmp_path}/c"}) is None
