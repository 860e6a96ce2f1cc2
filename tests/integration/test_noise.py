"""The noise floor through whole runs: measured while scoring, judged when ranking, said with what helps."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

from jobs.display import show_run, show_status
from pipeline.extend import extend
from pipeline.folder import json_bytes
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.run import finish, rerank
from pipeline.specfile import parse_spec
from tests.conftest import read_scores, run_without_ray
from tests.language import gpt, saved, sentences, spec_tree
from tests.small import Small, linear, work_off

pytestmark = pytest.mark.slow  # whole runs of language models
TEXTS = sentences(24)
STEP = "producer={name: unlearn, optimizer: adam, normalize: false, max_loss_change: 0, lora_rank: 4, steps: 1, lr: 1.0e-5}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model, a corpus and a query."""
    made = tmp_path_factory.mktemp("noise")
    saved(gpt(), made / "model")
    pq.write_table(pa.table({"id": [f"text-{i}" for i in range(24)], "text": TEXTS}), made / "corpus.parquet")
    pq.write_table(pa.table({"query_id": ["q"], "text": TEXTS[:1]}), made / "queries.parquet")
    return made


@pytest.fixture
def done(folder, tmp_path):
    """`done("path=value", ...)`: a finished run over it by a tiny step of adapters."""

    def do(*overrides, name="run"):
        run = run_without_ray(parse_spec(spec_tree(folder, tmp_path / name), [STEP, *overrides]))
        finish(run)
        return run

    return do


@pytest.fixture
def small(tmp_path):
    (tmp_path / "world").mkdir()
    return Small(tmp_path / "world")


def noise(run):
    return {receipt.name: receipt.noise for receipt in run.receipts()}


def test_a_tiny_step_is_noise_in_bfloat16_and_none_in_float32(done, capsys):
    """Said in the command's output, on the page and by status, with figures and what helps; and that helps."""
    coarse = done("model.dtype=bfloat16")
    found = coarse.ranking()["noise"]["queries"]["q"]
    assert {"listed": 5, "above": 0} == found["proponent"] == found["opponent"]
    show_run(coarse)
    shown = capsys.readouterr().out
    assert "rounding in bfloat16 moves scores by " in shown
    assert (
        "warning: 5 of 5 proponents and 5 of 5 opponents of query q are within the noise of bfloat16 (3.1 x " in shown
    )
    assert "what helps: model.dtype: float32, or score.way: gradient" in shown
    assert "5 of 5 opponents of query q are within" in Path(coarse.uri("report", "index.html")).read_text()
    show_status(coarse)
    assert "0 of 5 proponents and 0 of 5 opponents are above 3.1 times that" in capsys.readouterr().out
    for i, helps in enumerate(("model.dtype=float32", "score.way=gradient")):
        fine = done(helps, *(["model.dtype=bfloat16"] if i else []), name=f"helped-{i}")
        sides = fine.ranking()["noise"]["queries"]["q"]
        assert {"listed": 5, "above": 5} == sides["proponent"] == sides["opponent"], helps
        show_run(fine)
        assert "warning" not in capsys.readouterr().out


def test_the_noise_is_what_float32_says_of_the_same_adapters(done):
    """Measured on a part of three shards: the order of magnitude of the scores' distance from float32's of the same weights."""
    total = "task.reduction=sum"
    coarse, fine = done(total, "model.dtype=bfloat16"), done(total, name="fine")
    scores = [np.asarray(read_scores(run)["score"]) for run in (coarse, fine)]
    distance = float(np.sqrt(np.square(scores[0] - scores[1]).mean()))
    assert distance / 5 < coarse.ranking()["noise"]["queries"]["q"]["noise"] < 5 * distance


@pytest.mark.parametrize("way", ["difference", "gradient", "jvp"])
def test_a_shard_that_is_done_again_measures_the_same(small, tmp_path, way):
    """Which rows, and what they give, is a function of the shard."""
    run = work_off(freeze(small.spec(tmp_path / "run", f"score.way={way}")))
    before = noise(run)
    assert [True, True, False, False] == [bool(each) for each in before.values()]
    run.void([f"commits/{name}.json" for name in before])
    assert before == noise(work_off(run))


def test_rows_that_are_rejected_are_no_part_of_it(small, tmp_path):
    """Row 6 is; a query that is added later has noise of its own, on the shards of before."""
    run = work_off(freeze(small.spec(tmp_path / "run", "score.shard_rows=8")))
    assert [7, 5] == [each["red"]["examples"] for each in noise(run).values()]
    run = work_off(extend(run.uri(), small.later[0], None))
    assert {"red", "green", "blue"} == set(run.ranking()["noise"]["queries"])
    assert [{"blue"}, {"blue"}] == [set(each) for name, each in noise(run).items() if "addition" in name]


def test_it_can_be_left_out_and_moves_no_score(small, tmp_path):
    """Nothing is measured, nothing is said, and the run's identity is the same."""
    runs = [work_off(freeze(small.spec(tmp_path / str(rows), f"score.noise_rows={rows}"))) for rows in (0, 16)]
    assert [False, True] == [any(noise(run).values()) for run in runs]
    assert [True, False] == [run.ranking()["noise"] is None for run in runs]
    assert runs[0].resolved.fingerprint == runs[1].resolved.fingerprint
    assert read_scores(runs[0]).equals(read_scores(runs[1]))


def test_commits_of_before_are_ranked_without_a_word(small, tmp_path, capsys):
    """Ranking again is as it was; commits that have it are ranked with it."""
    run = work_off(freeze(small.spec(tmp_path / "run")))
    said = run.ranking()["noise"]
    for path in Path(run.uri("commits")).iterdir():
        tree = json.loads(path.read_text())
        del tree["noise"], tree["sha256"]
        path.write_bytes(json_bytes(tree))
    again = rerank(run.uri(), ["rank.transform=relative"])
    assert said is not None
    assert again.ranking()["noise"] is None
    show_run(open_run(run.uri()))
    assert "rounding" not in capsys.readouterr().out


def test_a_mean_of_models_has_less_noise_than_they(small, tmp_path):
    """By the members' shares; ranked and shown as any run's."""
    run = work_off(freeze(small.spec(tmp_path / "run", small.ensemble())))
    ours = run.ranking()["noise"]["queries"]["red"]["noise"]
    members = [member.ranking()["noise"]["queries"]["red"]["noise"] for member in run.members]
    assert np.sqrt(np.square(members).sum()) / 3 == pytest.approx(ours)


class InOnePrecision(nn.Module):
    """Its code knows float32 alone."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = linear().weight, linear().bias

    def forward(self, features):
        return nn.functional.linear(features.float(), self.weight, self.bias)


def test_a_model_of_one_precision_is_scored_without(small, tmp_path, capsys):
    """It is said why, and nothing else changes."""
    model = "model.factory=tests.integration.test_noise:InOnePrecision"
    run = work_off(freeze(small.spec(tmp_path / "run", model)))
    assert not any(noise(run).values())
    assert "rounding noise is not measured (score.noise_rows): " in capsys.readouterr().err
    assert 13 - 1 == run.ranking()["examples"]


def test_gradients_of_whole_weights_are_measured_in_float64(done):
    """The output layer's too, which is computed for tokens that count alone."""
    run = done("score.way=gradient", "producer.lora_rank=0")
    found = run.ranking()["noise"]["queries"]["q"]
    assert 0 < found["noise"] < 1e-5
    assert {"listed": 5, "above": 5} == found["proponent"]
