"""The judge, from finished runs to tables and figures: what is trained anew, what is kept, what is said of bad input."""

from __future__ import annotations

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import ArtifactError, InputError, NumericsError, SpecError
from pipeline.frozen import open_run
from pipeline.judge import Judge
from pipeline.matrices import of_file, of_run
from pipeline.retrain import Retrainings, retrain
from pipeline.retraining import Retrainer
from pipeline.run import freeze
from pipeline.specfile import load_judge, parse_tree
from pipeline.verdict import judged
from tests.small import Small, one_thread, work_off

SUBSETS, AGAIN = 4, 2


@pytest.fixture
def small(tmp_path):
    (tmp_path / "world").mkdir()
    return Small(tmp_path / "world")


@pytest.fixture
def run(small, tmp_path):
    """A finished run."""
    with one_thread():
        return work_off(freeze(small.spec(tmp_path / "run")))


@pytest.fixture
def judge(run, tmp_path):
    """Makes a judgement of it, with sections changed."""

    def make(**sections) -> Judge:
        tree = {
            "judge": {"uri": str(tmp_path / "judged")},
            "runs": {"ours": run.uri()},
            "training": {"epochs": 3, "batch_rows": 4},
            "lds": {"subsets": SUBSETS, "retrainings": AGAIN},
        }
        return parse_tree(Judge, {**tree, **sections})

    return make


def train_here(judge: Judge) -> Retrainings:
    """Do what workers would do, in this process."""
    retrainings = Retrainings(judge, open_run(next(iter(judge.runs.values()))), judge.lds)
    with one_thread():
        retrainer = Retrainer(retrainings.run, judge.training, "cpu")
        for key in retrainings.missing():
            retrainings.do(retrainer, key)
    return retrainings


def truth_file(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "truth.parquet")
    return {"uri": str(tmp_path / "truth.parquet")}


def test_a_judgement_leaves_a_table_and_a_figure_with_the_judge_and_the_run(judge, run, tmp_path):
    """LDS, retrieval and wrong labels, each as CSV with one row per method, and as a picture."""
    pairs = truth_file(tmp_path, query_id=["red", "green"], example_id=["row-01", "row-02"])
    spec = judge(truth={**pairs, "k": 3}, mislabelled=pairs)
    train_here(spec)
    found = {judgement.name: judgement for judgement in judged(spec)}
    assert ["lds", "truth", "mislabelled"] == list(found)
    for folder in (tmp_path / "judged", tmp_path / "run"):
        for name, judgement in found.items():
            rows = list(csv.DictReader(io.StringIO((folder / "report" / f"{name}.csv").read_text())))
            assert ["ours"] == [row["method"] for row in rows]
            assert list(judgement.rows[0]) == list(rows[0])
            assert Image.open(folder / "report" / f"{name}.png").width > 400


def test_scores_of_another_tool_are_judged_like_a_runs(judge, run, tmp_path):
    """The run's own scores, handed in as a file in another order, get its figures."""
    id_N = np.array([f"row-{i:02d}" for i in range(13) if i != 6])
    ours = of_run("ours", run, run.query_ids, id_N)
    rows = [
        {"query_id": query_id, "example_id": example_id, "score": float(ours.score_QN[q, n])}
        for q, query_id in enumerate(run.query_ids)
        for n, example_id in enumerate(id_N)
    ]
    uri = str(tmp_path / "theirs.parquet")
    pq.write_table(pa.Table.from_pylist(rows[::-1]), uri)
    assert np.array_equal(ours.score_QN, of_file("theirs", uri, run.query_ids, id_N).score_QN)
    spec = judge(scores={"theirs": uri})
    train_here(spec)
    (lds,) = judged(spec)
    by_name = {row["method"]: row["lds"] for row in lds.rows}
    assert by_name["ours"] == by_name["theirs"]


def test_only_what_is_missing_is_trained_anew(judge):
    """A retraining that is there stays; one that is lost comes back with the same losses."""
    retrainings = train_here(judge())
    before, name = retrainings.losses_SRQ(), retrainings.name((2, 1))
    (path := _local(retrainings, name)).unlink()
    assert [(2, 1)] == retrainings.missing()
    train_here(judge())
    assert path.exists()
    assert np.array_equal(before, retrainings.losses_SRQ())


def test_more_retrainings_keep_those_that_are_there(judge):
    """Numbers of subsets and retrainings are no part of what a retraining is."""
    train_here(judge())
    more = Retrainings(
        judge(lds={"subsets": SUBSETS + 1, "retrainings": AGAIN + 1}), open_run(judge().runs["ours"]), judge().lds
    )
    assert train_here(judge()).fingerprint == more.fingerprint


@pytest.mark.parametrize("change", [{"training": {"epochs": 4}}, {"seed": 1}, {"lds": {"share": 0.4}}])
def test_another_training_is_another_fingerprint(judge, change):
    """What decides the losses decides where they lie."""
    run = open_run(judge().runs["ours"])
    one, other = (Retrainings(spec, run, spec.lds) for spec in (judge(), judge(**change)))
    assert one.fingerprint != other.fingerprint


def test_another_method_shares_the_retrainings(judge, small, tmp_path):
    """Another producer and another temperature are judged by the models that were trained for the first."""
    train_here(judge())
    with one_thread():
        other = work_off(freeze(small.spec(tmp_path / "other", "producer.name=finetune", "task.temperature=3")))
    assert [] == Retrainings(judge(runs={"other": other.uri()}), other, judge().lds).missing()


