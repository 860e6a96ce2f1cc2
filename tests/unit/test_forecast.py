"""What is predicted of a run: it follows from what was measured, by rules that can be done by hand."""

from dataclasses import replace

import pytest

from pipeline.forecast import Compiling, Span, Timing, Workers, busy_s, forecast, lines
from pipeline.plan import Plan

PLAN = Plan(rows=1000, files=1, shards=10, queries=4, query_rows=4, forward_passes=5000, objects=1, score_bytes=1)
TIMING = Timing(
    tune_once_s=10,
    tune_query_s=2,
    rows=100,
    read_s=1,
    write_s=0.5,
    base_s=2,
    way_s={"difference": 10.0, "gradient": 6.0},
    way="gradient",
    why="measured",
    held="4 at once",
)
CPUS = Workers(
    tuners=2, together=False, actors=4, assumed=False, tune_unit="CPU", tune_units=1, score_unit="CPU", score_units=2
)
GPUS = replace(CPUS, score_unit="GPU", score_units=0.5)


def test_tuners_share_out_queries_or_the_whole_work():
    """Two workers, four queries: each makes two and does by itself what serves all; or they share that, too."""
    assert 10 + 2 * 2 == forecast("f", PLAN, TIMING, CPUS).tune_s
    assert (10 + 4 * 2) / 2 == forecast("f", PLAN, TIMING, replace(CPUS, together=True)).tune_s
    assert 10 + 2 * 2 == forecast("f", replace(PLAN, queries=3), TIMING, CPUS).tune_s, "the second has one more to make"


def test_on_a_cpu_reading_and_writing_add_up_and_on_a_gpu_they_hide():
    """A shard: 6 s of computing, 1 s of reading, half a second of writing for each of four queries."""
    assert {"difference": 10 * 13, "gradient": 10 * 9} == forecast("f", PLAN, TIMING, CPUS).work_s
    assert {"difference": 10 * 10, "gradient": 10 * 6} == forecast("f", PLAN, TIMING, GPUS).work_s
    waits = replace(TIMING, read_s=20)
    assert {"difference": 10 * 22, "gradient": 10 * 22} == forecast("f", PLAN, waits, GPUS).work_s


def test_the_last_shards_keep_some_actors_waiting():
    """Ten shards on four actors take three rounds, on ten one; members one after another."""
    assert 3 * 9 == pytest.approx(forecast("f", PLAN, TIMING, CPUS).score_s)
    assert 9 == pytest.approx(forecast("f", PLAN, TIMING, replace(CPUS, actors=10)).score_s)
    assert 3 * 27 == pytest.approx(forecast("f", replace(PLAN, members=3), TIMING, CPUS).score_s)


def test_kept_base_losses_are_left_out_where_losses_are_compared():
    """Half of the rows' base losses are kept: half of the base's pass is left out; a derivative has no use for them."""
    found = forecast("f", replace(PLAN, kept=500), TIMING, CPUS)
    assert {"difference": 10 * 12, "gradient": 10 * 9} == found.work_s


def test_cost_is_of_what_is_paid_for():
    """Work, not waiting: 90 s of an actor of 2 CPUs for 1,000 rows; 60 s of half a GPU."""
    on_cpus, on_gpus = (forecast("f", PLAN, TIMING, workers) for workers in (CPUS, GPUS))
    assert (180, 180_000) == (on_cpus.score_cost_s, on_cpus.million_s)
    assert (30, 30_000) == (on_gpus.score_cost_s, on_gpus.million_s)
    assert "3.5 CPU-minutes for the run" in lines(on_cpus)["predicted cost"]
    assert "8.3 GPU-hours per million" in lines(on_gpus)["predicted cost"]
    assert "28 CPU-seconds and 30 GPU-seconds for the run" in lines(on_gpus)["predicted cost"]


def test_compiling_pays_if_it_saves_more_than_it_takes():
    """For people."""
    found = forecast("f", PLAN, TIMING, CPUS)
    assert "torch.compile" not in lines(found)
    for saved_s, said in ((30, "would pay"), (5, "would not pay"), (-5, "would not pay")):
        line = lines(replace(found, compiling=Compiling(first_s=12, times=1.25, saved_s=saved_s)))["torch.compile"]
        assert said in line
    assert line.endswith("batches are 1.25 times as fast, which saves nothing, after 12 s for the first")


def test_a_pause_between_two_starts_is_not_work():
    """Two shards at once and one after a pause, in whatever order they were read."""
    assert 5 + 2 == busy_s([Span(20, 22, 1), Span(0, 4, 1), Span(2, 5, 1)])
    assert 0 == busy_s([])
