"""`make demo-s3` as a process: what it shows, what it leaves running, and that it stops when told to."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import digits

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What `python -m jobs.digits` writes."""
    folder = tmp_path_factory.mktemp("demo")
    digits.write_demo(folder)
    return folder


def start(data, temp):
    """The demo, with all that it starts marked by its folder of temporary files."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "RAY_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.demo_s3", str(data)],
        cwd=ROOT,
        env={**env, "TMPDIR": str(temp)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left(temp):
    """Command lines of living processes that belong to a demo, by the folder in their arguments or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state = (process / "status").read_text().split("State:\t")[1][0]
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except (OSError, IndexError):  # gone meanwhile, or somebody else's
            continue
        if str(temp).encode() in words and state != "Z":
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def require_nothing_left(temp):
    """No process of the demo lives on, and none of its files."""
    deadline_s = time.monotonic() + 30
    while (living := left(temp)) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert [] == living
    assert [] == list(temp.iterdir())


@pytest.fixture
def temp():
    """A folder for temporary files with a short name: Ray's sockets lie in it."""
    folder = Path(f"/tmp/demo-{os.getpid()}-{time.monotonic_ns() % 10**6}")
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_the_demo_on_s3_runs_and_stops_what_it_started(data, temp):
    """Server, cluster, job, its log, two engines of one mind; then no process and no file is left."""
    process = start(data, temp)
    output, _ = process.communicate(timeout=1500)
    assert 0 == process.returncode, output
    for said in (
        "ray job submit",
        "s3://lake/digits/run",
        "froze 1,437 training examples",
        "SUCCEEDED",
    ):
        assert said in output
    assert re.search(r"score (\d+)/\1 shards  100%", output)
    tables = [output.split(f"{engine}: ")[1].split("└")[0] for engine in ("DuckDB", "Polars")]
    answers = [re.findall(r"│ (\S+) +│ (digit-\d+) +│ (\S+) +│ 1,437", table) for table in tables]
    assert 8 == len(answers[0])
    assert answers[0] == answers[1]
    require_nothing_left(temp)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_demo_that_is_stopped_stops_what_it_started(data, temp, number):
    """While the cluster starts; even SIGKILL leaves no process behind."""
    process = start(data, temp)
    try:
        while "S3 at" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(3)
        assert [] != [line for line in left(temp) if "weed mini" in line]
        process.send_signal(number)
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    if number != signal.SIGKILL:
        assert (130, True) == (process.returncode, "stopped, with everything" in output), output
        require_nothing_left(temp)
    deadline_s = time.monotonic() + 60
    while left(temp) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    assert [] == left(temp)
