"""Jobs of a cluster with a token: submitted over the Jobs API with it, and refused without."""

import json
import os
import re
import time
import urllib.error
import urllib.request

import pytest

from jobs.demo_s3 import cluster, submit_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

PLAN = "python -m jobs.cli plan {spec}"
"""A job that reads a spec and touches nothing."""


@pytest.fixture(scope="module")
def client():
    """The Jobs API of a cluster as the demo starts one; the token is in this process's environment, too."""
    with cluster(os.environ) as made:
        yield made


def ask(client, path, token=None, body=None):
    """Status and answer of a request as any HTTP client makes it."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{client.get_address()}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def ended(client, job):
    """Where a job stands when it has ended."""
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    return client.get_job_info(job).status


def test_a_job_is_submitted_with_the_token(client, world, tmp_path):
    """By Ray's client, and by plain REST: `Authorization: Bearer TOKEN`."""
    (tmp_path / "spec.yaml").write_text(json.dumps(world.tree(tmp_path / "run")))
    entrypoint = PLAN.format(spec=tmp_path / "spec.yaml")
    runtime_env = {"env_vars": {"PYTHONPATH": os.getcwd()}}
    jobs = [submit_job(client, entrypoint, runtime_env)]
    body = {"entrypoint": entrypoint, "runtime_env": runtime_env}
    status, answer = ask(client, "/api/jobs/", os.environ["RAY_AUTH_TOKEN"], body)
    assert 200 == status
    jobs.append(answer["submission_id"])
    for job in jobs:
        assert "SUCCEEDED" == ended(client, job), client.get_job_logs(job)
        assert re.search(r"150", client.get_job_logs(job))


@pytest.mark.parametrize(("token", "code"), [(None, 401), ("0" * 64, 403)], ids=["without a token", "with another"])
def test_a_job_without_the_token_is_refused(client, token, code):
    """401 or 403, to submit and to look on; no job is there afterwards that was not."""
    before = {job.submission_id for job in client.list_jobs()}
    assert [code, code] == [
        ask(client, "/api/jobs/", token, {"entrypoint": "touch /tmp/intruder"})[0],
        ask(client, "/api/jobs/", token)[0],
    ]
    assert before == {job.submission_id for job in client.list_jobs()}
