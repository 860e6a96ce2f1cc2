"""What unit tests have of their own."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _threads():
    """As many of torch as the machine has: what is the same to the bit is so with several."""
