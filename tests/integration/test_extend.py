"""A run that grows: by queries, by files, by both, again and after a crash; it equals a run made of everything at once."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.audit import audit
from pipeline.errors import ArtifactError, InputError
from pipeline.extend import extend
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.run import finish
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from pipeline.tuner import Tuner
from tests.conftest import exit_code, read_scores
from tests.small import LATER, Small, products, work_off

pytestmark = pytest.mark.slow

QUERIES, CORPUS = "queries", "corpus"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small world, with a finished run in `run`."""
    made = Small(tmp_path_factory.mktemp("small"))
    work_off(freeze(made.spec(made.folder / "run")))
    return made


@pytest.fixture
def run_uri(small, tmp_path):
    """A copy of the finished run, to be extended."""
    return str(shutil.copytree(small.folder / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def at_once(small):
    """`at_once(kinds)`: a run over the same world with these kinds of later things in it from the start."""
    made = {}
    everything = small.folder / "everything"
    shutil.copytree(small.folder / "corpus", everything)
    shutil.copytree(small.folder / "later", everything, dirs_exist_ok=True)
    queries = [pq.read_table(small.folder / f"{name}.parquet") for name in ("queries", "later-queries")]
    pq.write_table(pa.concat_tables(queries), small.folder / "all-queries.parquet")
    overrides = {
        QUERIES: f"queries.uri={small.folder / 'all-queries.parquet'}",
        CORPUS: f"corpus.uri={everything}",
    }

    def make(kinds):
        if kinds not in made:
            place = small.folder / "-".join(["at-once", *sorted(kinds)])
            made[kinds] = work_off(freeze(small.spec(place, *(overrides[kind] for kind in kinds))))
        return made[kinds]

    return make


def later(small, kind):
    """Arguments of `extend` for one kind of later things."""
    queries, corpus = small.later
    return (queries if kind in (QUERIES, "both") else None, corpus if kind in (CORPUS, "both") else None)


def ranked(run):
    """The ranked table without the number of the shard, which depends on when its file came."""
    table = run.read_ranked()[0].drop_columns(["shard_id"])
    return table.sort_by([(name, "ascending") for name in ("query_id", "side", "rank")])


def sources(run):
    table = run.read_table("topk", "sources.parquet")
    return table.sort_by([("query_id", "ascending"), ("source", "ascending")])


def require_equal(run, other):
    """The same scores to the bit, the same ranks, the same sums per source."""
    assert read_scores(run).equals(read_scores(other))
    assert ranked(run).equals(ranked(other))
    ours, theirs = sources(run), sources(other)
    exact = ["query_id", "source", "count", "top_example_id", "top_value"]
    assert ours.select(exact).equals(theirs.select(exact))
    for name in ("sum", "mean"):
        assert ours[name].to_pylist() == pytest.approx(theirs[name].to_pylist(), rel=1e-9)


def objects(run_uri):
    return {path: storage.read_bytes(f"{run_uri}/{path}") for path in storage.objects(run_uri)}


@pytest.mark.parametrize(
    "way",
    [
        ["both"],
        ["queries", "corpus"],
        pytest.param(["queries"], marks=pytest.mark.slow),
        pytest.param(["corpus"], marks=pytest.mark.slow),
        pytest.param(["corpus", "queries"], marks=pytest.mark.slow),
    ],
    ids=" then ".join,
)
def test_a_grown_run_equals_one_made_of_everything(small, run_uri, at_once, way):
    """Scores, ranks and source sums; whole to verify; what stood before is not touched; the run's own command adds nothing."""
    before = objects(run_uri)
    for kind in way:
        run = work_off(extend(run_uri, *later(small, kind)))
    kinds = {QUERIES, CORPUS} if len(way) == 2 or way == ["both"] else set(way)
    require_equal(run, at_once(frozenset(kinds)))
    grown = objects(run_uri)
    kept = [
        path for path in before if path.startswith(("scores/", "counterparts/", "commits/", "partials/", "rejects/"))
    ]
    assert [] == [path for path in kept if grown[path] != before[path]]
    found = audit(run, shown=False)
    assert ([], {}, True) == (found.damage, found.orphans, found.sealed)
    again = work_off(freeze(small.spec(run_uri)))
    assert len(way) + 1 == len(again.additions)
    assert products(grown) == products(objects(run_uri))


def test_only_what_is_new_is_scored(small, run_uri):
    """By queries: old shards under the new queries; by files: new shards under all queries; nothing else is written."""
    work_off(extend(run_uri, *later(small, "both")))
    run = open_run(run_uri)
    works = {work.name: work.query_ids for work in run.works() if work.addition == 1}
    assert {f"shard-{i:06d}-addition-1": ("blue",) for i in range(4)} | {
        f"shard-{i:06d}-addition-1": ("red", "green", "blue") for i in (4, 5)
    } == works
    seal = run.read_json("_SUCCESS")
    assert {"shards": 6, "rows": 17, "rejects": 2, "commits": 10} == {k: seal[k] for k in seal if k != "fingerprint"}


@pytest.mark.parametrize("kind", ["queries", "corpus"])
def test_the_same_extension_twice_adds_nothing(small, run_uri, kind):
    """Known files are passed over, and queries that were added before with the same contents."""
    work_off(extend(run_uri, *later(small, kind)))
    before = objects(run_uri)
    assert 2 == len(extend(run_uri, *later(small, kind)).additions)
    assert before == objects(run_uri)


def test_an_extension_that_was_killed_goes_on_by_the_same_command(small, run_uri, at_once):
    """Killed before the addition came, the seal is gone and all else whole; killed after it, the work is to do."""
    storage.remove(f"{run_uri}/_SUCCESS")
    extend(run_uri, *later(small, "both"))
    assert "_SUCCESS" not in objects(run_uri)
    run = extend(run_uri, *later(small, "both"))
    assert 2 == len(run.additions)
    require_equal(work_off(run), at_once(frozenset({QUERIES, CORPUS})))


def test_an_extension_that_was_killed_goes_on_by_the_runs_command(small, run_uri, at_once):
    """`run SPEC` does what an addition left to do."""
    extend(run_uri, *later(small, "both"))
    require_equal(work_off(freeze(small.spec(run_uri))), at_once(frozenset({QUERIES, CORPUS})))


def test_an_unfinished_run_does_not_grow(small, run_uri):
    """A shard without a commit: refused, and nothing is written."""
    storage.remove(f"{run_uri}/_SUCCESS")
    storage.remove(f"{run_uri}/commits/shard-000001.json")
    before = objects(run_uri)
    with pytest.raises(ArtifactError, match="3 of 4 shards are committed"):
        extend(run_uri, *later(small, "queries"))
    assert before == objects(run_uri)


def test_ids_that_the_run_has_are_refused(small, run_uri, tmp_path):
    """A query id, and an example id, stand for one thing for ever; the run is left as it was, seal and all."""
    before = objects(run_uri)
    table = pq.read_table(small.later[0])
    names = pa.array(["red"] + ["blue"] * (len(table) - 1))
    pq.write_table(table.set_column(0, "query_id", names), tmp_path / "queries.parquet")
    with pytest.raises(InputError, match="1 query ids are in the run already, first 'red'"):
        extend(run_uri, str(tmp_path / "queries.parquet"), None)
    (tmp_path / "more").mkdir()
    shutil.copy(small.folder / "corpus" / "part-1.parquet", tmp_path / "more" / "copy.parquet")
    with pytest.raises(InputError, match=r"must be unique(.|\n)*'row-08'"):
        extend(run_uri, None, str(tmp_path / "more"))
    assert before == objects(run_uri)


def test_a_changed_file_of_the_run_is_refused(small, run_uri, tmp_path):
    """What was scored must still be what lies there."""
    corpus = tmp_path / "corpus"
    shutil.copytree(small.folder / "corpus", corpus)
    uri = str(tmp_path / "other")
    work_off(freeze(small.spec(uri, f"corpus.uri={corpus}")))
    pq.write_table(pq.read_table(corpus / "part-1.parquet").slice(1), corpus / "part-1.parquet")
    with pytest.raises(ArtifactError, match=r"part-1\.parquet: [\d,]+ bytes"):
        extend(uri, None, small.later[1])


def test_files_that_arrive_in_the_corpus_folder(small, tmp_path, at_once, capsys):
    """`run` goes on without a new file and names extend; extended by the same folder, it goes on with it."""
    corpus, uri = tmp_path / "corpus", str(tmp_path / "run")
    shutil.copytree(small.folder / "corpus", corpus)
    spec = small.spec(uri, f"corpus.uri={corpus}")
    work_off(freeze(spec))
    for name in LATER:
        shutil.copy(small.folder / "later" / f"{name}.parquet", corpus)
    capsys.readouterr()
    assert 4 == freeze(spec).number_of_works
    assert re.search(
        r"part-2\.parquet is new in the corpus and no part of .*`mirrorscope extend`", capsys.readouterr().err
    )
    run = work_off(extend(uri, None, str(corpus)))
    require_equal(run, at_once(frozenset({CORPUS})))
    assert products(objects(uri)) == products(objects(work_off(freeze(spec)).uri()))


def test_every_score_row_is_traced_to_file_and_row(small, run_uri):
    """DuckDB joins scores, manifests of all additions and the corpus files by shard, file and row: the ids agree."""
    run = work_off(extend(run_uri, *later(small, "both")))
    files = [str(path) for folder in ("corpus", "later") for path in sorted((small.folder / folder).glob("*.parquet"))]
    rows = duckdb.sql(
        f"""
        WITH manifest AS (
            SELECT shard_id, path, row_start, rows
            FROM read_parquet(['{run.uri("manifest.parquet")}', '{run.uri("additions")}/*/manifest-*.parquet'])
        ), corpus AS (
            SELECT id, filename, file_row_number FROM read_parquet({files}, filename = true, file_row_number = true)
        )
        SELECT count(*), count(*) FILTER (id = example_id), count(DISTINCT (query_id, example_id))
        FROM '{run.uri("scores")}/*/*.parquet' JOIN manifest USING (shard_id)
        JOIN corpus ON corpus.filename = path AND corpus.file_row_number = row
        WHERE row >= row_start AND row < row_start + rows
        """
    ).fetchall()
    assert [(51, 51, 51)] == rows
    shards = {shard.shard_id: shard for shard in run.shards}
    assert all(
        shards[row["shard_id"]].row_start
        <= row["row"]
        < shards[row["shard_id"]].row_start + shards[row["shard_id"]].rows
        for row in run.read_ranked()[0].to_pylist()
    )


def test_made_ids_stay_apart(small, tmp_path):
    """Without an id column: ids of files beside the corpus folder, even of a name that begins like its, are their own."""
    corpus, uri = tmp_path / "corpus", str(tmp_path / "run")
    (corpus / "2").mkdir(parents=True)
    shutil.copy(small.folder / "corpus" / "part-0.parquet", corpus / "2" / "part.parquet")
    (tmp_path / "corpus2").mkdir()
    shutil.copy(small.folder / "later" / "part-2.parquet", tmp_path / "corpus2" / "part.parquet")
    spec = small.spec(uri, f"corpus.uri={corpus}", "corpus.example_id=null", "score.max_reject_fraction=0.5")
    work_off(freeze(spec))
    run = work_off(extend(uri, None, str(tmp_path / "corpus2")))
    ids = read_scores(run)["example_id"].to_pylist()
    assert 2 * 12 == len(ids)
    assert 12 == len(set(ids))


def test_image_folders_grow(small, tmp_path, rng):
    """New folders of the same classes: labels by the first corpus's classes, ids of their own, every image scored once."""
    for root, classes in (("images", ("cat", "dog", "eel")), ("new", ("cat", "eel"))):
        for name in classes:
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(2):
                picture = rng.integers(0, 255, (4, 4), np.uint8)
                Image.fromarray(picture).save(tmp_path / root / name / f"{i}.png")
    (tmp_path / "asked" / "eel").mkdir(parents=True)
    shutil.copy(tmp_path / "images" / "eel" / "0.png", tmp_path / "asked" / "eel")
    uri = str(tmp_path / "run")
    tree = small.tree(uri)
    tree["task"] = {"features": "image", "label": "label", "shape": [1, 4, 4]}
    tree["model"] = {"factory": "tests.small:linear_on_pictures"}
    tree["corpus"] = {"uri": str(tmp_path / "images"), "source": "class"}
    tree["queries"] = {"uri": str(tmp_path / "asked")}
    spec = parse_spec(tree)
    work_off(freeze(spec))
    run = work_off(extend(uri, None, str(tmp_path / "new")))
    scores = read_scores(run)
    assert 10 == len(set(scores["example_id"].to_pylist())) == len(scores)
    assert {"cat": 4, "dog": 2, "eel": 4} == {
        row["source"]: row["count"] for row in sources(run).select(["source", "count"]).to_pylist()
    }
    work_off(freeze(spec))
    assert ([], {}) == ((found := audit(run, shown=False)).damage, found.orphans)


def test_workers_and_order_leave_no_trace(small, tmp_path, at_once):
    """Three workers at once, shards from last to first: the objects of one worker that goes through them in order."""
    run = freeze(small.spec(tmp_path / "run"))
    for query_id in run.query_ids[::-1]:
        Tuner(run, "cpu").tune(query_id)
    workers = [ShardScorer(run, "cpu") for _ in range(3)]
    works = list(run.works())[::-1]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: workers[i % 3].score(works[i]), range(len(works))))
    finish(run)
    assert products(objects(at_once(frozenset()).uri())) == products(objects(run.uri()))


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_cannot_add(small, run_uri, tmp_path, monkeypatch, capsys):
    """Nothing to add exits 2, ids of the run and files that are not there 3, a run that is not finished 6."""
    assert 2 == exit_code(monkeypatch, "extend", run_uri)
    assert "give --queries URI, --corpus URI or both" in capsys.readouterr().err
    assert 3 == exit_code(monkeypatch, "extend", run_uri, "--queries", str(tmp_path / "nothing.parquet"))
    assert "nothing.parquet" in capsys.readouterr().err
    storage.remove(f"{run_uri}/_SUCCESS")
    storage.remove(f"{run_uri}/commits/shard-000001.json")
    assert 6 == exit_code(monkeypatch, "extend", run_uri, "--queries", small.later[0])
    assert "3 of 4 shards are committed" in capsys.readouterr().err


def test_the_command_given_again_needs_no_cluster(small, run_uri, monkeypatch, capsys):
    """A run that has all of it already is shown; nothing is tuned or scored."""
    work_off(extend(run_uri, *small.later))
    queries, corpus = small.later
    assert 0 == exit_code(monkeypatch, "extend", run_uri, "--queries", queries, "--corpus", corpus)
    printed = capsys.readouterr()
    assert "has all of that already" in printed.err
    assert "blue" in printed.out
    assert 0 == exit_code(monkeypatch, "verify", run_uri)


@pytest.mark.ray
def test_the_command_extends_a_run_on_ray(small, run_uri, at_once, ray_cluster, monkeypatch, capsys):
    """Workers tune and score what is new: the same scores and ranks as everything at once."""
    queries, corpus = small.later
    assert 0 == exit_code(monkeypatch, "extend", run_uri, "--queries", queries, "--corpus", corpus), (
        capsys.readouterr().err
    )
    assert "added 1 queries and 6 training examples in 2 shards" in capsys.readouterr().err
    require_equal(open_run(run_uri), at_once(frozenset({QUERIES, CORPUS})))
