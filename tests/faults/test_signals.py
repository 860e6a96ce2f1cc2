"""SIGTERM and Ctrl-C in every stage: the exit code, one sentence, soon, and no process is left."""

import shlex
import signal
import time

import pytest

from jobs.seaweed import upload
from pipeline.run import finish
from pipeline.specfile import parse_spec
from tests.conftest import run_without_ray, tuned
from tests.faults.driver import Driver
from tests.faults.proxy import in_front_of
from tests.faults.waiting import begun, let_go, waiting_producer, waiting_task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

ENDS_WITHIN_S = 10.0
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
SMALL = ("score.shard_rows=64", "resources.score={actors: 1}")


def stop(driver, number, times=1, group=False):
    """Send a signal, again soon if so often; seconds until all that the command started has ended, as it should."""
    stopped_s = driver.signal(number, group)
    for _ in range(times - 1):
        time.sleep(0.1)
        if driver.children():
            driver.signal(number, group)
    code = driver.wait(12 * ENDS_WITHIN_S)
    left = driver.left(ENDS_WITHIN_S)
    seconds = time.time() - stopped_s
    assert CODES[number] == code, driver.output
    assert f"the same command goes on from there:\n  {shlex.join(driver.words)}\n" in driver.output
    assert "Traceback" not in driver.output
    assert [] == left
    return seconds  # the table of faults shows it; a bound of it here would test how busy the machine is


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("tune", signal.SIGTERM),
        ("score", signal.SIGINT),
        pytest.param("tune", signal.SIGINT, marks=pytest.mark.night),
        pytest.param("score", signal.SIGTERM, marks=pytest.mark.night),
    ],
)
def test_a_signal_while_workers_work_ends_them_too(stage, number, make_spec, tmp_path, undisturbed, ledger):
    """SIGTERM to the command alone, or Ctrl-C twice, which a terminal sends to all of its processes. It goes on after that."""
    spec = make_spec(*SMALL, waiting_producer(tmp_path) if stage == "tune" else waiting_task(tmp_path))
    if stage == "score":
        tuned(spec)
    twice = number == signal.SIGINT
    with Driver(tmp_path, spec.model_dump(mode="json")) as driver:
        driver.until(lambda: begun(tmp_path, stage))
        seconds = stop(driver, number, times=2 if twice else 1, group=twice)
    assert not list((tmp_path / "run").glob(".train-*")), "Ray Train's folder is left"
    let_go(tmp_path)
    run = run_without_ray(spec)
    finish(run)
    ledger.enter(f"{'Ctrl-C twice' if twice else 'SIGTERM'} in stage {stage}", 2, seconds, run, undisturbed)


def test_a_signal_ends_a_calibration(make_spec, tmp_path):
    """`plan --calibrate` scores a batch in the command's own process."""
    tree = make_spec(*SMALL, waiting_task(tmp_path)).model_dump(mode="json")
    for number in CODES:
        with Driver(tmp_path, tree, command=("-m", "jobs.cli", "plan", "--calibrate")) as driver:
            driver.until(lambda: begun(tmp_path, "score"))
            stop(driver, number)
        (tmp_path / "score begun").unlink()


def test_a_signal_while_the_command_writes_ends_it(s3, world, tmp_path, undisturbed, ledger):
    """In the stages that it does itself, freeze, rank and report, and while a store keeps it waiting."""
    prefix = s3.prefix("signals")
    tree = world.tree(f"{prefix}/run")
    tree["corpus"]["uri"] = upload(world.corpus, f"{prefix}/corpus.parquet")
    tree["resources"] = {"score": {"actors": 1}}
    seconds = {}
    with in_front_of(s3.endpoint) as proxy:
        for stage, path in (("freeze", "/run/run.yaml"), ("rank", "/run/topk/"), ("report", "/run/report/")):
            if stage == "rank":
                run = run_without_ray(parse_spec(tree))
            for number in CODES:
                proxy.clear()
                proxy.add("hang", method="PUT", path=path)
                with Driver(tmp_path, tree, AWS_ENDPOINT_URL=proxy.endpoint) as driver:
                    driver.until(lambda: proxy.done["hang"])
                    seconds[stage] = max(seconds.get(stage, 0.0), stop(driver, number))
    finish(run)
    for stage, longest_s in seconds.items():
        ledger.enter(f"SIGTERM, then Ctrl-C, in stage {stage}", 3, longest_s, run, undisturbed)


def test_a_signal_while_ray_starts_ends_what_there_is_of_it(make_spec, tmp_path):
    """Ray's own handler, which exits with 15, is never in place."""
    with Driver(tmp_path, tuned(make_spec(*SMALL)).model_dump(mode="json")) as driver:
        driver.until(lambda: driver.children("gcs_server"))
        stop(driver, signal.SIGTERM)
