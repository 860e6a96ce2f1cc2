"""Runs whose producer chooses by a budget, without Ray: what was chosen is frozen, for later starts and replays.

Budgets are so small or so large that the speed of the machine has no part in what is chosen.
"""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.artifacts import CHOICE
from pipeline.audit import audit
from pipeline.freeze import freeze
from pipeline.frozen import open_run, with_choices
from pipeline.producers.budget import LEAST_ROWS, MOST_ROWS
from pipeline.producers.natural import Natural
from pipeline.run import finish
from pipeline.specfile import parse_spec
from pipeline.tuner import Tuner
from tests.conftest import run_without_ray

pytestmark = pytest.mark.slow  # every one tunes
SMALL, LARGE = "producer={name: natural, budget_s: 1.0e-9}", "producer={name: natural, budget_s: 1.0e+9}"


def scores(run):
    return {path.relative_to(run.uri()): path.read_bytes() for path in Path(run.uri("scores")).rglob("*.parquet")}


@pytest.fixture
def chooses_nothing(monkeypatch):
    """From its call on, whatever wants to choose fails."""

    def nothing(*_):
        raise AssertionError("chosen again")

    return lambda: monkeypatch.setattr(Natural, "choose", nothing)


def test_with_time_enough_all_is_as_with_the_rows_given(make_spec, tmp_path):
    """The choice converges to what a spec without a budget says, to the byte."""
    chosen = run_without_ray(make_spec(LARGE, f"run.uri={tmp_path / 'chosen'}"))
    given = run_without_ray(make_spec("producer={name: natural, sample_rows: 4096}", f"run.uri={tmp_path / 'given'}"))
    assert {"sample_rows": MOST_ROWS} == chosen.measured(CHOICE)["fields"]
    assert given.measured(CHOICE) is None
    assert scores(given) == scores(chosen)


def test_without_time_few_rows_are_used_by_ekfac(make_spec, capsys):
    """It is said in one line, and noted with the run."""
    run = run_without_ray(make_spec(SMALL))
    assert {"sample_rows": LEAST_ROWS, "curvature": "ekfac"} == run.measured(CHOICE)["fields"]
    assert "ekfac" == run.fitted_meta()["details"]["curvature"]
    assert f"sample: {LEAST_ROWS} of " in "".join(capsys.readouterr())


def test_a_later_start_does_the_same(make_spec, chooses_nothing):
    """Though what was fitted is lost."""
    run = run_without_ray(make_spec(SMALL))
    before = run.counterpart_tensors("copy-of-3")
    chooses_nothing()
    Path(run.uri("counterparts", "query_id=copy-of-3", "meta.json")).unlink()
    Path(run.uri("fitted", "meta.json")).unlink()
    Tuner(run, "cpu").tune("copy-of-3")
    assert before == run.counterpart_tensors("copy-of-3")


def test_a_replay_does_the_same(make_spec, chooses_nothing, tmp_path):
    """run.yaml has what was chosen: another run of it gives the same scores, and is as whole."""
    run = with_choices(run_without_ray(make_spec(SMALL)))
    finish(run)
    tree = yaml.safe_load(Path(run.uri("run.yaml")).read_text())
    assert {"": {"sample_rows": LEAST_ROWS, "curvature": "ekfac"}} == tree["resolved"]["chosen"]
    chooses_nothing()
    replay = run_without_ray(parse_spec(tree, [f"run.uri={tmp_path / 'replay'}"]))
    assert scores(run) == scores(replay)
    found = audit(open_run(run.uri()))
    assert ([], {}) == (found.damage, found.orphans)


def test_a_choice_that_is_damaged_is_found(make_spec):
    """By the audit; run.yaml still has it."""
    run = with_choices(run_without_ray(make_spec(SMALL)))
    place = Path(run.uri(CHOICE))
    place.write_text(json.dumps({**json.loads(place.read_text()), "fields": {"sample_rows": 99}}))
    assert [CHOICE] == [finding.path for finding in audit(open_run(run.uri())).damage]
    assert LEAST_ROWS == freeze(run.spec).resolved.chosen[""]["sample_rows"]


def test_another_budget_is_another_run(make_spec, tmp_path):
    """It may decide the scores."""
    runs = [freeze(make_spec(text, f"run.uri={tmp_path / name}")) for name, text in (("a", SMALL), ("b", LARGE))]
    assert runs[0].resolved.fingerprint != runs[1].resolved.fingerprint
