"""`rank.transform: counterpart_loss` wherever a transform matters: rankings, sums, growth, ensembles, pages, the judge."""

import shutil

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from jobs.cli import app
from pipeline import catalog as catalogs
from pipeline.errors import SpecError
from pipeline.extend import extend
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.judge import Judge
from pipeline.publish import file_uri, publish
from pipeline.run import rerank
from pipeline.specfile import parse_tree
from pipeline.topk import transform_name
from pipeline.verdict import judged
from tests.small import Small, work_off

TRANSFORM = "rank.transform=counterpart_loss"
FINETUNE = "producer={name: finetune, steps: 3}"
RANKED = ("query_id", "side", "rank", "example_id", "value", "score", "counterpart_loss")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small world, with a finished run ranked by the counterpart's loss in `run`."""
    made = Small(tmp_path_factory.mktemp("small"))
    work_off(freeze(made.spec(made.folder / "run", FINETUNE, TRANSFORM, "rank.fraction=0.5")))
    return made


@pytest.fixture
def run(small, tmp_path):
    """A copy of it."""
    return open_run(str(shutil.copytree(small.folder / "run", tmp_path / "run")))


def ranking(run):
    return run.read_ranked()[0].select(RANKED).to_pylist()


def by_query(rows):
    """Rows of queries and sides in an order of their own: a run lists queries as they came."""
    return sorted(rows, key=lambda row: (row["query_id"], row["side"], row["rank"]))


def sorted_by_loss(run):
    """What SQL over the score files lists: proponents by falling minus loss, opponents by rising."""
    sql = """SELECT query_id, '{side}' AS side, example_id, value, score, counterpart_loss,
                    row_number() OVER (PARTITION BY query_id ORDER BY value {order}, example_id) AS rank
             FROM (SELECT *, -counterpart_loss AS value FROM '{scores}/*/*.parquet') QUALIFY rank <= {k}"""
    found = []
    for side, order in (("proponent", "DESC"), ("opponent", "ASC")):
        statement = sql.format(side=side, order=order, scores=run.uri("scores"), k=run.spec.rank.k)
        found += duckdb.sql(statement).arrow().read_all().select(RANKED).to_pylist()
    return by_query(found)


def test_examples_of_least_counterpart_loss_are_proponents(run):
    """The ranking is a sort of all score rows by minus their counterpart's loss."""
    assert sorted_by_loss(run) == by_query(ranking(run))
    assert "counterpart_loss" == run.read_ranked()[1]["transform"]


def test_sums_and_selections_are_of_that_value(run):
    """Per source: sums, the strongest example, and the selected half."""
    scores = f"(SELECT *, -counterpart_loss AS value FROM '{run.uri('scores')}/*/*.parquet')"
    sums = duckdb.sql(f"SELECT query_id, source, sum(value::DOUBLE) FROM {scores} GROUP BY ALL ORDER BY ALL").fetchall()
    table = pq.read_table(run.uri("topk", "sources.parquet"))
    got = list(zip(*(table[name].to_pylist() for name in ("query_id", "source", "sum")), strict=True))
    assert [row[:2] for row in sums] == [row[:2] for row in got]
    assert [row[2] for row in sums] == pytest.approx([row[2] for row in got])
    best = f"""SELECT query_id, example_id FROM {scores} QUALIFY row_number() OVER (PARTITION BY query_id, source
               ORDER BY value DESC, example_id) <= ceil(0.5 * count(*) OVER (PARTITION BY query_id, source)) ORDER BY ALL"""
    selected = f"SELECT query_id, example_id FROM '{run.uri('topk', 'selected')}/*/*.parquet' ORDER BY ALL"
    assert duckdb.sql(best).fetchall() == duckdb.sql(selected).fetchall()


@pytest.mark.parametrize("k", [2, 7])
def test_ranking_again_equals_having_ranked_so(small, run, tmp_path, k):
    """From this transform to another and back, and from partials of less or more depth: as if it had been asked for at once."""
    signed = rerank(run.uri(), ["rank.transform=signed"])
    again = rerank(signed.uri(), [TRANSFORM, f"rank.k={k}"])
    direct = work_off(freeze(small.spec(tmp_path / "direct", FINETUNE, TRANSFORM, f"rank.k={k}")))
    assert ranking(direct) == ranking(again)
    assert pq.read_table(direct.uri("topk", "sources.parquet")).equals(
        pq.read_table(again.uri("topk", "sources.parquet"))
    )


def test_commits_name_it_in_their_partials(run):
    """What a partial top-k holds is in its name, so that none of another transform is merged."""
    receipts = [receipt for receipt in run.receipts() if receipt.rows]
    assert {"counterpart_loss"} == {receipt.transform for receipt in receipts}
    assert all(f"-3-{transform_name('counterpart_loss', 1e-3)}.parquet" in receipt.partial for receipt in receipts)


