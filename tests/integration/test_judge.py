"""The judge, from finished runs to tables and figures: what is trained anew, what is kept, what is said of bad input."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipeline.errors import ArtifactError, InputError, NumericsError, SpecError
from pipeline.extend import extend
from pipeline.extensions import load_task
from pipeline.frozen import open_run
from pipeline.judge import Judge
from pipeline.lessons import Step, Subset, Whole, Without, without
from pipeline.matrices import of_file, of_run
from pipeline.retrain import Retrainings, fingerprint, model_mark
from pipeline.retraining import Examples, Retrainer
from pipeline.run import freeze
from pipeline.specfile import load_judge, parse_spec, parse_tree
from pipeline.verdict import judged
from tests.small import Small, learn_here, work_off

pytestmark = pytest.mark.slow

SUBSETS, AGAIN = 4, 2
EVERYTHING = {
    "mirror": {"groups": 4, "rows": 3},
    "leave_out": {"k": 2, "draws": 2, "retrainings": 1},
    "tail_patch": {"k": 2, "draws": 3},
}


@pytest.fixture
def small(tmp_path):
    (tmp_path / "world").mkdir()
    return Small(tmp_path / "world")


@pytest.fixture
def run(small, tmp_path):
    """A finished run."""
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


@pytest.fixture
def here(monkeypatch):
    """Lessons are learned in this process instead of on Ray's workers; which ones."""
    learned = []

    monkeypatch.setattr("pipeline.verdict.retrain", lambda *asked: learned.extend(learn_here(*asked)))
    return learned


def retrainings_of(judge: Judge) -> Retrainings:
    run = open_run(next(iter(judge.runs.values())))
    return Retrainings(judge, run, fingerprint(judge, run, Examples.read(run, load_task(run.spec.task))))


def subsets(judge: Judge) -> list[Subset]:
    return [Subset(0.5, part, again) for part in range(judge.lds.subsets) for again in range(judge.lds.retrainings)]


def truth_file(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "truth.parquet")
    return {"uri": str(tmp_path / "truth.parquet")}


def test_a_judgement_leaves_a_table_and_a_figure_with_the_judge_and_the_run(judge, run, here, tmp_path):
    """All six, each as CSV with one row per method, and as a picture; wrong labels with a row for the base loss."""
    pairs = truth_file(tmp_path, query_id=["red", "green"], example_id=["row-01", "row-02"])
    found = {judgement.name: judgement for judgement in judged(judge(**EVERYTHING, truth=pairs, mislabelled=pairs))}
    assert ["lds", "mirror", "leave_out", "tail_patch", "truth", "mislabelled"] == list(found)
    for folder in (tmp_path / "judged", tmp_path / "run"):
        for name, judgement in found.items():
            rows = list(csv.DictReader(io.StringIO((folder / "report" / f"{name}.csv").read_text())))
            beside = {"mislabelled": {"base loss"}, "mirror": {"trained with the query (P2)"}}.get(name, set())
            assert {"ours"} | beside == {row["method"] for row in rows}
            assert list(judgement.rows[0]) == list(rows[0])
            assert Image.open(folder / "report" / f"{name}.png").width > 400


def test_what_trains_nothing_anew_need_not_know_how_the_model_was_trained(small, tmp_path, monkeypatch):
    """Its factory returns the trained model: there is nothing to start from, and truths are judged all the same."""
    tree = small.tree(tmp_path / "run")
    tree["model"] |= {"weights_uri": None}
    run = work_off(freeze(parse_spec(tree)))
    asked = {"judge": {"uri": str(tmp_path / "judged")}, "runs": {"ours": run.uri()}}
    with pytest.raises(SpecError, match=r"training\.start: missing"):
        judged(parse_tree(Judge, asked | {"leave_out": EVERYTHING["leave_out"]}))
    monkeypatch.setattr("pipeline.verdict.retrain", learn_here)
    free = {
        "truth": truth_file(tmp_path, query_id=["red", "green"], example_id=["row-01", "row-02"]),
        "tail_patch": EVERYTHING["tail_patch"],
    }
    assert ["tail_patch", "truth"] == [each.name for each in judged(parse_tree(Judge, asked | free))]


def test_workers_in_other_folders_are_told_whole_paths(judge, monkeypatch, tmp_path):
    """Where retrainings go, and the model that they begin with, do not depend on where a worker stands."""
    monkeypatch.chdir(tmp_path)
    told = []
    monkeypatch.setattr("pipeline.verdict.retrain", lambda asked, _: told.append(asked) or learn_here(asked, _))
    start = {"factory": "tests.small:linear", "weights_uri": "world/linear.safetensors"}
    judged(judge(judge={"uri": "judged"}, training={"epochs": 1, "start": start}))
    assert told[0].uri().startswith(f"{tmp_path}/judged/retrainings/")
    assert f"{tmp_path}/world/linear.safetensors" == told[0].judge.training.start.weights_uri


