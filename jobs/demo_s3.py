"""The demo as it runs in production, on one machine: data and run on S3, the main job submitted to a Ray cluster.

`python -m jobs.demo_s3 FOLDER` takes what `python -m jobs.digits FOLDER` wrote. It starts an S3 server and a Ray cluster of its
own, submits `python -m jobs.attribute` over the Jobs API, follows its log, queries the scores with DuckDB and with Polars, and
stops what it started, also when it is interrupted. Keys, and the token without which the cluster answers nobody, are in the
environment of its processes and nowhere else.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import embedded

from .seaweed import BUCKET, Server, free_ports, held, release, upload

if TYPE_CHECKING:
    import polars
    import pyarrow as pa
    from ray.job_submission import JobSubmissionClient

SPEC = "jobs/specs/digits.yaml"
PREFIX = f"s3://{BUCKET}/digits"
DATA = ("train.parquet", "queries.parquet", "cnn.safetensors")
CLUSTER_START_S = 90.0
STORE_BYTES = 200 << 20
"""Ray's object store: only receipts pass through it."""
LEFT_OUT = [".git", ".venv", "build", "runs", "tests", "*.egg-info", ".hypothesis", ".*_cache"]
"""What the job's copy of this folder does not need."""
PORTS = (
    "port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port",
    "node-manager-port", "object-manager-port", "runtime-env-agent-port", "ray-client-server-port",
)  # fmt: skip


@contextmanager
def store() -> Iterator[Server]:
    """An S3 server for the time of the block; its keys and endpoint are in this process's environment."""
    server = Server()
    try:
        server.start()
        os.environ.update(server.environment)
        yield server
    finally:
        server.remove()


@contextmanager
def cluster(environment: Mapping[str, str]) -> Iterator[JobSubmissionClient]:
    """A one-node Ray cluster with a token, as `ray start --head` makes it, for the time of the block: its Jobs API.

    Args:
        environment: Of its processes, jobs included.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets lie in it
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    bin_folder = Path(sys.executable).parent
    flags = {
        **ports, "temp-dir": folder, "dashboard-host": "127.0.0.1", "node-ip-address": "127.0.0.1",
        "num-cpus": (os.cpu_count() or 1) + 1, "object-store-memory": STORE_BYTES,
        "min-worker-port": 0, "max-worker-port": 0,  # any that is free
    }  # fmt: skip
    with embedded.token_environment():  # with a token of its own, which this process has too
        process = held(
            [str(bin_folder / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
            + [f"--{name}={value}" for name, value in flags.items()],
            {
                **environment,
                **{name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")},
                "PATH": f"{bin_folder}{os.pathsep}{environment['PATH']}",  # where a job's `python` is looked for
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray then listens on the loopback interface alone
                "TMPDIR": str(folder),
            },
            folder / "start.log",
            signal.SIGTERM,
        )
        try:
            yield _client(f"http://127.0.0.1:{ports['dashboard-port']}", folder / "start.log")
        finally:
            release(process)
            shutil.rmtree(folder, ignore_errors=True)


def _client(address: str, log: Path) -> JobSubmissionClient:
    """The Jobs API, as soon as it answers."""
    logging.getLogger("ray.dashboard").setLevel(logging.ERROR)
    from ray.job_submission import JobSubmissionClient

    deadline_s = time.monotonic() + CLUSTER_START_S
    while True:
        try:
            client = JobSubmissionClient(address)
            client.list_jobs()
            return client
        except (ConnectionError, RuntimeError) as error:
            if time.monotonic() > deadline_s:
                shown = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(
                    f"the cluster did not answer at {address} within {CLUSTER_START_S:g} s: {error}\n{shown}"
                ) from error
            time.sleep(0.5)


def submit(client: JobSubmissionClient, folder: Path) -> str:
    """Put the demo's data on S3 and submit the main job over it; its id."""
    uris = {
        "corpus.uri": upload(folder / "train.parquet", f"{PREFIX}/corpus/train.parquet"),
        "queries.uri": upload(folder / "queries.parquet", f"{PREFIX}/queries.parquet"),
        "model.weights_uri": upload(folder / "cnn.safetensors", f"{PREFIX}/cnn.safetensors"),
        "run.uri": f"{PREFIX}/run",
    }
    entrypoint = " ".join(["python -m jobs.attribute", SPEC, *(f"--set {name}={uri}" for name, uri in uris.items())])
    _say(f"$ ray job submit --working-dir . -- {entrypoint}")
    return submit_job(client, entrypoint, {"working_dir": ".", "excludes": LEFT_OUT})


