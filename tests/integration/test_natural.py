"""Natural runs, without Ray: what is fitted once, kept, used again by what comes later, and mended when it is damaged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from pipeline.audit import audit
from pipeline.errors import SpecError
from pipeline.extend import extend
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.run import finish
from pipeline.sample import draw_sample
from pipeline.tuner import Tuner
from tests.conftest import run_without_ray
from tests.small import Small, work_off

pytestmark = pytest.mark.slow  # every one tunes
NATURAL = "producer={name: natural, sample_rows: 64}"


@pytest.fixture
def small(tmp_path):
    (tmp_path / "world").mkdir()
    return Small(tmp_path / "world")


def fitted(run) -> Path:
    return Path(run.uri("fitted"))


def test_a_run_is_sealed_and_every_object_is_named(make_spec):
    """Fitted tensors and their meta.json belong to the run, and nothing is left over."""
    run = run_without_ray(make_spec(NATURAL))
    finish(run)
    found = audit(open_run(run.uri()))
    assert [] == found.damage
    assert {} == found.orphans
    details = run.counterpart_meta("copy-of-3")["details"]
    assert details["damping"] == run.fitted_meta()["details"]["damping"]


def test_a_counterpart_that_is_lost_comes_back_the_same(make_spec):
    """To the byte, though it is tuned alone this time: the damping is kept, and queries do not touch each other."""
    run = run_without_ray(make_spec(NATURAL))
    before = run.counterpart_tensors("copy-of-3")
    Path(run.uri("counterparts", "query_id=copy-of-3", "meta.json")).unlink()
    written = fitted(run).joinpath("meta.json").stat().st_mtime_ns
    Tuner(run, "cpu").tune("copy-of-3")
    assert before == run.counterpart_tensors("copy-of-3")
    assert written == fitted(run).joinpath("meta.json").stat().st_mtime_ns


@pytest.mark.parametrize("damaged", ["meta.json", "tensors"])
def test_what_was_fitted_is_made_anew_when_it_is_damaged(make_spec, damaged):
    """`verify` finds it, and the next query that is tuned fits again."""
    run = run_without_ray(make_spec("producer={name: natural, curvature: diagonal}"))
    name = "meta.json" if damaged == "meta.json" else run.fitted_meta()["tensors"]["name"]
    before = fitted(run).joinpath(name).read_bytes()
    fitted(run).joinpath(name).write_bytes(b"{}")
    assert any(finding.path.startswith("fitted/") for finding in audit(open_run(run.uri())).damage)
    Path(run.uri("counterparts", "query_id=copy-of-3", "meta.json")).unlink()
    Tuner(run, "cpu").tune("copy-of-3")
    assert before == fitted(run).joinpath(name).read_bytes()


def test_queries_that_come_later_use_what_was_fitted(small, tmp_path):
    """An extended run has the damping of its first start."""
    natural = "producer={name: natural, damping: null}"
    run = work_off(freeze(small.spec(tmp_path / "run", natural)))
    queries, _ = small.later
    grown = work_off(extend(run.uri(), queries, None))
    dampings = {grown.counterpart_meta(query_id)["details"]["damping"] for query_id in grown.query_ids}
    assert 1 == len(dampings)


def test_other_batches_are_another_run_but_nearly_the_same_scores(make_spec):
    """The sample is the same rows; sums over other batches differ in rounding alone."""
    one = run_without_ray(make_spec("producer={name: natural, damping: 0.01}", name="one"))
    other = run_without_ray(make_spec("producer={name: natural, damping: 0.01}", "score.batch_rows=64", name="other"))
    ours, theirs = (run.counterpart_meta("copy-of-3") for run in (one, other))
    assert ours["change_norm"] == pytest.approx(theirs["change_norm"], rel=1e-3)


@pytest.mark.parametrize("curvature", ["diagonal", "gfim"])
def test_labels_are_drawn_by_the_ids_of_rows(curvature, make_spec):
    """What is fitted does not depend on batches and shards; with another seed other labels are drawn."""
    producer = f"producer={{name: natural, sample_rows: 64, curvature: {curvature}, damping: 0.01}}"
    others = ("score.batch_rows=8", "score.batch_rows=512", "score.shard_rows=50", "seed=1")
    tensors = []
    for number, other in enumerate(("seed=0", *others)):
        run = freeze(make_spec(producer, other, name=f"run-{number}"))
        tuner = Tuner(run, "cpu")
        tuner.tune_all(run.query_ids[:1])
        tensors.append(load(run.fitted()[0]))
    for found in tensors[1:-1]:
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-7)
    assert any(not torch.allclose(tensors[-1][name], tensor, rtol=0.01) for name, tensor in tensors[0].items())


def test_a_sample_has_two_parts_that_share_no_row(make_spec):
    """Of 64 rows half is the probe; the same at every start."""
    run = freeze(make_spec(NATURAL))
    task = Tuner(run, "cpu")._task
    drawn, again = draw_sample(run, task, 64), draw_sample(run, task, 64)
    assert (32, 32) == tuple(part.inputs.items for part in drawn)
    parts = [part.inputs.whole()["features"] for part in drawn]
    assert 64 == len({row.tobytes() for part in parts for row in part})
    assert (parts[1] == again[1].inputs.whole()["features"]).all()


def test_of_a_tiny_corpus_the_sample_is_all(small, tmp_path):
    """13 rows of which one cannot be decoded."""
    run = freeze(small.spec(tmp_path / "run"))
    assert [6, 6] == [part.inputs.items for part in draw_sample(run, Tuner(run, "cpu")._task, 4096)]


def test_a_shared_model_is_refused_before_any_work(make_spec):
    """Workers share out the sample, not the model."""
    with pytest.raises(SpecError, match=r"resources\.tune\.shard: producer natural"):
        freeze(make_spec(NATURAL, "resources.tune.shard=true"))


def test_a_query_that_fails_leaves_the_others_committed(make_spec):
    """An image of NaN under a model of its own task: its error comes home, the other query is made."""
    run = freeze(make_spec(NATURAL))
    tuner = Tuner(run, "cpu")
    tuner._queries["copy-of-3"].columns["features"][:] = float("nan")
    failures = tuner.tune_all(run.query_ids)
    assert ["query 'copy-of-3': its gradient has length nan"] == [failure.message for failure in failures]
    assert {"copy-of-77"} == run.committed_queries()
    only_bad = tuner.tune_all(["copy-of-3"])
    assert 1 == len(only_bad)
