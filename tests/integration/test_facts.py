"""`make demo-facts` without SmolLM2: the spec as it is, on two facts and a model that learned nothing, up to what is printed."""

import pytest

from jobs import facts, traced
from pipeline.errors import InputError, PipelineError
from pipeline.run import finish
from pipeline.specfile import load_spec
from tests.conftest import run_without_ray
from tests.example_data import prepare

SPEC = "jobs/specs/trace_facts.yaml"


def test_questions_answers_and_sentences_are_shown(tmp_path, monkeypatch, capsys):
    """The question, an answer of either model, and the four sentences, of which the two that state the fact are marked."""
    spec = load_spec(SPEC)
    monkeypatch.chdir(tmp_path)
    prepare("trace_facts", tmp_path)
    run = run_without_ray(spec)
    finish(run)
    traced.main(run.uri(), "build/facts/model")
    told = capsys.readouterr().out
    assert run.queries["prompt"][0].as_py() in told
    before, after = (next(line for line in told.splitlines() if f" {name} " in line) for name in ("before", "after"))
    assert before.split("before")[1].strip() == after.split("after")[1].strip()
    rows = [line.split() for line in told.splitlines() if line.strip().startswith(tuple("1234"))]
    assert [1, 2, 3, 4] == [int(row[0]) for row in rows]
    assert 2 == sum(row[-1] == "yes" for row in rows)
    assert run.uri("report", "index.html") in told


def test_what_is_not_there_is_said(tmp_path):
    """A folder that is no run, one that holds no model."""
    with pytest.raises(PipelineError, match="no run"):
        traced.main(str(tmp_path), "build/facts/model")
    with pytest.raises(InputError, match=r"no model in (.|\n)*jobs\.smollm2"):
        facts.main(tmp_path / "facts", tmp_path)
    assert not (tmp_path / "facts").exists()
