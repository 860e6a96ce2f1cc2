"""Who reaches the ports of a run's Ray and does not have its token gets nothing from it, and disturbs nothing."""

import http.client
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import psutil
import pytest

from pipeline.frozen import open_run
from tests.conftest import tuned
from tests.faults.driver import Driver
from tests.faults.waiting import begun, let_go, waiting_task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

LOCAL = "import sys, ray._private.services as services; services.resolve_ip_for_localhost = lambda host: host; "
"""Else Ray looks for 127.0.0.1 at the machine's outer address, where nothing listens: the token is what is tried here."""
JOIN = LOCAL + "import ray; ray.init(sys.argv[1], log_to_driver=False); print('joined', len(ray.nodes()))"
START = (
    LOCAL + "from ray.scripts.scripts import cli; cli(['start', '--block', '--num-cpus=1', '--address=' + sys.argv[1]])"
)
RPCS = (
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.ObjectManagerService/Pull",
    "ray.rpc.InternalKVGcsService/InternalKVKeys",
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.ReporterService/GetTraceback",
)
"""One of each kind of process; a server answers with what it refuses before it reads the request."""
INTRUDERS = {
    "without a token": {"RAY_AUTH_MODE": "disabled"},
    "with another token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    "as a further node": {"RAY_AUTH_MODE": "disabled"},
}


def intruder(how, address, folder):
    """A process of somebody who knows host and port, with a home and temporary files of its own."""
    home = folder / how.replace(" ", "-")
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", START if how == "as a further node" else JOIN, address],
        env={**env, **INTRUDERS[how], "HOME": str(home), "RAY_TMPDIR": f"/tmp/in-{os.getpid()}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def listening(driver):
    """Address and port of every socket on which a process of the run listens."""
    pids = {driver.pid, *(child.pid for child in driver.children())}
    return sorted(
        {
            (each.laddr.ip, each.laddr.port)
            for each in psutil.net_connections("tcp")
            if each.pid in pids and each.status == "LISTEN"
        }
    )


def http_status(port):
    """What a plain GET is answered; 0 where the port speaks no HTTP/1."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code
    except (OSError, http.client.HTTPException):  # gRPC
        return 0


def rpc_statuses(port):
    """What remote calls without a token are answered."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for rpc in RPCS:
            try:
                channel.unary_unary(f"/{rpc}")(b"", timeout=5)
                yield "OK"
            except grpc.RpcError as error:
                yield error.code().name


def test_nobody_without_the_token_gets_in(make_spec, tmp_path, undisturbed, ledger):
    """Drivers and a node that know the address are refused, so is every port; the run beside them ends as ever.

    Even where the user's environment disables the token: an embedded Ray has one all the same.
    """
    spec = make_spec("score.shard_rows=64", "resources.score={actors: 1}", waiting_task(tmp_path))
    tuned(spec)
    with Driver(tmp_path, spec.model_dump(mode="json"), RAY_AUTH_MODE="disabled") as driver:
        driver.until(lambda: begun(tmp_path, "score"))
        (control,) = driver.children("gcs_server")
        (address,) = (
            f"127.0.0.1:{port.laddr.port}" for port in control.net_connections("tcp") if port.status == "LISTEN"
        )
        intruders = {how: intruder(how, address, tmp_path) for how in INTRUDERS}
        places = listening(driver)
        assert {"127.0.0.1"} == {host.removeprefix("::ffff:") for host, _ in places}, places
        statuses = {port: http_status(port) for _, port in places}
        assert {0, 401} == set(statuses.values()), statuses
        for port in (port for port, status in statuses.items() if status == 0):
            assert {"UNAUTHENTICATED"} == set(rpc_statuses(port)) - {"UNIMPLEMENTED"}, port
        for how, process in intruders.items():
            output, _ = process.communicate(timeout=600)
            assert process.returncode not in (0, -signal.SIGKILL), f"{how}: {output}"
            assert "joined" not in output, how
            assert "token" in output.lower(), f"{how}: {output}"
        owner = subprocess.run(
            [sys.executable, "-c", JOIN, address],
            env={**control.environ(), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert "joined 1" in owner.stdout, "with the token the same words do get in" + owner.stderr
        let_go(tmp_path)
        assert 0 == driver.wait(), driver.output
    assert not (tmp_path / ".ray").exists(), "the token is written nowhere"
    ledger.enter(
        "three intruders without its token at a run's Ray", len(intruders), None, open_run(spec.run.uri), undisturbed
    )
