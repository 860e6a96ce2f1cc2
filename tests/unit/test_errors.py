"""The exception tree."""

import pickle

import pytest

from pipeline import errors

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PipelineError)]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_errors_cross_process_borders_whole(kind):
    """An error pickles with its message, hint and kind: Ray carries it home."""
    copy = pickle.loads(pickle.dumps(kind("what failed", "what to do")))
    assert (kind, "what failed", "what to do") == (type(copy), copy.message, copy.hint)
    assert "what failed\n  hint: what to do" == str(copy)


def test_exit_codes_tell_the_kinds_apart():
    """Every kind has the exit code that its docstring's tree promises."""
    codes = {kind.__name__: kind.exit_code for kind in TREE}
    assert {
        "PipelineError": 1,
        "SpecError": 2,
        "InputError": 3,
        "ContractError": 4,
        "NumericsError": 5,
        "ArtifactError": 6,
        "ForeignError": 6,
        "StorageError": 7,
        "UnavailableError": 7,
        "ClusterError": 8,
        "ClusterLostError": 8,
        "QuarantineError": 9,
    } == codes
    for name, code in codes.items():
        assert any(name in line and f"exit {code}" in line for line in (errors.__doc__ or "").splitlines())