def test_scores_of_another_tool_are_judged_like_a_runs(judge, run, here, tmp_path):
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
    (lds,) = judged(judge(scores={"theirs": uri}))
    by_name = {row["method"]: row["lds"] for row in lds.rows}
    assert by_name["ours"] == by_name["theirs"]


def test_only_what_is_missing_is_trained_anew(judge, here):
    """A retraining that is there stays; one that is lost comes back with the same losses."""
    spec = judge()
    judged(spec)
    retrainings, lessons = retrainings_of(spec), subsets(spec)
    assert lessons == here
    before = retrainings.query_losses(lessons)
    Path(retrainings.uri(f"{lessons[3].name}.parquet")).unlink()
    judged(spec)
    assert [*lessons, lessons[3]] == here
    assert np.array_equal(before, retrainings.query_losses(lessons))


def test_more_retrainings_keep_those_that_are_there(judge, here):
    """Numbers of subsets and retrainings are no part of what a retraining is."""
    judged(judge())
    here.clear()
    judged(judge(lds={"subsets": SUBSETS + 1, "retrainings": AGAIN}))
    assert [Subset(0.5, SUBSETS, again) for again in range(AGAIN)] == here


def test_judgements_share_what_they_train_alike(judge, here):
    """The corpus whole is trained once for the mirror and for leaving out; a method judged twice costs nothing."""
    spec = judge(**EVERYTHING)
    judged(spec)
    assert len(here) == len(set(here))
    assert 1 == sum(isinstance(lesson, Whole) and lesson.query_id is None for lesson in here)
    here.clear()
    judged(judge(**EVERYTHING, runs={"again": spec.runs["ours"]}))
    assert [] == here


@pytest.mark.parametrize("change", [{"training": {"epochs": 4}}, {"seed": 1}])
def test_another_training_is_another_fingerprint(judge, change):
    """What decides the losses decides where they lie."""
    assert retrainings_of(judge()).fingerprint != retrainings_of(judge(**change)).fingerprint


@pytest.mark.parametrize("grown", ["corpus", "queries"])
def test_a_grown_run_is_judged_by_retrainings_of_its_own(judge, here, small, run, grown):
    """Other examples train other models, and losses of other queries are taken."""
    judged(judge())
    before, (queries, corpus) = list(here), small.later
    work_off(extend(run.uri(), *((None, corpus) if grown == "corpus" else (queries, None))))
    (found,) = judged(judge())
    assert 2 * before == here
    assert all(np.isfinite(row["lds"]) for row in found.rows)


def test_other_contents_under_the_same_names_are_another_fingerprint(judge, small, tmp_path):
    """Labels that were put right in place, for a run of its own; first weights that were replaced."""
    path = small.folder / "corpus" / "part-1.parquet"
    start = {"start": {"factory": "tests.small:linear", "weights_uri": str(small.folder / "linear.safetensors")}}
    found = [retrainings_of(judge(training=start)).fingerprint]
    shutil.copy(small.folder / "linear-2.safetensors", small.folder / "linear.safetensors")
    found.append(retrainings_of(judge(training=start)).fingerprint)
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("label"), "label", [[0] * len(table)]), path)
    other = work_off(freeze(small.spec(tmp_path / "other")))
    found.append(retrainings_of(judge(training=start, runs={"ours": other.uri()})).fingerprint)
    assert 3 == len(set(found))


def test_a_step_is_of_one_model(small, run, tmp_path):
    """Another dtype, or other weights, is another model to step from."""
    specs = [
        small.spec(tmp_path / "fine", "model.dtype=float64"),
        small.spec(tmp_path / "else", "model.weights_uri=" + str(small.folder / "linear-2.safetensors")),
    ]
    assert 3 == len({model_mark(each) for each in (run, *map(freeze, specs))})


@pytest.mark.parametrize("lesson", [Whole("q" * 250, 0), without(range(500), 0), Step(3, 0.05, "0" * 16)])
def test_names_of_lessons_fit_a_file_system(lesson):
    """However long a query's id is, and however many rows are left out."""
    assert len(lesson.name) < 100


def test_another_method_shares_the_retrainings(judge, here, small, tmp_path):
    """Another producer and another temperature are judged by the models that were trained for the first."""
    judged(judge())
    here.clear()
    other = work_off(freeze(small.spec(tmp_path / "other", "producer.name=finetune", "task.temperature=3")))
    judged(judge(runs={"other": other.uri()}))
    assert [] == here