def test_subsets_hold_their_share_and_differ(judge):
    """Half of the examples each, drawn anew."""
    retrainings = Retrainings(judge(), open_run(judge().runs["ours"]), judge().lds)
    inside_SN = np.stack([retrainings.inside_N(part, 100) for part in range(20)])
    assert {50} == set(inside_SN.sum(axis=1))
    assert 20 == len({row.tobytes() for row in inside_SN})
    assert 0.3 < inside_SN.mean(axis=0).min() * 2


def test_training_anew_uses_only_the_examples_inside(judge):
    """Without any row of a class the model cannot say it: its loss on that query is far higher."""
    spec = judge(training={"epochs": 60, "batch_rows": 4})
    retrainer = Retrainer(open_run(spec.runs["ours"]), spec.training, "cpu")
    with one_thread():
        everything = retrainer.query_losses(np.ones(len(retrainer.id_N), bool), seed=0)
        again = retrainer.query_losses(np.ones(len(retrainer.id_N), bool), seed=0)
        nothing_much = retrainer.query_losses(np.arange(len(retrainer.id_N)) < 1, seed=0)
    assert np.array_equal(everything, again)
    assert nothing_much.max() > everything.max() + 1


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_a_judgement_of_nothing_is_refused(judge):
    """Something must be asked."""
    with pytest.raises(SpecError, match="nothing is asked: give lds, truth or mislabelled"):
        judge(lds=None)


def test_an_unknown_word_is_answered_with_the_nearest(judge):
    """As in the spec of a run."""
    with pytest.raises(SpecError, match=r"training\.epoch: 'epoch' is not known; did you mean 'epochs'"):
        judge(training={"epoch": 3})


def test_a_run_that_is_not_finished_is_refused(judge, small, tmp_path):
    """Its scores are not all there."""
    begun = freeze(small.spec(tmp_path / "begun"))
    with pytest.raises(ArtifactError, match=r"runs\.begun: .* is not finished"):
        judged(judge(runs={"begun": begun.uri()}))


def test_runs_of_different_queries_are_not_compared(judge, small, run, tmp_path):
    """Side by side means the same questions."""
    pq.write_table(pq.read_table(small.folder / "queries.parquet").slice(0, 1), small.folder / "one.parquet")
    with one_thread():
        other = work_off(freeze(small.spec(tmp_path / "other", f"queries.uri={small.folder / 'one.parquet'}")))
    with pytest.raises(InputError, match=r"runs\.other: .* has another corpus or other queries than ours"):
        judged(judge(runs={"ours": run.uri(), "other": other.uri()}))


def test_scores_that_leave_pairs_out_are_refused(judge, tmp_path):
    """All pairs, or the comparison is none."""
    pq.write_table(pa.table({"query_id": ["red"], "example_id": ["row-01"], "score": [1.0]}), tmp_path / "few.parquet")
    spec = judge(scores={"few": str(tmp_path / "few.parquet")})
    with pytest.raises(
        InputError, match=r"23 of 24 pairs have no finite score, first query 'red' and example 'row-00'"
    ):
        judged(spec)


def test_scores_without_the_columns_are_refused(judge, tmp_path):
    """What is there and what is missing."""
    pq.write_table(pa.table({"query": ["red"], "score": [1.0]}), tmp_path / "odd.parquet")
    with pytest.raises(InputError, match="got columns query, score, expected also query_id, example_id"):
        judged(judge(scores={"odd": str(tmp_path / "odd.parquet")}))


def test_a_truth_that_leaves_a_query_out_is_refused(judge, tmp_path):
    """A query without anything true has no rank."""
    truth = truth_file(tmp_path, query_id=["red"], example_id=["row-01"])
    with pytest.raises(InputError, match="names no example of the corpus for query 'green'"):
        judged(judge(lds=None, truth=truth))


def test_wrong_labels_that_the_corpus_does_not_have_are_refused(judge, tmp_path):
    """Ids of another corpus."""
    with pytest.raises(InputError, match="names no example of the corpus"):
        judged(judge(lds=None, mislabelled=truth_file(tmp_path, example_id=["doc-1"])))


def test_training_that_diverges_is_a_numerics_error(judge):
    """With what to do about it."""
    spec = judge(training={"lr": 1e20, "weight_decay": 1e20})
    retrainer = Retrainer(open_run(spec.runs["ours"]), spec.training, "cpu")
    with one_thread(), pytest.raises(NumericsError, match=r"(?s)not finite.*lower training\.lr"):
        retrainer.query_losses(np.ones(len(retrainer.id_N), bool), seed=0)


def test_the_spec_that_is_shipped_loads():
    """jobs/specs/judge.yaml."""
    assert ["natural", "paper"] == list(load_judge("jobs/specs/judge.yaml").runs)


# --- on Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_workers_train_what_one_process_trains(judge, ray_cluster, tmp_path):
    """The same losses, whoever trained; a second start trains nothing."""
    here = train_here(judge())
    there = judge(judge={"uri": str(tmp_path / "cluster")}, resources={"score": {"cpus": 1, "actors": 2}})
    retrainings = Retrainings(there, here.run, there.lds)
    retrain(retrainings)
    assert [] == retrainings.missing()
    assert np.array_equal(here.losses_SRQ(), retrainings.losses_SRQ())
    retrain(retrainings)


@pytest.mark.ray
def test_errors_of_workers_come_home(judge, ray_cluster):
    """As they were, with what is done kept."""
    spec = judge(training={"lr": 1e20, "weight_decay": 1e20})
    with pytest.raises(NumericsError, match=r"lower training\.lr"):
        retrain(Retrainings(spec, open_run(spec.runs["ours"]), spec.lds))


def _local(retrainings: Retrainings, name: str):
    from pathlib import Path

    return Path(retrainings.uri(name))
