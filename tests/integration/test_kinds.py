"""Whole runs of models of all kinds: refused before any work, or scored alike whatever the layout."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch

from pipeline.errors import ContractError
from pipeline.freeze import freeze
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from pipeline.tuner import Tuner
from tests.conftest import read_scores, run_without_ray
from tests.kinds import REFUSED, SCORED, Centred, Noisy, rotary
from tests.language import VOCABULARY, saved, spec_tree
from tests.small import Small


@pytest.fixture
def small(tmp_path):
    (tmp_path / "world").mkdir()
    return Small(tmp_path / "world")


def of_kind(kind):
    return f"model={{factory: 'tests.kinds:{kind.__name__}'}}"


@pytest.mark.parametrize(
    "kind", [kind for kind in REFUSED if kind.__name__ != "Placed"], ids=lambda kind: kind.__name__
)
def test_a_model_is_refused_before_it_is_tuned(small, tmp_path, kind):
    """Nothing is committed; the message says what the model does."""
    run = freeze(small.spec(tmp_path / "run", of_kind(kind)))
    with pytest.raises(ContractError, match=REFUSED[kind]):
        Tuner(run, "cpu")
    assert not run.committed_queries()


@pytest.mark.parametrize("kind", [Noisy, Centred])
def test_a_model_that_was_not_tuned_is_refused_before_it_is_scored(small, tmp_path, kind):
    """Weights that are given as counterparts need no query: the scoring worker looks at its first rows."""
    weights = tmp_path / "other.safetensors"
    safetensors.torch.save_file({name: each + 1 for name, each in kind().state_dict().items()}, weights)
    given = f"producer={{name: reference, weights_uri: {weights}}}"
    run = freeze(small.spec(tmp_path / "run", of_kind(kind), given, "queries=null"))
    tuner = Tuner(run, "cpu")
    for query_id in run.query_ids:
        tuner.tune(query_id)
    scorer = ShardScorer(run, "cpu")
    with pytest.raises(ContractError, match=REFUSED[kind]):
        scorer.score(next(run.works()))
    assert not run.committed()


def layouts(spec_of, *overrides):
    """Scores of runs that differ in nothing but the layout."""
    return [read_scores(run_without_ray(spec_of(*layout, *overrides))) for layout in LAYOUTS]


LAYOUTS = (
    ("score.shard_rows=13", "score.batch_rows=7"),
    ("score.shard_rows=1", "score.batch_rows=1"),
    ("score.shard_rows=5", "score.batch_rows=4"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCORED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", ["difference", "gradient"])
def test_scores_do_not_depend_on_the_layout(small, tmp_path, kind, way):
    """To 1e-5: shards and batches of any size."""

    def spec(*overrides):
        return small.spec(tmp_path / "-".join(overrides[:2]), of_kind(kind), *overrides)

    found = layouts(spec, f"score.way={way}")
    for name in ("base_loss", "counterpart_loss", "score"):
        for other in found[1:]:
            np.testing.assert_allclose(found[0][name], other[name], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "producer",
    [
        "{name: finetune, steps: 1}",
        "{name: natural, curvature: gauss_newton, sample_rows: 12, damping: 0.1, step: 0.01, iterations: 60, tolerance: 1.0e-6}",
    ],
)
@pytest.mark.parametrize("rope", ["longrope", pytest.param("dynamic", marks=pytest.mark.night)])
def test_texts_on_both_sides_of_a_length_score_alike_in_any_batch(tmp_path, rope, producer):
    """Rotary embeddings that switch at 12 tokens: base losses to 1e-5, counterparts and scores as closely as those are solved."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCABULARY, n).tolist() for n in (3, 11, 12, 13, 14, 30, 9, 25, 13, 12, 40, 5)]
    pq.write_table(pa.table({"id": [f"t{i:02d}" for i in range(12)], "tokens": rows}), tmp_path / "corpus.parquet")
    pq.write_table(
        pa.table({"query_id": ["long", "short"], "tokens": [rows[5], rows[6]]}), tmp_path / "queries.parquet"
    )

    def scored(name, *overrides):
        model = {"factory": "tests.kinds:rotary", "arguments": {"kind": rope}}
        tree = spec_tree(tmp_path, tmp_path / name) | {
            "task": {"name": "causal_lm", "tokens": "tokens", "max_tokens": 48}
        }
        tree["model"] = model
        fields = (f"producer={producer}", "score.noise_rows=0", *overrides)
        run = run_without_ray(parse_spec(tree, fields))
        columns = ["example_id", "base_loss_per_token", "counterpart_loss_per_token", "score"]
        tables = [pq.read_table(run.uri("scores", f"query_id={each}"), columns=columns) for each in run.query_ids]
        return pa.concat_tables(table.sort_by("example_id") for table in tables)

    first = scored("one", "score.shard_rows=1")
    # in batches of other tokens `natural` is solved otherwise too, and its solve makes more of their rounding
    solved = 2e-3 * np.abs(first["score"]).max() if "natural" in producer else 1e-5
    for other, tolerance in (
        (scored("all", "score.shard_rows=12", "score.batch_tokens=4096"), solved),
        (scored("some", "score.shard_rows=5", "score.batch_tokens=64"), 1e-5),
    ):
        for name in first.column_names[1:]:
            np.testing.assert_allclose(first[name], other[name], atol=1e-5 if name.startswith("base") else tolerance)


def test_a_query_whose_rows_must_not_be_padded_together_is_refused(tmp_path):
    """A producer takes its rows as one batch; rows of one length are taken."""
    saved(rotary("longrope"), tmp_path / "model")
    rows = [[1, 2, 3] * 3, [4, 5, 6] * 9]
    pq.write_table(pa.table({"id": ["a", "b"], "tokens": rows}), tmp_path / "corpus.parquet")
    tree = spec_tree(tmp_path, tmp_path / "run") | {"task": {"name": "causal_lm", "tokens": "tokens"}}
    for number, (queries, refused) in enumerate((([rows[0], rows[1]], True), ([rows[1], rows[1][::-1]], False))):
        pq.write_table(pa.table({"query_id": ["q", "q"], "tokens": queries}), tmp_path / "queries.parquet")
        run = freeze(parse_spec(tree, (f"run.uri={tmp_path / str(number)}",)))
        if refused:
            with pytest.raises(ContractError, match="query 'q': the model gives its shorter rows other losses"):
                Tuner(run, "cpu")
        else:
            Tuner(run, "cpu").tune("q")