def submit_job(client: JobSubmissionClient, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """Submit a job, again for a while where the cluster's agent, which starts last, is not there yet; its id."""
    deadline_s = time.monotonic() + CLUSTER_START_S
    while True:
        try:
            job: str = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
            return job
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(0.5)


def follow(client: JobSubmissionClient, job: str) -> bool:
    """Show a job's log until it ends; whether it succeeded."""

    async def show() -> None:
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    asyncio.run(show())
    while not client.get_job_status(job).is_terminal():  # the log can end a moment before
        time.sleep(0.2)
    info = client.get_job_info(job)
    _say(f"job {job}: {info.status}" + ("" if info.status == "SUCCEEDED" else f": {info.message}"))
    return bool(info.status == "SUCCEEDED")


QUESTION = "strongest proponent by signed score"
SQL = f"""SELECT query_id, arg_max(example_id, score) AS proponent, max(score) AS score, count(*) AS examples
FROM read_parquet('{PREFIX}/run/scores/*/*.parquet', hive_partitioning = false) GROUP BY query_id ORDER BY query_id"""


def ask_duckdb() -> pa.Table:
    """The question in SQL. DuckDB reads S3 through fsspec here, which needs no extension from the network."""
    import duckdb
    import fsspec

    with duckdb.connect() as connection:
        connection.register_filesystem(fsspec.filesystem("s3"))
        return connection.sql(SQL).to_arrow_table()


def ask_polars(environment: Mapping[str, str]) -> polars.DataFrame:
    """The question in Polars, which reads S3 by itself."""
    import polars as pl

    options = {
        "aws_access_key_id": environment["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
        "aws_endpoint_url": environment["AWS_ENDPOINT_URL"],
        "aws_region": environment["AWS_DEFAULT_REGION"],
        "aws_allow_http": "true",
    }
    scores = pl.scan_parquet(f"{PREFIX}/run/scores/*/*.parquet", storage_options=options, hive_partitioning=False)
    strongest = pl.col("example_id").sort_by("score", descending=True).first().alias("proponent")
    asked = scores.group_by("query_id").agg(strongest, pl.col("score").max(), pl.len().alias("examples"))
    return asked.sort("query_id").collect()


def show_answers(environment: Mapping[str, str]) -> None:
    """Ask both engines and print what they say."""
    from rich.table import Table

    from .display import console

    answers: dict[str, list[dict[str, Any]]] = {
        "DuckDB": ask_duckdb().to_pylist(),
        "Polars": ask_polars(environment).to_dicts(),
    }
    for engine, rows in answers.items():
        table = Table(title=f"{engine}: {QUESTION}", title_justify="left")
        for name in ("query_id", "proponent", "score", "examples"):
            table.add_column(name)
        for row in rows:
            table.add_row(row["query_id"], row["proponent"], f"{row['score']:.4g}", f"{row['examples']:,}")
        console().print(table)


def run_demo(folder: Path) -> int:
    """The whole demo; its exit code."""
    started_s = time.monotonic()
    with store() as server:
        _say(f"S3 at {server.endpoint}, bucket {BUCKET} (SeaweedFS, {time.monotonic() - started_s:.1f} s)")
        begun_s = time.monotonic()
        with cluster(os.environ) as client:
            _say(f"Ray cluster with Jobs API at {client.get_address()} ({time.monotonic() - begun_s:.1f} s)")
            if not follow(client, submit(client, folder)):
                return 1
        show_answers(server.environment)
    _say(f"done in {time.monotonic() - started_s:.0f} s; server and cluster are stopped, and their data is gone")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help=f"what jobs.digits wrote: {', '.join(DATA)}")
    arguments = parser.parse_args()
    if missing := [name for name in DATA if not (arguments.folder / name).is_file()]:
        parser.error(f"{arguments.folder} has no {', '.join(missing)}: make them with `python -m jobs.digits FOLDER`")
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: what was started is stopped
    try:
        sys.exit(run_demo(arguments.folder))
    except KeyboardInterrupt:
        _say("stopped, with everything that was started")
        sys.exit(130)


if __name__ == "__main__":
    main()
