"""The store that tests write to: a SeaweedFS server of their own on free ports, or the one that S3_ENDPOINT names."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec

from jobs.seaweed import BUCKET, TABLE_BUCKET, Server, s3_client
from pipeline import observe, storage


@dataclass
class Store:
    """A store that tests write to, every time below a prefix of their own.

    Args:
        endpoint: URL of the S3 API.
        bucket: That exists.
        environment: Keys, endpoint and region, as the pipeline's processes have them.
        root: Key prefix of this session.
        server: The process behind it; None for a store of somebody's own.
    """

    endpoint: str
    bucket: str
    environment: dict[str, str] = field(repr=False)
    root: str
    server: Server | None = None

    @property
    def iceberg_uri(self) -> str:
        """URL of the server's Iceberg REST catalog."""
        assert self.server is not None
        return self.server.iceberg_uri

    @property
    def table_bucket(self) -> str:
        """The server's bucket of tables, the catalog's warehouse."""
        return TABLE_BUCKET

    def prefix(self, name: str = "run") -> str:
        """A URI under which nothing is."""
        return f"s3://{self.bucket}/{self.root}/{name}-{uuid.uuid4().hex[:8]}"


def forget() -> None:
    """Storage as in a fresh process: no connection, nothing known of any store, nothing said yet."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    storage._s3.cache_clear()
    storage._answered.clear()
    observe._last_said.clear()


@contextmanager
def running() -> Iterator[Store]:
    """A server for the time of the block."""
    server = Server()
    try:
        server.start()
        yield Store(server.endpoint, BUCKET, server.environment, "tests", server)
    finally:
        server.remove()


@contextmanager
def named() -> Iterator[Store]:
    """The store of S3_ENDPOINT, with the AWS_* keys of the environment and S3_BUCKET; what is written there is removed."""
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert set(keys) <= set(os.environ), f"S3_ENDPOINT needs {' and '.join(keys)} beside it"
    ours = {name: os.environ[name] for name in keys}
    region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    endpoint, bucket = os.environ["S3_ENDPOINT"], os.environ.get("S3_BUCKET", "mirrorscope-tests")
    environment = {**ours, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": region}
    client = s3_client(environment)
    if bucket not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)
    store = Store(endpoint, bucket, environment, f"mirrorscope-{uuid.uuid4().hex[:8]}")
    try:
        yield store
    finally:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{store.root}/"):
            for found in page.get("Contents", []):
                client.delete_object(Bucket=bucket, Key=found["Key"])


def store() -> Any:
    """The store that the environment names, else a server of our own: a context manager of a Store."""
    return named() if "S3_ENDPOINT" in os.environ else running()