def test_a_grown_run_ranks_all_of_it(small, run):
    """New queries and new files come in by the same value."""
    extend(run.uri(), *small.later)
    grown = work_off(open_run(run.uri()))
    assert {"red", "green", "blue"} == {row["query_id"] for row in ranking(grown)}
    assert sorted_by_loss(grown) == by_query(ranking(grown))


def test_an_ensemble_ranks_by_the_mean_of_the_counterparts_losses(small, tmp_path):
    """By weight; what is ranked is minus that mean."""
    run = work_off(freeze(small.spec(tmp_path / "run", FINETUNE, TRANSFORM, small.ensemble(2, 0.5))))
    assert sorted_by_loss(run) == by_query(ranking(run))
    losses = []
    for member in run.members:
        table = pq.read_table(member.uri("scores"), filters=[("query_id", "=", "red")], partitioning=None)
        losses.append(dict(zip(table["example_id"].to_pylist(), table["counterpart_loss"].to_pylist(), strict=True)))
    for row in ranking(run):
        if row["query_id"] == "red":
            mean = np.average([loss[row["example_id"]] for loss in losses], weights=[1, 2, 0.5])
            assert -mean == pytest.approx(row["value"], rel=1e-5)


def test_tables_and_pages_show_it(run, tmp_path):
    """Published rows are those ranked; the page and `show` name the transform, and print both losses beside the value."""
    with catalogs.opened(f"sqlite:///{tmp_path}/lake.db", None, file_uri(run.uri("lake"))) as catalog:
        publish(open_run(run.uri()), catalog, "")
        table = catalog.load_table(("run", "topk")).scan().to_arrow()
    assert sorted(row["value"] for row in ranking(run)) == sorted(table["value"].to_pylist())
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "ranked by minus the counterpart&#x27;s loss, 3 per side" in page
    shown = CliRunner().invoke(app, ["show", run.uri()]).output
    for word in ("12 examples, minus the counterpart's loss", "value", "base_loss", "counterpart_loss"):
        assert word in shown


def test_the_command_ranks_by_it(small, tmp_path):
    """`mirrorscope rank --transform counterpart_loss`, of a run that was ranked by score."""
    run = work_off(freeze(small.spec(tmp_path / "run", FINETUNE)))
    done = CliRunner().invoke(app, ["rank", run.uri(), "--transform", "counterpart_loss"])
    assert 0 == done.exit_code, done.output
    assert sorted_by_loss(run) == by_query(ranking(open_run(run.uri())))


@pytest.mark.parametrize("producer", ["producer={name: unlearn, steps: 2}", "producer={name: natural}"])
def test_a_counterpart_that_forgets_the_query_is_refused(small, tmp_path, producer):
    """Its loss says nothing of what helps: when a run is frozen, and of a finished run, which stays as it is."""
    with pytest.raises(
        SpecError, match=r"(?s)counterpart_loss wants a producer of direction -1.*use producer finetune"
    ):
        freeze(small.spec(tmp_path / "new", producer, TRANSFORM))
    assert not (tmp_path / "new").exists()
    if "natural" in producer:
        return
    run = work_off(freeze(small.spec(tmp_path / "run", producer)))
    before = ranking(run)
    with pytest.raises(SpecError, match="got one of direction 1"):
        rerank(run.uri(), [TRANSFORM])
    assert ("signed", before) == (open_run(run.uri()).spec.rank.transform, ranking(open_run(run.uri())))


@pytest.mark.parametrize("models", [1, 3])
def test_the_judge_takes_high_losses_for_wrong_labels(small, tmp_path, models):
    """AUC is that of the counterpart's loss, the mean over queries, of one model and of several; base losses beside it."""
    several = [small.ensemble()] if models > 1 else []
    run = work_off(freeze(small.spec(tmp_path / "run", FINETUNE, TRANSFORM, *several)))
    wrong = ["row-01", "row-05", "row-10"]
    pq.write_table(duckdb.sql(f"SELECT unnest({wrong}) AS example_id").arrow().read_all(), tmp_path / "wrong.parquet")
    tree = {
        "judge": {"uri": str(tmp_path / "judged")},
        "runs": {"ours": run.uri()},
        "mislabelled": {"uri": str(tmp_path / "wrong.parquet")},
    }
    (found,) = judged(parse_tree(Judge, tree))
    sql = (
        f"SELECT example_id, avg(counterpart_loss), avg(base_loss) FROM '{run.uri('scores')}/*/*.parquet' GROUP BY ALL"
    )
    ids, counterpart_N, base_N = zip(*duckdb.sql(sql).fetchall(), strict=True)
    auc = {row["method"]: row["auc"] for row in found.rows}
    for method, loss_N in (("ours (counterpart_loss)", counterpart_N), ("base loss", base_N)):
        assert roc_auc_score(np.isin(ids, wrong), loss_N) == pytest.approx(auc[method])