def test_subsets_hold_their_share_and_differ():
    """Half of the examples each, drawn anew."""
    inside_SN = np.stack([Subset(0.5, part, 0).inside_N(seed=0, examples=100) for part in range(20)])
    assert {50} == set(inside_SN.sum(axis=1))
    assert 20 == len({row.tobytes() for row in inside_SN})
    assert 0.3 < inside_SN.mean(axis=0).min() * 2


def test_training_anew_uses_only_the_examples_inside(judge):
    """Without any row of a class the model cannot say it: its loss on that query is far higher."""
    spec = judge(training={"epochs": 60, "batch_rows": 4})
    retrainer = Retrainer(open_run(spec.runs["ours"]), spec.training, "cpu")
    everything, again, but_one = (
        retrainer.query_losses(retrainer.learned(lesson, seed=0))
        for lesson in (Whole(None, 0), Without((), 0), without(range(1, len(retrainer.examples.id_N)), 0))
    )
    assert np.array_equal(everything, again)
    assert but_one.max() > everything.max() + 1


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_a_query_that_is_trained_on_is_learned(judge, optimizer):
    """With the query's rows in the corpus its own loss is lower; losses of all examples are taken."""
    spec = judge(training={"optimizer": optimizer, "epochs": 60, "batch_rows": 4, "weight_decay": 0.01})
    retrainings = retrainings_of(spec)
    lessons = [Whole(None, 0), Whole("red", 0), Whole("green", 0)]
    retrainer = Retrainer(retrainings.run, spec.training, "cpu")
    for lesson in lessons:
        retrainings.do(retrainer, lesson)
    loss_LQ = retrainings.query_losses(lessons)
    assert loss_LQ[1, 0] < loss_LQ[0, 0]
    assert loss_LQ[2, 1] < loss_LQ[0, 1]
    assert (3, 12) == retrainings.example_losses(lessons).shape


def test_lbfgs_ends_at_the_minimum(judge):
    """The gradient of mean loss and weight decay is 0 to the tolerance, taken here by hand."""
    spec = judge(training={"optimizer": "lbfgs", "weight_decay": 0.01})
    retrainer = Retrainer(open_run(spec.runs["ours"]), spec.training, "cpu")
    model = retrainer.learned(without([3], 0), seed=0)
    arrays = retrainer.examples.inputs.rows(np.delete(np.arange(12), 3))
    loss = F.cross_entropy(
        model(torch.from_numpy(arrays["features"]).double()), torch.from_numpy(arrays["label"])
    ) + 0.005 * sum(tensor.square().sum() for tensor in model.parameters())
    loss.backward()
    assert 0.0 == pytest.approx(max(float(tensor.grad.abs().max()) for tensor in model.parameters()), abs=1e-9)


def test_a_step_is_a_gradient_step(judge):
    """A step of no length changes nothing; a short one lowers its own row's loss by its squared gradient, as rows go."""
    spec = judge()
    retrainer = Retrainer(open_run(spec.runs["ours"]), spec.training, "cpu")
    losses = [retrainer.example_losses(retrainer.learned(Step(5, lr, "w"), seed=0)) for lr in (0.0, 0.01, 0.02)]
    fall, twice = losses[0] - losses[1], losses[0] - losses[2]
    assert fall[5] > 0
    assert twice[5] == pytest.approx(2 * fall[5], rel=0.05)


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_a_judgement_of_nothing_is_refused(judge):
    """Something must be asked."""
    with pytest.raises(
        SpecError, match="nothing is asked: give lds, mirror, leave_out, tail_patch, truth or mislabelled"
    ):
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


@pytest.mark.parametrize("section", ["truth", "mislabelled"])
def test_a_truth_without_rows_is_refused(judge, tmp_path, section):
    """By name; not as a defect of ours."""
    nothing = truth_file(tmp_path, query_id=pa.array([], pa.string()), example_id=pa.array([], pa.string()))
    with pytest.raises(InputError, match=r"truth\.parquet has no rows"):
        judged(judge(lds=None, **{section: nothing}))


def test_base_losses_are_judged_beside_every_run(small, run, judge, here, tmp_path):
    """Once where runs have the same ones, else with their names; their AUC is that of the losses in score files."""
    by_loss = work_off(freeze(small.spec(tmp_path / "by-loss", "producer.name=finetune")))
    hot = work_off(freeze(small.spec(tmp_path / "hot", "task.temperature=5")))
    wrong = ["row-01", "row-05"]
    runs, asked = {"a": run.uri(), "b": by_loss.uri()}, {"mislabelled": truth_file(tmp_path, example_id=wrong)}
    (found,) = judged(judge(lds=None, runs=runs, **asked))
    assert {"a", "b", "base loss"} == {row["method"] for row in found.rows}
    (found,) = judged(judge(lds=None, runs={**runs, "c": hot.uri()}, **asked))
    auc = {row["method"]: row["auc"] for row in found.rows}
    assert {"a", "b", "c", "base loss (a, b)", "base loss (c)"} == set(auc)
    for name, of in (("base loss (a, b)", run), ("base loss (c)", hot)):
        table = pq.read_table(of.uri("scores"), filters=[("query_id", "=", "red")], partitioning=None)
        is_wrong_N = np.isin(table["example_id"].to_pylist(), wrong)
        assert roc_auc_score(is_wrong_N, table["base_loss"].to_numpy()) == pytest.approx(auc[name])


