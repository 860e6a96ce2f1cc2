"""Curvatures that one run fits and others read, without Ray: the same scores to the bit, and none that is not right."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline import kept_curvatures
from pipeline.artifacts import CHOICE
from pipeline.audit import audit
from pipeline.freeze import freeze, survey
from pipeline.frozen import open_run
from pipeline.plan import identity
from pipeline.producers.natural import Natural
from pipeline.run import finish
from pipeline.specfile import dump_spec
from pipeline.tuner import Tuner
from tests.conftest import exit_code, run_without_ray

pytestmark = pytest.mark.slow  # every one tunes
EKFAC = "name: natural, sample_rows: 64, curvature: ekfac"


def scores(run):
    return {path.relative_to(run.uri()): path.read_bytes() for path in Path(run.uri("scores")).rglob("*.parquet")}


@pytest.fixture
def spec_of(make_spec, tmp_path):
    """`spec_of("name", fields)`: a run of that name, whose curvatures are kept in `kept` beside it."""

    def make(name, fields=EKFAC, *overrides):
        return make_spec(
            f"run.uri={tmp_path / name}", f"producer={{{fields}, curvatures: {tmp_path / 'kept'}}}", *overrides
        )

    return make


@pytest.fixture
def fits_nothing(monkeypatch):
    """From its call on, whatever wants to fit or choose fails."""

    def nothing(*_):
        raise AssertionError("fitted again")

    def begin():
        monkeypatch.setattr(Natural, "fit", nothing)
        monkeypatch.setattr(Natural, "choose", nothing)

    return begin


@pytest.mark.parametrize("fields", [EKFAC, "name: natural, sample_rows: 64", "name: natural, budget_s: 1.0e-9"])
def test_another_run_reads_it_and_has_the_bits_of_a_run_without(spec_of, make_spec, tmp_path, fits_nothing, fields):
    """Factors, a damping alone, and what a budget chose; and the run keeps all that it needs in its own folder."""
    first = run_without_ray(spec_of("first", fields))
    fits_nothing()
    second = run_without_ray(spec_of("second", fields))
    assert scores(first) == scores(second)
    assert first.fitted() == second.fitted()
    assert (first.measured(CHOICE) or {}).get("fields") == (second.measured(CHOICE) or {}).get("fields")
    finish(second)
    for path in (tmp_path / "kept").iterdir():
        path.unlink()
    assert ([], {}) == ((found := audit(open_run(second.uri()))).damage, found.orphans)


def test_what_is_kept_moves_no_score(spec_of, make_spec, tmp_path):
    """Nor is it part of what a run is."""
    with_it, without = spec_of("with"), make_spec(f"run.uri={tmp_path / 'without'}", f"producer={{{EKFAC}}}")
    assert identity(with_it) == identity(without)
    assert scores(run_without_ray(without)) == scores(run_without_ray(with_it))


@pytest.mark.parametrize(
    "override",
    ["seed=1", "producer.sample_rows=65", "producer.damping=0.1", "producer.parameters=weight", "task.temperature=1"],
)
def test_what_decides_a_fit_has_one_of_its_own(spec_of, override):
    """By name, so that nothing needs to be read."""
    there, other = (survey(spec_of("run", EKFAC, *overrides))[0] for overrides in ((), (override,)))
    assert kept_curvatures.place_of(there) != kept_curvatures.place_of(other)


@pytest.mark.parametrize("override", ["producer.step=0.1", "run.uri=elsewhere", "rank.k=3", "resources.tune.workers=2"])
def test_what_decides_no_fit_shares_one(spec_of, override):
    """Another question, or more workers, want no other curvature."""
    there, other = (survey(spec_of("run", EKFAC, *overrides))[0] for overrides in ((), (override,)))
    assert kept_curvatures.place_of(there) == kept_curvatures.place_of(other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "is damaged"),
        ({"sample": "of other rows"}, "other contents"),
        ({"losses": [9.0]}, "other code"),
        ({"fields": {"sample_rows": 65}}, "than this run chose"),
        ({"fields": None}, "another version"),
        ({"fields": {"steps": 3}}, "another version"),
    ],
)
def test_what_is_not_right_is_fitted_again_and_replaced(spec_of, capsys, change, said):
    """Damaged, of rows that changed in place, of code that changed, of another version: each is said in a line."""
    first = run_without_ray(spec_of("first"))
    place = Path(kept_curvatures.place_of(first))
    right = place.read_bytes()
    if change is None:
        place.write_bytes(right[:-40] + b"\0" + right[-39:])
    else:
        kept_curvatures.write(str(place), dataclasses.replace(kept_curvatures.read(str(place)), **change))
    capsys.readouterr()
    second = run_without_ray(spec_of("second"))
    assert said in "".join(capsys.readouterr())
    assert right == place.read_bytes()
    assert scores(first) == scores(second)


def test_a_folder_that_cannot_be_written_ends_no_run(spec_of, tmp_path, capsys):
    """A file stands where the folder should be."""
    (tmp_path / "kept").write_text("")
    run = run_without_ray(spec_of("run"))
    assert set(run.query_ids) == run.committed_queries()
    assert "the curvature is not kept" in "".join(capsys.readouterr())


def test_plan_says_whether_it_is_there(spec_of, monkeypatch, tmp_path, capsys):
    """Before and after a first run."""
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(spec_of("planned")))
    assert 0 == exit_code(monkeypatch, "plan", str(path))
    assert "to be fitted" in capsys.readouterr().out
    run_without_ray(spec_of("first"))
    assert 0 == exit_code(monkeypatch, "plan", str(path))
    assert "fitted before" in capsys.readouterr().out


def tune_as(rank, workers, run_uri, store):
    """What a worker of a group does."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    try:
        run = open_run(run_uri)
        assert [] == Tuner(run, "cpu").tune_all(run.query_ids)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("fields", [EKFAC, "name: natural, budget_s: 1.0e-9"])
def test_workers_choose_fit_and_read_together(spec_of, tmp_path, fields):
    """A group of two begins; another reads what it kept, and gives the same counterparts."""
    runs = [freeze(spec_of(name, fields)) for name in ("first", "second")]
    for run in runs:
        torch.multiprocessing.spawn(tune_as, (2, run.uri(), tmp_path / f"store-{Path(run.uri()).name}"), 2)
    assert set(runs[0].query_ids) == runs[1].committed_queries()
    assert runs[0].fitted() == runs[1].fitted()
    for query_id in runs[0].query_ids:
        assert runs[0].counterpart_tensors(query_id) == runs[1].counterpart_tensors(query_id)
    assert 1 == len(list((tmp_path / "kept").iterdir()))
