"""What the faults share: the undisturbed run, the ledger."""

import copy
from dataclasses import asdict

import pytest

from pipeline.specfile import parse_spec
from tests.conftest import run_without_ray
from tests.faults.ledger import PROPERTY, Ledger
from tests.seaweed import forget


@pytest.fixture
def ledger(request):
    """Where a test writes down its faults; they go home with its report, and all are shown at the end."""
    made = Ledger()
    yield made
    request.node.user_properties += [(PROPERTY, asdict(entry)) for entry in made.entries]


@pytest.fixture(scope="session")
def undisturbed(world, tmp_path_factory):
    """The run that nothing happened to."""
    return run_without_ray(parse_spec(copy.deepcopy(world.tree(tmp_path_factory.mktemp("undisturbed") / "run"))))


@pytest.fixture
def bad_day(ray_cluster, s3_fresh, monkeypatch):
    """The proxy in front of the store that this process and the workers of `ray_cluster` go through."""
    ray_cluster.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", ray_cluster.endpoint)
    forget()
    yield ray_cluster
    ray_cluster.clear()