def test_wrong_labels_that_the_corpus_does_not_have_are_refused(judge, tmp_path):
    """Ids of another corpus."""
    with pytest.raises(InputError, match="names no example of the corpus"):
        judged(judge(lds=None, mislabelled=truth_file(tmp_path, example_id=["doc-1"])))


def test_training_that_diverges_is_a_numerics_error(judge):
    """With what to do about it."""
    spec = judge(training={"lr": 1e20, "weight_decay": 1e20})
    retrainer = Retrainer(open_run(spec.runs["ours"]), spec.training, "cpu")
    with pytest.raises(NumericsError, match=r"(?s)not finite.*lower training\.lr"):
        retrainer.query_losses(retrainer.learned(Whole(None, 0), seed=0))


def test_a_minimum_that_need_not_be_there_is_refused(judge):
    """Rows that can be told apart have no minimum without weight decay: where a search ends would be chance."""
    with pytest.raises(SpecError, match="lbfgs wants weight_decay above 0"):
        judge(training={"optimizer": "lbfgs"})


def test_a_tolerance_that_is_not_reached_is_a_numerics_error(judge, monkeypatch):
    """L-BFGS says that it does not get there, and what to do."""
    monkeypatch.setattr("pipeline.retraining.LBFGS_ITERATIONS", 100)
    spec = judge(training={"optimizer": "lbfgs", "weight_decay": 0.01, "tolerance": 1e-300})
    retrainer = Retrainer(open_run(spec.runs["ours"]), spec.training, "cpu")
    with pytest.raises(NumericsError, match=r"(?s)does not converge.*weight_decay"):
        retrainer.learned(Whole(None, 0), seed=0)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"mirror": {"groups": 13}}, "13 groups of 1: the corpus has 12 examples"),
        ({"mirror": {"groups": 3, "rows": 12}}, "3 groups of 12: the corpus has 12 examples"),
        ({"mirror": {"groups": 3, "rows": 2, "by_wrong_labels": True}}, "groups of 2 cannot be all wrong labels"),
        ({"leave_out": {"k": 12}}, r"leave_out\.k: 12 of 12 examples would leave none"),
        ({"tail_patch": {"k": 12}}, r"tail_patch\.k: 12 of 12 examples would leave none"),
    ],
)
def test_more_than_the_corpus_has_is_refused(judge, here, tmp_path, sections, says):
    """Before anything is trained."""
    wrong = truth_file(tmp_path, example_id=["row-01"])
    with pytest.raises(InputError, match=says):
        judged(judge(lds=None, mislabelled=wrong, **sections))
    assert [] == here


def test_groups_by_wrong_labels_need_to_know_them(judge):
    """The section that names them."""
    with pytest.raises(SpecError, match=r"mirror\.by_wrong_labels: give mislabelled"):
        judge(mirror={"by_wrong_labels": True})


def test_the_spec_that_is_shipped_loads():
    """jobs/specs/judge.yaml."""
    assert ["natural", "paper"] == list(load_judge("jobs/specs/judge.yaml").runs)


# --- on Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_workers_train_what_one_process_trains(judge, ray_cluster, tmp_path):
    """The same losses, whoever trained, of every kind of lesson; a second start trains nothing."""
    spec = judge(judge={"uri": str(tmp_path / "cluster")}, resources={"score": {"cpus": 1, "actors": 2}}, **EVERYTHING)
    judged(spec)
    there, here = retrainings_of(spec), retrainings_of(judge(**EVERYTHING))
    lessons = [*subsets(spec), Whole(None, 0), Whole("red", 0), Step(0, 0.0, model_mark(there.run))]
    assert [] == there.missing(lessons)
    retrainer = Retrainer(here.run, spec.training, "cpu")
    for lesson in lessons:
        here.do(retrainer, lesson)
    assert np.array_equal(here.query_losses(lessons), there.query_losses(lessons))
    assert np.array_equal(here.example_losses(lessons[-3:-1]), there.example_losses(lessons[-3:-1]))
    judged(spec)


@pytest.mark.ray
def test_errors_of_workers_come_home(judge, ray_cluster):
    """As they were, with what is done kept."""
    with pytest.raises(NumericsError, match=r"lower training\.lr"):
        judged(judge(training={"lr": 1e20, "weight_decay": 1e20}))
