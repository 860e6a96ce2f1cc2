"""Scores and rankings as Iceberg tables, on real catalogs: sqlite here, and SeaweedFS's REST catalog over its S3."""

import copy
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyiceberg.expressions import EqualTo
from typer.testing import CliRunner

from jobs.cli import app
from pipeline import catalog as catalogs
from pipeline import publish as publishing
from pipeline import storage
from pipeline.audit import audit, collect
from pipeline.errors import ArtifactError, SpecError, StorageError, UnavailableError
from pipeline.extend import extend
from pipeline.frozen import open_run
from pipeline.publish import file_uri, namespace_of, publish
from pipeline.records import RANKED, SCORES
from pipeline.run import finish, rerank
from pipeline.specfile import parse_spec
from tests.conftest import read_scores, run_without_ray

pytestmark = pytest.mark.slow

KEYS = [("query_id", "ascending"), ("example_id", "ascending")]


@pytest.fixture(scope="module")
def finished_once(world, tmp_path_factory):
    run = run_without_ray(parse_spec(copy.deepcopy(world.tree(tmp_path_factory.mktemp("published") / "why"))))
    finish(run)
    return run


@pytest.fixture
def finished(finished_once, tmp_path):
    """A sealed run of this test's own."""
    shutil.copytree(finished_once.uri(), tmp_path / "why")
    return open_run(str(tmp_path / "why"))


@pytest.fixture
def finished_on_s3(finished_once, s3):
    """The same on S3."""
    return on_s3(finished_once, s3)


def on_s3(run, s3):
    uri = f"{s3.prefix('lake')}/why"
    for path in storage.objects(run.uri()):
        storage.write_bytes(f"{uri}/{path}", storage.read_bytes(run.uri(path)))
    return open_run(uri)


@pytest.fixture
def sqlite(tmp_path):
    return f"sqlite:///{tmp_path}/lake.db"


@contextmanager
def lake(uri, run):
    with catalogs.opened(uri, None, file_uri(run.uri("lake"))) as catalog:
        yield catalog


def published(uri, run, namespace=""):
    with lake(uri, run) as catalog:
        return publish(open_run(run.uri()), catalog, namespace)


def ranked_again(run, table):
    """Another ranking in the place of the run's, with the digest that vouches for it."""
    meta = run.ranking()
    written = run.write_table(table, "topk", "ranked.parquet")["sha256"]
    run.write_json({**meta, "tables": {**meta["tables"], "ranked.parquet": written}}, "topk", "meta.json")


def table(uri, run, name):
    with lake(uri, run) as catalog:
        return catalog.load_table(("why", name))


def rows(loaded):
    """A table's rows, sorted, with its query ids as strings whether or not they come as a dictionary."""
    found = loaded.scan().to_arrow()
    position = found.schema.get_field_index("query_id")
    return found.set_column(position, "query_id", found["query_id"].cast(pa.string())).sort_by(KEYS)


def stored(run):
    """Digest of every object of the run, but for what a publication may write."""
    return {
        path: storage.file_digest(run.uri(path)) for path in storage.objects(run.uri()) if not path.startswith("lake/")
    }


def test_scores_and_ranking_become_described_tables(finished, sqlite):
    """Every row once, query ids as strings, our words and units as comments; not a byte of the run is rewritten."""
    before = stored(finished)
    scores, topk = published(sqlite, finished)
    assert (300, 6, 6, 0) == (scores.rows, scores.files, scores.added, scores.removed)
    assert ("why.topk", 20, 1) == (topk.table, topk.rows, topk.files)
    assert before == stored(finished)

    loaded = table(sqlite, finished, "scores")
    expected = read_scores(finished)
    assert expected == rows(loaded).select(expected.column_names)
    assert "string" == str(loaded.schema().find_field("query_id").field_type)
    score = loaded.schema().find_field("score")
    assert SCORES.field("score").metadata[b"description"].decode() + " [nats]" == score.doc
    assert score.required
    assert {file_uri(finished.uri(path)) for path in before if path.startswith("scores/")} == {
        task.file.file_path for task in loaded.scan().plan_files()
    }
    ranked = table(sqlite, finished, "topk")
    assert [*RANKED.names, "pixels", "label"] == [field.name for field in ranked.schema().fields]
    original = pq.ParquetFile(finished.uri("topk/ranked.parquet")).read()
    assert original["example_id"].to_pylist() == ranked.scan().to_arrow()["example_id"].to_pylist()


