"""What the faults share: the undisturbed run, the ledger and its table at the end."""

import copy

import pytest
from rich.console import Console

from pipeline.specfile import parse_spec
from tests.conftest import run_without_ray
from tests.faults.ledger import JSON_PATH, Ledger
from tests.seaweed import forget

_LEDGER = pytest.StashKey()


@pytest.fixture(scope="session")
def ledger(request):
    """Where faults are written down."""
    return request.config.stash.setdefault(_LEDGER, Ledger())


def pytest_terminal_summary(terminalreporter, config):
    """Print the table of all faults of the session."""
    ledger = config.stash.get(_LEDGER, Ledger())
    if ledger.entries:
        ledger.write(config.rootpath / JSON_PATH)
        terminalreporter.section("faults")
        ledger.show(Console(file=terminalreporter._tw._file, width=140))


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
