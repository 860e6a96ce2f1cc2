"""What the docs say can be done is done here: their commands are run, their code is used, their tables are compared."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import schemas
from pipeline import records
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.run import finish
from pipeline.tuner import Tuner
from tests.conftest import run_without_ray

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INSIDE = (ROOT / "pipeline" / "README.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_readmes_commands_work_in_order():
    """Every command of the README's shell blocks, `make demo` first; `make test` is what is running."""
    lines = [
        line
        for block in blocks(README, "sh")
        for line in block.splitlines()
        if line and not line.startswith("make test")
    ]
    assert lines[0].startswith("make demo")
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=1500)
        assert 0 == done.returncode, f"{line}\n{done.stdout}\n{done.stderr}"
    run = open_run(str(ROOT / "runs" / "digits"))
    assert "_SUCCESS" in {path.name for path in Path(run.uri()).iterdir()}
    assert (1437, 8) == (run.rows, len(run.query_ids))


def test_the_tables_in_the_docs_are_the_schemas():
    """README's score table and pipeline/schemas.md, word for word; every column of every table is described."""
    table = README.split("**`scores/query_id=Q/shard-NNNNNN.parquet`**")[1].split("\n\n")[1]
    assert schemas.markdown(records.SCORES).strip() == table
    assert schemas.page() == (ROOT / "pipeline" / "schemas.md").read_text(), (
        "python -m jobs.schemas > pipeline/schemas.md"
    )
    for _, schema, _ in schemas.TABLES:
        assert all(field.metadata[b"description"] for field in schema)
    assert {"nats"} == {records.SCORES.field(name).metadata[b"unit"].decode() for name in ("score", "base_loss")}


def test_the_readmes_minimal_spec_names_real_fields():
    """The YAML in the README parses as specs: of a classifier, of a language model, of an ensemble."""
    import yaml

    from pipeline.specfile import parse_spec

    tasks = [parse_spec(yaml.safe_load(block)).task.name for block in blocks(README, "yaml")]
    assert ["classification", "causal_lm", "classification"] == tasks


def test_the_task_and_producer_in_the_docs_work(make_spec, tmp_path, monkeypatch):
    """pipeline/README.md's my_task.py and my_producer.py, as they stand there, in a folder of somebody's own."""
    for block in blocks(INSIDE, "python"):
        name = re.match(r"# (\w+\.py)", block).group(1)
        (tmp_path / name).write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_task", "my_producer"):
        sys.modules.pop(name, None)
    task = blocks(INSIDE, "yaml")[0].strip()
    spec = make_spec(task.replace("task: ", "task=", 1), "producer={name: 'my_producer:Mine', options: {length: 0.1}}")
    run = run_without_ray(spec)
    finish(run)
    meta = run.counterpart_meta("copy-of-3")
    assert meta["details"]["gradient_norm"] > 0
    assert meta["query_loss_after_nats"] > meta["query_loss_before_nats"]


def test_the_task_in_the_docs_draws_labels(make_spec, tmp_path, monkeypatch, capsys):
    """pipeline/README.md's `sampled` serves a curvature that is made of gradients; nothing is said of true labels."""
    (tmp_path / "my_task.py").write_text(blocks(INSIDE, "python")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_task", None)
    task = blocks(INSIDE, "yaml")[0].strip().replace("task: ", "task=", 1)
    run = freeze(make_spec(task, "producer={name: natural, curvature: diagonal, sample_rows: 64, damping: 0.1}"))
    assert [] == Tuner(run, "cpu").tune_all(run.query_ids[:1])
    assert "has no method `sampled`" not in capsys.readouterr().err


def test_the_docs_links_lead_somewhere():
    """Every relative link of the two READMEs and the decisions points at a file that is there."""
    for path in (*ROOT.glob("*.md"), *ROOT.glob("jobs/*.md"), *ROOT.glob("pipeline/**/*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
