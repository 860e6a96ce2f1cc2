"""jobs/sql.md is run here: every block of it, on a real run, over its files and over its Iceberg tables."""

import copy
import re
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import catalog as catalogs
from pipeline.publish import file_uri, publish
from pipeline.run import finish
from pipeline.specfile import parse_spec
from tests.conftest import read_scores, run_without_ray

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "jobs" / "sql.md").read_text()
VIEWS, *STATEMENTS = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
CATALOG, POLARS, PYICEBERG = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


class Lake:
    """Two runs of one corpus, published; and the page's words for where they are."""

    def __init__(self, world, folder):
        self.folder = folder
        self.corpus = folder / "data" / "train" / "corpus.parquet"
        self.corpus.parent.mkdir(parents=True)
        told = [f"a handwritten {label}" for label in world.labels]
        pq.write_table(world.table().append_column("text", pa.array(told)), self.corpus)
        self.runs = []
        for name, steps in (("digits", 3), ("digits-again", 2)):
            tree = copy.deepcopy(world.tree(folder / "runs" / name))
            tree["corpus"] |= {"uri": str(self.corpus), "payload": ["text", "label"]}
            run = run_without_ray(parse_spec(tree, [f"producer.steps={steps}"]))
            finish(run)
            self.runs.append(run)
            with catalogs.opened(f"sqlite:///{folder}/lake.db", None, file_uri(run.uri("lake"))) as catalog:
                publish(run, catalog)

    def here(self, code):
        """Code of the page with its paths in this folder."""
        return re.sub(r"(?<=['\"])(runs/|data/|filtered)|(?<=sqlite:///)", lambda m: f"{self.folder}/{m[0]}", code)


@pytest.fixture(scope="module")
def lake(world, tmp_path_factory):
    return Lake(world, tmp_path_factory.mktemp("sql"))


@pytest.fixture(scope="module")
def over_files(lake):
    with duckdb.connect() as connection:
        connection.execute(lake.here(VIEWS))
        yield connection


@pytest.fixture(scope="module")
def over_catalog(lake):
    names = {}
    exec(lake.here(CATALOG), names)
    with names["connection"] as connection:
        yield connection


def statement(heading, which=0):
    """A statement of the page by its heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```sql\n(.*?)```", section, re.DOTALL)[which]


def plain(rows):
    """Rows with what threads add up in any order rounded."""
    return [
        [pytest.approx(cell, rel=1e-6, abs=1e-9) if isinstance(cell, float | list) else cell for cell in row]
        for row in rows
    ]


@pytest.mark.parametrize("sql", STATEMENTS, ids=[sql.split("\n")[0][:30] for sql in STATEMENTS])
def test_every_statement_says_the_same_over_files_and_over_the_catalog(sql, lake, over_files, over_catalog):
    """Each statement of the page runs on both and gives rows: the same."""
    answers = [connection.execute(lake.here(sql)).fetchall() for connection in (over_files, over_catalog)]
    assert plain(answers[0]) == [list(row) for row in answers[1]]
    assert answers[0]


def test_the_strongest_proponents_come_with_their_text(lake, over_files):
    """Rank 1 to 3 of the ranking, with the payload of the corpus' row."""
    found = over_files.execute(statement("The strongest proponents of a query, with their text")).fetchall()
    ranked = lake.runs[0].read_ranked()[0].to_pylist()
    top = [row for row in ranked if row["query_id"] == "copy-of-3" and row["side"] == "proponent"][:3]
    assert [(row["rank"], row["example_id"], row["value"], row["score"], row["text"]) for row in top] == found
    texts = {row["id"]: row["text"] for row in pq.read_table(lake.corpus).to_pylist()}
    assert [texts[example_id] for _, example_id, _, _, _ in found] == [row[-1] for row in found]


def test_one_example_is_found_under_every_query(lake, over_files):
    """A row per query, the copy of the example first."""
    found = over_files.execute(statement("One example over all queries")).fetchall()
    expected = [row for row in read_scores(lake.runs[0]).to_pylist() if row["example_id"] == "digit-003"]
    assert sorted((row["query_id"], row["score"]) for row in expected) == sorted(row[:2] for row in found)


def test_the_hardest_examples_stand_beside_their_place_by_base_loss(lake, over_files):
    """The twenty highest counterpart losses, each with the place of its base loss among all examples of the query."""
    found = over_files.execute(statement("What the counterpart finds hardest")).fetchall()
    rows = [row for row in read_scores(lake.runs[0]).to_pylist() if row["query_id"] == "copy-of-3"]
    hardest = sorted(rows, key=lambda row: (-row["counterpart_loss"], row["example_id"]))[:20]
    assert [row["example_id"] for row in hardest] == [row[0] for row in found]
    places = [1 + sum(other["base_loss"] > row["base_loss"] for other in rows) for row in hardest]
    assert places == [row[-1] for row in found]


def test_the_filtered_training_set_lacks_what_is_above_the_threshold(lake, over_files):
    """The corpus less the listed ids, no more and no less; both not empty."""
    listed = {row[0] for row in over_files.execute(statement("Everything above a threshold")).fetchall()}
    over_files.execute(lake.here(statement("Everything above a threshold", 1)))
    kept = set(pq.read_table(lake.folder / "filtered.parquet")["id"].to_pylist())
    above = {row["example_id"] for row in read_scores(lake.runs[0]).to_pylist() if row["score"] > 0.01}
    assert above == listed
    assert set(pq.read_table(lake.corpus)["id"].to_pylist()) - above == kept
    assert above
    assert kept


def test_two_runs_are_compared_row_by_row(lake, over_files):
    """All examples of both, once; a run agrees with itself wholly and with the other not wholly."""
    compared = statement("Two runs compared")
    for _, examples, correlation, ranks, _, change in over_files.execute(compared).fetchall():
        assert 150 == examples
        assert 0 < correlation < 1
        assert -1 <= ranks <= 1
        assert change > 0
    itself = over_files.execute(compared.replace("other_scores", "scores")).fetchall()
    assert [(150, pytest.approx(1.0), pytest.approx(1.0), 100, 0.0)] * 2 == [row[1:] for row in itself]


def test_the_polars_and_pyiceberg_examples_agree_with_the_run(lake):
    """The strongest three of a query, and what is above a threshold."""
    of_query = [row for row in read_scores(lake.runs[0]).to_pylist() if row["query_id"] == "copy-of-3"]
    names = {}
    exec(lake.here(POLARS), names)
    exec(lake.here(PYICEBERG), names)
    strongest = sorted((row["score"] for row in of_query), reverse=True)[:3]
    assert strongest == names["strongest"].sort("score", descending=True)["score"].to_list()
    above = {(row["example_id"], row["score"]) for row in of_query if row["score"] > 0.01}
    assert above == {(row["example_id"], row["score"]) for row in names["found"].to_pylist()}
    assert above
