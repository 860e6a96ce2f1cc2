"""No file of a corpus, a model or a run brings code: what the sources call that could run some."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("pipeline", "jobs", "tests") for path in (ROOT / folder).rglob("*.py"))
BETWEEN_OUR_PROCESSES = {"pipeline/score.py", "pipeline/retrain.py"}
"""Errors and work, pickled by one of a run's own processes for another; nothing of it is ever in a file."""


@cache
def calls(path):
    """(dotted name, keyword -> source of its value) of every call in a file."""
    return [
        (ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords})
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("word", ["from_pretrained", "from_config"])
def test_every_call_of_transformers_refuses_remote_code(word):
    """On a terminal transformers asks, and one key runs it, where nothing is said."""
    found = [
        (path.relative_to(ROOT), name, keywords.get("trust_remote_code"))
        for path in SOURCES
        for name, keywords in calls(path)
        if name.endswith(f".{word}")
    ]
    assert found
    assert [] == [each for each in found if each[2] != "False"]


def test_nothing_is_unpickled_from_a_file():
    """torch.load takes tensors alone, numpy no objects, YAML plain values; no text is evaluated."""
    forbidden = []
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        for name, keywords in calls(path):
            bad = {
                "torch.load": keywords.get("weights_only") != "True",
                "np.load": keywords.get("allow_pickle", "False") != "False",
                "yaml.load": True,
                "yaml.unsafe_load": True,
                "pickle.load": True,
                "pickle.loads": place not in BETWEEN_OUR_PROCESSES,
                "eval": True,
                "exec": True,
            }.get(name, False)
            if bad and not place.startswith("tests/"):
                forbidden.append((place, name))
    assert [] == forbidden