def test_score_files_have_the_highest_score_first(finished):
    """Equal scores in corpus order: the order is a function of the scores, and so are the bytes."""
    for path in (path for path in stored(finished) if path.startswith("scores/")):
        found = pq.ParquetFile(finished.uri(path)).read().select(["score", "row"])
        assert found == found.sort_by([("score", "descending"), ("row", "ascending")])


def test_engines_prune_by_query_and_by_score(finished, sqlite):
    """A scan of one query plans that query's files only; bounds in the metadata leave out the files below a threshold."""
    published(sqlite, finished)
    loaded = table(sqlite, finished, "scores")
    assert "query_id" == loaded.spec().fields[0].name
    planned = list(loaded.scan(row_filter="query_id == 'copy-of-3'").plan_files())
    assert 3 == len(planned)
    assert all("query_id=copy-of-3/" in task.file.file_path for task in planned)
    scores = read_scores(finished)["score"]
    highest = pc.max(scores).as_py()
    top = loaded.scan(row_filter=f"score >= {highest!r}")
    assert 1 == len(list(top.plan_files()))
    assert 1 == len(top.to_arrow())


def test_publishing_twice_changes_nothing(finished, sqlite):
    """The second time: no new snapshot of either table, no new object."""
    published(sqlite, finished)
    ids = [table(sqlite, finished, name).metadata_location for name in ("scores", "topk")]
    objects = set(storage.objects(finished.uri()))
    assert [(0, 0), (0, 0)] == [(each.added, each.removed) for each in published(sqlite, finished)]
    assert ids == [table(sqlite, finished, name).metadata_location for name in ("scores", "topk")]
    assert objects == set(storage.objects(finished.uri()))


def test_what_is_published_is_no_orphan(finished, sqlite):
    """`verify` finds nothing wrong in a published run, and `gc` leaves the lake's files where tables expect them."""
    published(sqlite, finished)
    found = audit(finished)
    assert ([], {}) == (found.damage, found.orphans)
    assert {} == collect(finished, older_than_s=0)
    assert 20 == len(rows(table(sqlite, finished, "topk")))


