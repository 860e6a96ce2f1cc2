"""From 16 queries on a batch decides how scores are made: every command, over texts and images of many batches."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.artifacts import CALIBRATION
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from tests.conftest import exit_code, read_scores, run_without_ray, tuned
from tests.language import gpt, saved, sentences, spec_tree

QUERIES, LATER, ROWS = 20, 4, 30


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A language model, texts of many lengths, and more queries than are compared one by one."""
    made = tmp_path_factory.mktemp("many")
    saved(gpt(), made / "model")
    rows = sentences(ROWS)
    pq.write_table(pa.table({"id": [f"text-{i:02d}" for i in range(ROWS)], "text": rows}), made / "corpus.parquet")
    for name, some in (("queries", range(QUERIES)), ("later", range(QUERIES, QUERIES + LATER))):
        table = {"query_id": [f"q-{i:02d}" for i in some], "text": [rows[i] for i in some]}
        pq.write_table(pa.table(table), made / f"{name}.parquet")
    return made


def text_tree(texts, run_uri):
    tree = spec_tree(texts, run_uri) | {"producer": {"steps": 1}}
    return tree | {"resources": {"score": {"actors": 1}}}


def image_tree(world, folder, run_uri):
    """Digits, with their own rows as queries."""
    table = pq.read_table(world.corpus).rename_columns(["query_id", "pixels", "label", "author"])
    pq.write_table(table.slice(0, QUERIES), folder / "queries.parquet")
    pq.write_table(table.slice(QUERIES, LATER), folder / "later.parquet")
    tree = world.tree(run_uri) | {"queries": {"uri": str(folder / "queries.parquet")}}
    return tree | {"producer": {"name": "unlearn", "steps": 1}, "resources": {"score": {"actors": 1}}}


@pytest.mark.slow
def test_texts_of_many_batches_are_calibrated(texts, tmp_path):
    """On the first batch of a shard that has more; scores agree with those by the way that was chosen."""
    spec = parse_spec(text_tree(texts, tmp_path / "run"), ())
    run = freeze(tuned(spec))
    found = ShardScorer(run, "cpu").calibrate()
    assert QUERIES == found.queries
    run.commit_measured(CALIBRATION, found.to_json())
    given = parse_spec(text_tree(texts, tmp_path / "given"), (f"score.way={found.way}",))
    ours, theirs = read_scores_of(run_without_ray(spec)), read_scores_of(run_without_ray(given))
    assert QUERIES * ROWS == len(ours)
    assert ours.equals(theirs)


def read_scores_of(run):
    """Texts' scores: losses are per token there."""
    return pa.concat_tables(
        pq.read_table(run.uri("scores", f"query_id={query_id}"), columns=["example_id", "score"])
        for query_id in run.query_ids
    )


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_every_command_takes_many_queries(kind, ray_cluster, texts, world, tmp_path, monkeypatch, capsys):
    """plan --calibrate, run, extend and show --tokens, of images run and extend; the spec does not name a way of scoring."""
    uri, path = str(tmp_path / "run"), tmp_path / "spec.yaml"
    tree = text_tree(texts, uri) if kind == "texts" else image_tree(world, tmp_path, uri)
    path.write_text(yaml.safe_dump(tree))
    later = (texts if kind == "texts" else tmp_path) / "later.parquet"
    if kind == "texts":
        assert 0 == exit_code(monkeypatch, "plan", str(path), "--calibrate")
    assert 0 == exit_code(monkeypatch, "run", str(path))
    run = open_run(uri)
    assert QUERIES == run.measured(CALIBRATION)["queries"]
    rows = run.number_of_works and sum(receipt.rows for receipt in run.receipts())
    assert 0 == exit_code(monkeypatch, "extend", uri, "--queries", str(later))
    assert QUERIES + LATER == len(open_run(uri).query_ids)
    if kind == "texts":
        assert 0 == exit_code(monkeypatch, "show", uri, "--query", "q-03", "--tokens")
        assert (QUERIES + LATER) * ROWS == len(read_scores_of(open_run(uri)))
    else:
        assert (QUERIES + LATER) * rows == len(read_scores(open_run(uri)))
    assert "Traceback" not in capsys.readouterr().err
