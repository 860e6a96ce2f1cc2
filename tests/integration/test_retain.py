"""Retaining runs, without Ray: queries shared out over workers, asked later or again, give the same counterparts to the byte."""

from pathlib import Path

import pytest

from pipeline.audit import audit
from pipeline.errors import ContractError, SpecError
from pipeline.extend import extend
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.records import Column
from pipeline.run import finish
from pipeline.tuner import Tuner
from tests.conftest import run_without_ray
from tests.small import work_off

RETAIN = "producer={name: retain, steps: 10, sample_rows: 100}"


class LayerByLayer:
    """A task of one's own over digits that goes through the model's layers itself."""

    def columns(self):
        return [Column("features", ("pixels",), "float32", (1, 8, 8))]

    def loss_B(self, model, batch):
        hidden = batch["features"]
        for layer in model.children():
            hidden = layer(hidden)
        return hidden.square().sum(dim=1)


def tensors(run):
    return {query_id: run.counterpart_tensors(query_id) for query_id in run.query_ids}


def test_a_run_is_sealed_and_says_how_the_corpus_was_held(make_spec):
    """Nothing is damaged or left over; meta.json has the curvature and the divergence, in nats, the same curvature for all."""
    run = run_without_ray(make_spec(RETAIN))
    finish(run)
    found = audit(open_run(run.uri()))
    assert ([], {}) == (found.damage, found.orphans)
    metas = [run.counterpart_meta(query_id) for query_id in run.query_ids]
    assert 1 == len({meta["details"]["curvature_nats"] for meta in metas})
    assert all(meta["query_loss_before_nats"] < meta["query_loss_after_nats"] for meta in metas)
    assert all(0 < meta["details"]["divergence_nats"] < 0.1 for meta in metas)


def test_workers_share_out_the_queries(make_spec):
    """Each of two workers makes one query's counterpart: the bytes of one worker that makes both."""
    whole = run_without_ray(make_spec(RETAIN, name="whole"))
    shared = freeze(make_spec(RETAIN, name="shared"))
    assert not Tuner(shared, "cpu").is_together
    for query_id in reversed(shared.query_ids):
        assert [] == Tuner(shared, "cpu").tune_all([query_id])
    assert tensors(whole) == tensors(shared)


def test_a_query_that_comes_later_is_held_by_the_same_rows(small, tmp_path):
    """Counterparts of an extended run that is tuned again from nothing are the same bytes, though the corpus has grown."""
    run = work_off(freeze(small.spec(tmp_path / "run", RETAIN)))
    queries, corpus = small.later
    grown = work_off(extend(run.uri(), queries, corpus))
    before = tensors(grown)
    for query_id in grown.query_ids:
        Path(grown.uri("counterparts", f"query_id={query_id}", "meta.json")).unlink()
    assert [] == Tuner(open_run(run.uri()), "cpu").tune_all(grown.query_ids)
    assert before == tensors(grown)


def test_another_seed_draws_other_batches(make_spec):
    """The spec's seed decides which rows are held, and in which order."""
    one, other = (run_without_ray(make_spec(RETAIN, f"seed={seed}", name=f"seed-{seed}")) for seed in (0, 1))
    assert one.counterpart_tensors("copy-of-3") != other.counterpart_tensors("copy-of-3")


def test_a_task_that_does_not_fit_fails_once(make_spec):
    """Not for every query: what is wrong is seen on the sample, before any of them."""
    own = f"task={{name: '{__name__}:LayerByLayer'}}"
    tuner = Tuner(freeze(make_spec(own, RETAIN)), "cpu")
    (failure,) = tuner.tune_all(["copy-of-3", "copy-of-77"])
    assert isinstance(failure, ContractError)
    assert "must call its model as model(...)" in failure.hint


def test_a_shared_model_is_refused_before_any_work(make_spec):
    """Every worker holds the whole model and its copy."""
    with pytest.raises(SpecError, match=r"resources\.tune\.shard: producer retain"):
        freeze(make_spec(RETAIN, "resources.tune.shard=true"))