def test_a_grown_run_adds_only_its_new_files(world, make_spec, sqlite, tmp_path):
    """New queries and new corpus files: what the table had stays where it was, the ranking is the whole run's."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    shutil.copy(world.corpus, folder / "a.parquet")
    spec = make_spec(f"corpus.uri={folder}", name="why")
    run = run_without_ray(spec)
    finish(run)
    published(sqlite, run)
    first = {task.file.file_path for task in table(sqlite, run, "scores").scan().plan_files()}

    more = world.table().slice(0, 40)
    more = more.set_column(0, "id", pa.array([f"late-{i:02d}" for i in range(40)]))
    pq.write_table(more, folder / "b.parquet")
    queries = tmp_path / "more.parquet"
    row = 11
    asked = {"query_id": ["copy-of-11"], "pixels": [world.pixels[row]], "label": [world.labels[row]]}
    pq.write_table(pa.table(asked), queries)
    extend(run.uri(), str(queries), str(folder))
    with pytest.raises(ArtifactError, match="not sealed"):
        published(sqlite, run)
    run = run_without_ray(spec)
    finish(run)
    scores, topk = published(sqlite, run)
    assert (190 * 3, 0) == (scores.rows, scores.removed)
    assert scores.files == len(first) + scores.added
    loaded = table(sqlite, run, "scores")
    assert first < {task.file.file_path for task in loaded.scan().plan_files()}
    assert 2 == len(loaded.snapshots())
    expected = read_scores(run)
    assert expected == rows(loaded).select(expected.column_names)
    assert (3 * 2 * 5, 1, 1) == (topk.rows, topk.files, topk.removed)


def test_any_query_id_and_a_shard_without_scores(world, sqlite, s3, tmp_path):
    """Ids that need quoting or look like numbers come back as they were, local and on S3; an empty file is left out."""
    ids = ["007", "a/b c", "50% é #?"]
    asked = {"query_id": ids, "pixels": list(world.pixels[:3]), "label": world.labels[:3]}
    pq.write_table(pa.table(asked), tmp_path / "asked.parquet")
    corpus = world.table()
    blank = pa.array([None if 64 <= i < 128 else label for i, label in enumerate(world.labels)], pa.int64())
    pq.write_table(corpus.set_column(2, "label", blank), tmp_path / "corpus.parquet")
    tree = copy.deepcopy(world.tree(tmp_path / "why"))
    tree["corpus"]["uri"], tree["queries"]["uri"] = str(tmp_path / "corpus.parquet"), str(tmp_path / "asked.parquet")
    run = run_without_ray(parse_spec(tree, ["score.max_reject_fraction=0.5"]))
    finish(run)
    for place in (run, on_s3(run, s3)):
        scores, _ = published(sqlite, place, "lake" if place is run else "lake_on_s3")
        assert (86 * 3, 2 * 3) == (scores.rows, scores.files)
        with lake(sqlite, place) as catalog:
            loaded = catalog.load_table(scores.table)
        assert set(ids) == set(rows(loaded)["query_id"].to_pylist())
        for query_id in ids:
            assert 86 == len(loaded.scan(row_filter=EqualTo("query_id", query_id)).to_arrow())


def test_a_new_ranking_replaces_the_old_in_one_snapshot(finished, sqlite):
    """After `rank` the table is as it was until it is published; then it shows the latest, and what was stays readable."""
    published(sqlite, finished)
    before = rows(table(sqlite, finished, "topk"))
    rerank(finished.uri(), ["rank.k=2", "rank.transform=signed"])
    assert before == rows(table(sqlite, finished, "topk"))
    scores, topk = published(sqlite, finished)
    assert (0, 0) == (scores.added, scores.removed)
    assert (8, 1, 1, 1) == (topk.rows, topk.files, topk.added, topk.removed)
    loaded = table(sqlite, finished, "topk")
    assert 2 == len(loaded.snapshots())
    assert 8 == len(rows(loaded))
    assert 20 == len(loaded.scan(snapshot_id=loaded.snapshots()[0].snapshot_id).to_arrow())


def test_a_ranking_with_another_payload_can_be_published(finished, sqlite):
    """A payload column that was not there before is added to the table; one that is gone is null."""
    published(sqlite, finished)
    ranked = finished.read_ranked()[0].drop_columns(["label"])
    noted = pa.field("note", pa.string(), True, {"description": "Payload: column 'note' of the corpus."})
    ranked_again(finished, ranked.append_column(noted, pa.array(["seen"] * len(ranked))))
    published(sqlite, finished)
    loaded = table(sqlite, finished, "topk")
    found = loaded.scan().to_arrow()
    assert {"seen"} == set(found["note"].to_pylist())
    assert found["label"].null_count == len(found)
    assert "Payload: column 'note' of the corpus." == loaded.schema().find_field("note").doc


def test_a_file_that_was_made_anew_is_registered_anew(finished, sqlite):
    """Other bytes under a known name, and a commit that says so: the old entry goes and the new comes in one snapshot."""
    published(sqlite, finished)
    receipt = next(finished.receipts())
    path = next(name for name in receipt.files if name.startswith("scores/"))
    anew = pq.ParquetFile(finished.uri(path)).read().slice(0, 3)
    written = finished.write_table(anew, path)
    commit = finished.read_json("commits", f"{receipt.name}.json")
    finished.write_json({**commit, "files": {**commit["files"], path: written}}, "commits", f"{receipt.name}.json")
    scores, _ = published(sqlite, finished)
    assert (6, 6, 6) == (scores.files, scores.added, scores.removed)
    loaded = table(sqlite, finished, "scores")
    assert 2 == len(loaded.snapshots())
    assert scores.rows == len(rows(loaded)) == 300 - receipt.rows + 3


def at_once(publication):
    """Four of the same at the same moment."""
    start = threading.Barrier(4)

    def go(_):
        start.wait()
        return publication()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(go, range(4)))


def test_publications_at_once_add_nothing_twice(finished, sqlite):
    """Of tables that are not there, of a ranking that is another, of files that are new: every file is in them once."""
    with lake(sqlite, finished):
        pass  # the catalog is there
    for k in (5, 3):
        rerank(finished.uri(), [f"rank.k={k}"])
        at_once(lambda: published(sqlite, finished))
        assert 6 == len(list(table(sqlite, finished, "scores").scan().plan_files()))
        assert 1 == len(list(table(sqlite, finished, "topk").scan().plan_files()))
        assert 4 * k == len(table(sqlite, finished, "topk").scan().to_arrow())


def test_a_growing_table_that_others_grow_at_once_has_every_file_once(finished, sqlite):
    """Four add the same three files to the same three: a commit that lost looks again at what is missing."""
    whole = publishing._scores(finished)
    half = replace(whole, files=dict(list(whole.files.items())[:3]))

    def register(content):
        with lake(sqlite, finished) as catalog:
            return publishing._register(finished, catalog, ("why", "scores"), content)

    with lake(sqlite, finished) as catalog:
        catalog.create_namespace("why")
    register(half)
    at_once(lambda: register(whole))
    loaded = table(sqlite, finished, "scores")
    assert sorted(whole.files) == sorted(task.file.file_path for task in loaded.scan().plan_files())
    assert 2 == len(loaded.snapshots())


def test_an_unsealed_run_is_refused(finished, sqlite):
    """Without _SUCCESS nothing is registered."""
    storage.remove(finished.uri("_SUCCESS"))
    with pytest.raises(ArtifactError, match="not sealed"):
        published(sqlite, finished)
    with lake(sqlite, finished) as catalog:
        assert [] == catalog.list_namespaces()


def test_another_runs_tables_are_left_alone(finished, sqlite, tmp_path):
    """A second run of the same name is refused, and told to take another namespace, in which it stands beside the first."""
    published(sqlite, finished)
    shutil.copytree(finished.uri(), tmp_path / "elsewhere" / "why")
    other = open_run(str(tmp_path / "elsewhere" / "why"))
    with pytest.raises(ArtifactError, match="--namespace"):
        published(sqlite, other)
    assert 300 == published(sqlite, other, "other")[0].rows
    assert 300 == len(rows(table(sqlite, finished, "scores")))


def test_files_that_are_gone_are_said(finished, sqlite):
    """A score file that its commit names; then the metadata of a table, deleted with the folder that it lay in."""
    path = next(path for path in next(finished.receipts()).files if path.startswith("scores/"))
    data = storage.read_bytes(finished.uri(path))
    storage.remove(finished.uri(path))
    with pytest.raises(StorageError, match=r"(?s)shard-000000\.parquet.*mirrorscope verify"):
        published(sqlite, finished)
    storage.write_bytes(finished.uri(path), data)
    published(sqlite, finished)
    shutil.rmtree(finished.uri("lake"))
    with pytest.raises(StorageError, match=r"(?s)metadata\.json.*drop the table"):
        published(sqlite, finished)


def test_a_payload_that_iceberg_has_no_type_for_is_said(finished, sqlite):
    """Which column, which type, and what to do."""
    ranked, _ = finished.read_ranked()
    ranked_again(finished, ranked.append_column("lapse", pa.array([1] * len(ranked), pa.duration("s"))))
    with pytest.raises(ArtifactError, match=r"(?s)topk cannot be an Iceberg table: .*lapse.*duration.*corpus\.payload"):
        published(sqlite, finished)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("runs/why", "why"),
        ("s3://b/Why-This.2/", "why_this_2"),
        ("runs/2026-11-22", "run_2026_11_22"),
        ("/r/ü", "run_"),
    ],
)
def test_a_namespace_is_the_runs_name_as_catalogs_take_it(uri, name):
    """Small letters, digits and underscores, a letter first."""
    assert name == namespace_of(uri)


def test_without_pyiceberg_the_extra_is_named(finished, sqlite, monkeypatch):
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "pyiceberg.catalog", None)
    with pytest.raises(SpecError, match=r"pip install 'mirrorscope\[lake\]'"):
        published(sqlite, finished)


def test_catalogs_that_cannot_be_opened_are_said(finished, tmp_path):
    """Nobody listens; no folder for the database; a name that is not configured; a password in the URI, not repeated."""
    with pytest.raises(UnavailableError, match="does not answer"):
        published("http://127.0.0.1:9", finished)
    with pytest.raises(SpecError, match="a URI with a password") as refused:
        published("http://user:hunter/2@127.0.0.1:9", finished)
    assert "hunter" not in str(refused.value)
    with pytest.raises(StorageError, match="unable to open database file"):
        published(f"sqlite:///{tmp_path}/nowhere/lake.db", finished)
    with pytest.raises(SpecError, match="no catalog is configured under the name 'nemo'"):
        published("nemo", finished)


def test_a_configured_catalog_goes_by_its_name(finished, sqlite, tmp_path, monkeypatch):
    """PYICEBERG_CATALOG__LAKE__... describes a catalog; its own warehouse stands, and --warehouse goes before it."""
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", sqlite)
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__WAREHOUSE", f"file://{tmp_path}/house")
    published("lake", finished)
    assert table("lake", finished, "scores").location().startswith(f"file://{tmp_path}/house/")
    with catalogs.opened("lake", f"file://{tmp_path}/other", "") as catalog:
        publish(finished, catalog, "second")
        assert catalog.load_table("second.topk").location().startswith(f"file://{tmp_path}/other/")


def test_the_command_says_what_stands_in_the_catalog(finished, sqlite):
    """`publish`, twice: files added, then unchanged."""
    words = ["publish", finished.uri(), "--catalog", sqlite]
    first = CliRunner().invoke(app, words)
    assert 0 == first.exit_code, first.output
    assert re.search(r"why\.scores +│ +300 +│ +6 +│ +6 files added", first.output)
    assert 2 == CliRunner().invoke(app, words).output.count("unchanged")


def test_a_rest_catalog_over_s3(s3, finished_on_s3, monkeypatch):
    """Run on S3, SeaweedFS's REST catalog: the same rows, published twice once; nobody wrote a key down."""
    if s3.server is None:
        pytest.skip("a store of somebody's own may have no Iceberg catalog")
    secret = s3.environment["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("PYICEBERG_CATALOG__DEFAULT__CREDENTIAL", f"{s3.environment['AWS_ACCESS_KEY_ID']}:{secret}")
    run = finished_on_s3
    for added in (6, 0):
        with catalogs.opened(s3.iceberg_uri, s3.table_bucket, "") as catalog:
            assert added == publish(run, catalog)[0].added
            loaded = catalog.load_table("why.scores")
            assert 1 == len(loaded.snapshots())
            expected = read_s3(run)
            assert expected == rows(loaded).select(expected.column_names)
            assert 3 == len(list(loaded.scan(row_filter="query_id == 'copy-of-77'").plan_files()))
    rerank(run.uri(), ["rank.k=1"])

    def published_again():
        with catalogs.opened(s3.iceberg_uri, s3.table_bucket, "") as catalog:
            return publish(open_run(run.uri()), catalog)

    at_once(published_again)
    _, topk = published_again()
    assert (4, 1, 0) == (topk.rows, topk.files, topk.added)
    with catalogs.opened(s3.iceberg_uri, s3.table_bucket, "") as catalog:
        assert 2 == len(catalog.load_table("why.topk").snapshots())
        places = [run.uri(), catalog.load_table("why.scores").location(), catalog.load_table("why.topk").location()]
    for place in places:
        found = [path for path in storage.objects(place) if not path.endswith("/")]
        assert found
        assert not [path for path in found if secret.encode() in storage.read_bytes(f"{place}/{path}")]
    monkeypatch.setenv("PYICEBERG_CATALOG__DEFAULT__CREDENTIAL", "nobody:nothing")
    with pytest.raises(StorageError, match="PYICEBERG_CATALOG__DEFAULT__"), catalogs.opened(s3.iceberg_uri, "ice", ""):
        pass


def test_a_run_on_s3_in_a_catalog_on_sqlite(finished_on_s3, sqlite):
    """The tables' metadata lies with the run, so whoever reads the one reads the other."""
    run = finished_on_s3
    assert 300 == published(sqlite, run)[0].rows
    assert table(sqlite, run, "scores").location().startswith(f"{run.uri()}/lake/")
    assert 300 == len(rows(table(sqlite, run, "scores")))


def read_s3(run):
    """All score rows of a run on S3, by query and id."""
    paths = [path for receipt in run.receipts() for path in receipt.files if path.startswith("scores/")]
    found = pa.concat_tables([run.read_table(path) for path in paths])
    found = found.set_column(2, "query_id", found["query_id"].cast(pa.string()))
    return found.sort_by(KEYS)
