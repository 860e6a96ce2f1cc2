"""Ways of scoring through whole runs: scores of short steps agree, and a run is scored in one way from first to last."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch import nn

from pipeline.artifacts import CALIBRATION
from pipeline.audit import audit
from pipeline.calibration import MANY
from pipeline.errors import ArtifactError, ContractError
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.plan import identity
from pipeline.run import attribute
from pipeline.storage import remove_folder
from tests.conftest import compiles, read_scores, run_without_ray, tuned
from tests.small import Small, work_off

pytestmark = pytest.mark.slow

BLOCKS = "model={factory: 'tests.unit.test_compiled:blocks'}"
NATURAL = "producer={name: natural, sample_rows: 64, damping: 0.1, step: 1.0e-3}"


@pytest.fixture
def small(tmp_path):
    (tmp_path / "world").mkdir()
    return Small(tmp_path / "world")


def test_scores_of_short_steps_agree(make_spec, tmp_path):
    """Natural steps on digits: within a hundredth of their length; base losses to rounding, counterparts' first order."""
    found = {
        way: read_scores(run_without_ray(make_spec(NATURAL, f"run.uri={tmp_path / way}", f"score.way={way}")))
        for way in ("difference", "gradient", "jvp")
    }
    expected = np.asarray(found["gradient"]["score"])
    for way in ("difference", "jvp"):
        assert found["gradient"]["example_id"].equals(found[way]["example_id"])
        np.testing.assert_allclose(found[way]["base_loss"], found["gradient"]["base_loss"], atol=1e-5)
        got = np.asarray(found[way]["score"])
        assert np.linalg.norm(got - expected) < 0.01 * np.linalg.norm(expected)
    np.testing.assert_allclose(
        found["gradient"]["counterpart_loss"], np.add(found["gradient"]["base_loss"], expected), atol=1e-5
    )


@pytest.mark.parametrize("way", ["gradient", pytest.param("jvp", marks=pytest.mark.slow)])
def test_a_score_does_not_depend_on_the_shard_it_is_in(small, tmp_path, way):
    """To the bit, as for losses."""
    found = [
        read_scores(work_off(freeze(small.spec(tmp_path / str(rows), f"score.way={way}", f"score.shard_rows={rows}"))))
        for rows in (1, 4, 13)
    ]
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])


@compiles
def test_compiled_scores_are_the_same_to_rounding(make_spec, tmp_path, capsys):
    """Under any shard size the same to the bit; another run than one without, which is what it was before there were any."""

    def scored(name, *overrides):
        return run_without_ray(make_spec(f"run.uri={tmp_path / name}", BLOCKS, "producer={name: unlearn}", *overrides))

    runs = [scored("plain"), scored("compiled", "score.compile=true")]
    runs += [scored("shards", "score.compile=true", "score.shard_rows=13")]
    assert 2 == capsys.readouterr().err.count("compiled 3 Block")
    plain, compiled, shards = map(read_scores, runs)
    assert compiled.equals(shards)
    for name in ("base_loss", "counterpart_loss", "score"):
        np.testing.assert_allclose(plain[name], compiled[name], atol=1e-5)
    assert ["compile" in identity(run.spec)["score"] for run in runs] == [False, True, True]
    assert runs[0].resolved.fingerprint != runs[1].resolved.fingerprint


def test_a_calibration_holds_for_the_whole_run(small, tmp_path):
    """It is not the spec's and no damage; shards that were scored in another way are scored anew."""
    run = work_off(freeze(small.spec(tmp_path / "run")))
    before = read_scores(run)
    assert "difference" == run.way
    run.commit_measured(CALIBRATION, {"way": "gradient", "why": "measured"})
    run = open_run(run.uri())
    assert "gradient" == run.way
    assert all("in another way" in each.what or "other counterparts" in each.what for each in audit(run).damage)
    assert len(run.shards) == len(audit(run).damage)
    run = work_off(run)
    assert [] == audit(run).damage
    after = read_scores(run)
    assert not before.equals(after)
    np.testing.assert_allclose(before["base_loss"], after["base_loss"], atol=1e-6)


def test_the_first_calibration_stands(small, tmp_path):
    """Whoever comes later finds it; one that is damaged is refused by name."""
    run = freeze(small.spec(tmp_path / "run"))
    assert run.measured(CALIBRATION) is None
    for way in ("gradient", "difference"):
        run.commit_measured(CALIBRATION, {"way": way, "why": "measured"})
    assert "gradient" == run.way
    Path(run.uri("calibration.json")).write_text(json.dumps({"way": "guess"}))
    with pytest.raises(ArtifactError, match=r"calibration\.json is damaged"):
        _ = run.way


def test_a_way_that_the_model_does_not_bear_is_refused(make_spec):
    """What is asked for is done or refused, never quietly something else."""
    train = "producer={name: unlearn, steps: 1, mode: train, optimizer: adam}"
    model = "model={factory: 'tests.integration.test_ways:normed'}"
    with pytest.raises(
        ContractError, match=r"does not bear way gradient: (.|\n)*way difference asks nothing of a model"
    ):
        run_without_ray(make_spec(train, model, "score.way=gradient"))


def normed():
    """In train mode its statistics move, of which there is no derivative."""
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.ray
def test_many_queries_are_calibrated_by_a_worker(ray_cluster, make_spec, tmp_path, world, capsys):
    """From 16 queries on; it is said, kept, and another start finds it."""
    queries = tmp_path / "queries.parquet"
    pq.write_table(pq.read_table(world.folder / "corpus.parquet").slice(0, MANY), queries)
    spec = tuned(make_spec(f"queries={{uri: '{queries}', query_id: id}}", "resources.score.actors=1"))
    run = attribute(spec)
    found = run.measured(CALIBRATION)
    assert MANY == found["queries"]
    assert run.way == found["way"]
    assert f"score by {found['way']}: {found['why']}" in capsys.readouterr().err
    for folder in ("commits", "scores"):
        remove_folder(run.uri(folder))
    Path(run.uri("_SUCCESS")).unlink()
    before = Path(run.uri("calibration.json")).read_bytes()
    attribute(spec)
    assert before == Path(run.uri("calibration.json")).read_bytes()
    assert "score by" not in capsys.readouterr().err
