"""A run's noise floor: sums that merge exactly, what is measured where, and what is said of it."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.batches import Arrays, Ragged, Sequences
from pipeline.engine import LossEngine
from pipeline.noise import Floor, batches_of, is_measured, limit, lines, mean_of, measured_examples, noise_of
from pipeline.works import Receipt, parse_receipt


def receipt(noise: Any, shard_id: int = 0) -> Receipt:
    return Receipt(0, shard_id, "f", 1, 0, {}, 0.0, 0.0, 0.0, 1, "signed", noise=noise)


def ranked(**scores: Any) -> pa.Table:
    rows = [(q, side, s) for q, sides in scores.items() for side, some in sides.items() for s in some]
    return pa.table(dict(zip(("query_id", "side", "score"), map(list, zip(*rows, strict=True)), strict=True)))


def run(dtype: str = "bfloat16", way: str = "difference", per_token: bool = False, lora_rank: int = 0) -> Any:
    spec = SimpleNamespace(model=SimpleNamespace(dtype=dtype), producer=SimpleNamespace(lora_rank=lora_rank))
    return SimpleNamespace(spec=spec, way=way, per_token=per_token)


def test_shards_0_1_4_16_are_measured():
    """Few of many."""
    assert [0, 1, 4, 16, 64, 256] == [shard for shard in range(1000) if is_measured(shard)]


@pytest.mark.parametrize(
    ("examples", "at_most", "expected"),
    [(1, 16, 1), (8, 16, 8), (24, 16, 8), (100, 16, 13), (4096, 16, 16), (99, 3, 3)],
)
def test_an_eighth_of_a_shard_is_measured(examples, at_most, expected):
    """At least eight examples if there are, at most so many; spread evenly, from the first to the last."""
    found = measured_examples(examples, at_most)
    assert expected == len(found) == len(set(found.tolist()))
    assert 0 == found[0]
    assert expected == 1 or examples - 1 == found[-1]


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=6), st.randoms())
def test_merging_over_shards_is_exact(errors, draw):
    """In any order, in any parts: the same to the bit, and the root mean square of all."""
    receipts = [receipt(noise_of(["q"], np.array([each])), i) for i, each in enumerate(errors)]
    shuffled = draw.sample(receipts, len(receipts))
    whole, parts = Floor(), Floor()
    whole.add(receipts)
    for each in shuffled:
        parts.add([each])
    assert whole.of("q") == parts.of("q")
    everything = list(itertools.chain(*errors))
    assert math.sqrt(sum(e * e for e in everything) / len(everything)) == pytest.approx(whole.of("q"), rel=1e-12)


def test_a_query_that_was_not_measured_has_the_noise_of_those_that_were():
    """All of theirs together; without any there is nothing to say."""
    floor = Floor()
    assert floor.of("q") is None
    assert floor.judged(ranked(q={"proponent": [1.0]}), 1) is None
    floor.add([receipt({"a": {"examples": 1, "squares": 1.0}, "b": {"examples": 3, "squares": 27.0}})])
    assert [1.0, 3.0, math.sqrt(7)] == [floor.of(q) for q in "abq"]


def test_losses_that_are_not_finite_are_no_noise():
    """Their rows are rejected; a query with none left is not measured."""
    assert {"a": {"examples": 2, "squares": 5.0}} == noise_of(
        "ab", np.array([[1, np.nan, 2], [np.inf, np.nan, np.nan]])
    )


def test_the_noise_of_a_mean_is_that_of_independent_members():
    """Squares of the shares; only of queries that all members measured."""
    noises: Any = [{"q": {"examples": 4, "squares": 16.0}, "r": {"examples": 4, "squares": 1.0}}]
    noises.append({"q": {"examples": 2, "squares": 32.0}})
    shares = {"q": np.array([0.25, 0.75]), "r": np.array([0.5, 0.5])}
    assert {"q": {"examples": 2, "squares": 2 * (4 / 16 + 16 * 9 / 16)}} == mean_of(noises, shares)


def test_more_examples_reach_further_by_noise_alone():
    """Of a million draws the largest is below the limit 19 times in 20, of one draw too."""
    assert [1.96, 3.08, 5.45] == [round(limit(examples), 2) for examples in (1, 24, 10**6)]
    draws = np.random.default_rng(0).normal(size=(2000, 100))
    assert 0.05 == pytest.approx((np.abs(draws).max(axis=1) > limit(100)).mean(), abs=0.015)


def test_scores_are_judged_by_their_size_on_each_side():
    """Above what noise reaches among 24, strictly; values after a transform have no part in it."""
    floor = Floor()
    floor.add([receipt({"q": {"examples": 1, "squares": 1.0}})])
    found = floor.judged(ranked(q={"proponent": [9.0, 3.2, 3.1, -4.0], "opponent": [-3.5, 0.0]}), 24)
    sides = {"proponent": {"listed": 4, "above": 3}, "opponent": {"listed": 2, "above": 1}}
    assert {"times": 3.1, "measured": 1, "queries": {"q": {"noise": 1.0, **sides}}} == found


def test_what_is_said_has_figures_and_what_helps():
    """The line, the queries with most within the noise first, no more than three by name, and remedies that fit the run."""
    floor = Floor()
    floor.add([receipt({q: {"examples": 1, "squares": 0.01} for q in "abcde"})])
    ranking = {
        "noise": floor.judged(
            ranked(**{q: {"proponent": [1.0] * i + [0.2] * (4 - i)} for i, q in enumerate("abcde")}), 24
        )
    }
    said = lines(run(), ranking)
    assert "rounding in bfloat16 moves scores by 0.1 nats: 10 of 20 proponents are above 3.1 times that" == said[0]
    assert "warning: 4 of 4 proponents of query a are within the noise of bfloat16 (3.1 x 0.1 nats)" == said[1]
    assert ["query b", "query c"] == [line.split(" of ")[2].split(" are")[0] for line in said[2:4]]
    assert "warning: so are some of 1 more of 5 queries" == said[4]
    helps = "model.dtype: float32, or adapters (producer.lora_rank) with score.way: gradient"
    assert f"what helps: {helps}, or a longer step of the producer" == said[5]
    assert "what helps: model.dtype: float32, or score.way: gradient, or a" in lines(run(lora_rank=4), ranking)[-1]
    assert 1 == len(lines(run(), ranking, "e"))
    assert "nats per token: 1 of 4" in lines(run(per_token=True), ranking, "b")[0]
    assert "what helps: a longer step of the producer" == lines(run("float64", "gradient"), ranking)[-1]


def test_older_runs_say_nothing():
    """Neither their rankings nor their receipts have noise."""
    assert [] == lines(run(), {"k": 3})
    assert [] == lines(run(), {"noise": None})
    tree = receipt({}).to_json()
    tree.pop("noise")
    assert receipt({}) == parse_receipt(tree)
    found = receipt({"q": {"examples": 2, "squares": 0.5}})
    assert found == parse_receipt(found.to_json())


def test_items_that_are_measured_go_in_batches_no_larger_than_before():
    """Each once, under its own number; windows of a text come together."""
    sequences = Sequences(
        {"ids": Ragged.of([[1] * n for n in (9, 3, 5, 2, 7)], 0)}, np.array([0, 0, 1, 2, 2]), np.ones(5), True
    )
    item_M = sequences.items_of(np.array([0, 2]))
    assert [0, 1, 3, 4] == item_M.tolist()
    batches = list(batches_of(sequences, sequences.batches(0, 9), item_M))
    assert [0, 1, 3, 4] == sorted(np.concatenate([batch.item_B for batch in batches]).tolist())
    assert all(batch.arrays["ids"].size <= 9 for batch in batches)
    for batch in batches:
        assert [len(row[row > 0]) for row in batch.arrays["ids"]] == [[9, 3, 5, 2, 7][item] for item in batch.item_B]


class Sum:
    """Loss: what a linear model says."""

    def loss_B(self, model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(batch["x"]).sum(dim=1)
        return out if out.dtype == torch.float64 else out.float()


def test_a_finer_engine_knows_what_rounding_took_away():
    """Half precision loses a small step where float32 has it; the engine it was made of stays as it was; float64 has none."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).to(torch.bfloat16)
    changes = [{"bias": model.bias.detach() * 1.02}, {"weight": model.weight.detach() * 2}]
    engine = LossEngine(model, Sum(), changes)
    batches = list(Arrays({"x": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}).batches(8))
    before = engine.losses(batches)
    finer = engine.finer([1, 0])
    assert finer is not None
    found = finer.losses(batches)
    expected = float((changes[0]["bias"].float() - model.bias.detach().float()).sum())
    np.testing.assert_allclose([expected] * 8, found.difference_QN[1], atol=1e-6)
    assert np.abs(before.difference_QN[0] - expected).max() > 1e-4
    np.testing.assert_array_equal(before.counterpart_QN, engine.losses(batches).counterpart_QN)
    assert torch.bfloat16 == model.weight.dtype
    assert LossEngine(nn.Linear(4, 2).double(), Sum(), []).finer([]) is None


def test_a_finer_engine_asks_for_memory_first(monkeypatch):
    """What does not fit is not tried."""
    engine = LossEngine(nn.Linear(4, 2), Sum(), [])
    monkeypatch.setattr(LossEngine, "free_bytes", 100)
    with pytest.raises(MemoryError, match=r"it takes .* GiB"):
        engine.finer([])
