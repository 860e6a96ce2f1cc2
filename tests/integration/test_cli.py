"""The command: what it prints, what it refuses and how, and its exit codes."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from typer.testing import CliRunner

from jobs import stage
from jobs.cli import app, guarded
from pipeline import rehearsal
from pipeline.freeze import survey
from pipeline.run import finish
from pipeline.specfile import dump_spec
from tests.conftest import compiles, exit_code, run_without_ray
from tests.example_data import prepare

EXAMPLE_SPECS = sorted(
    path
    for path in Path(__file__).parents[2].glob("jobs/specs/*.yaml")
    if path.stem != "judge"  # no spec of a run
)


def invoke(*words):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


@pytest.fixture
def finished(make_spec):
    run = run_without_ray(make_spec())
    finish(run)
    return run


def test_help_needs_no_heavy_import():
    """`mirrorscope --help` touches neither torch nor ray nor pyarrow: it answers at once."""
    code = "import sys; sys.argv = ['mirrorscope', '--help']\nfrom jobs.cli import app\ntry: app()\nexcept SystemExit: pass\n"
    code += "print('LOADED', [name for name in ('torch', 'ray', 'pyarrow', 'duckdb', 'pydantic', 'yaml') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "LOADED []" in done.stdout
    for word in ("run", "plan", "status", "rank", "show"):
        assert re.search(rf"^│ {word} ", done.stdout, re.MULTILINE)


def test_show_prints_the_table_and_where_everything_is(finished):
    """Queries, ids, labels and losses; then ranked table, scores, picture, page and a line of SQL."""
    shown = invoke("show", finished.uri(), "--query", "copy-of-3", "--top", "2")
    assert 0 == shown.exit_code, shown.output
    assert "copy-of-77" not in shown.output
    assert 4 == len(re.findall(r"copy-of-3 +│ (?:pro|op)ponent", shown.output))
    for place in ("topk/ranked.parquet", "scores", "report/contact_sheet.png", "report/index.html"):
        assert finished.uri() + "/" + place in shown.output


def test_the_duckdb_line_that_is_shown_works(finished):
    """The one-liner can be pasted into a shell."""
    line = next(line for line in invoke("show", finished.uri()).output.splitlines() if line.startswith("query them"))
    shell = line.removeprefix("query them").strip()
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert 0 == done.returncode, done.stderr
    assert "copy-of-77" in done.stdout
    assert "150" in done.stdout


def test_status_counts_from_the_commits(finished):
    """Stages, shards, rows and rejects; a missing commit shows."""
    shown = invoke("status", finished.uri()).output
    assert "3 of 3 shards, 150 rows scored, 0 rejected" in shown
    assert "sealed" in shown
    Path(finished.uri("commits", "shard-000000.json")).unlink()
    assert "2 of 3 shards, 86 rows scored" in invoke("status", finished.uri()).output


@pytest.mark.slow
def test_what_was_calibrated_is_compared_with_what_it_took(make_spec, tmp_path):
    """`plan --calibrate` predicts from a rehearsal and begins nothing; `status` shows measured against predicted."""
    spec, path = make_spec(), tmp_path / "spec.yaml"
    path.write_text(dump_spec(spec))
    planned = invoke("plan", str(path), "--calibrate")
    assert 0 == planned.exit_code, planned.output
    assert re.search(r"predicted score +\d\S* s on 2 actors x 1 CPU", planned.output)
    assert re.search(r"CPU-\w+ per million examples", planned.output)
    assert re.search(r"counterparts +2 of \S+ GiB together, all at once beside the base", planned.output)
    assert ["forecast.json"] == os.listdir(spec.run.uri)
    run = run_without_ray(spec)
    finish(run)
    shown = invoke("status", run.uri()).output
    assert 2 == len(re.findall(r"took \d\S* s, predicted \d\S* s on \d (?:workers|actors)", shown)), shown
    other = run_without_ray(make_spec("producer.steps=2", name="other"))
    shutil.copy(run.uri("forecast.json"), other.uri())
    assert "predicted" not in invoke("status", other.uri()).output


@compiles
@pytest.mark.slow
def test_a_rehearsal_of_a_long_run_says_what_compiling_would_do(make_spec, tmp_path, monkeypatch):
    """Measured; with it on, where the run is short or the model has no blocks, there is nothing to say, or that."""
    path = tmp_path / "spec.yaml"

    def said(*overrides):
        path.write_text(dump_spec(make_spec(*overrides, "producer={name: unlearn}")))
        return invoke("plan", str(path), "--calibrate").output

    blocks = "model={factory: 'tests.unit.test_compiled:blocks'}"
    assert "torch.compile" not in said(blocks)
    monkeypatch.setattr(rehearsal, "LONG_S", 0.0)
    measured = (
        r"torch.compile +score.compile: true would (?:not )?pay: batches are \d\S* times as fast, which saves \S+ "
    )
    assert re.search(measured, said(blocks))
    assert "torch.compile" not in said(blocks, "score.compile=true")
    without = said()
    assert "Sequential is scored as it is, not compiled: it has no blocks" in without
    assert "torch.compile" not in without


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("resources.tune.shard=true", 2, "workers share a model that this process may not hold"),
        ("corpus.uri=short.parquet", 3, "the first 8 shards have no row that can be scored"),
        ("producer.lr=1e30", 5, "query 'copy-of-3': the query's loss is nan"),
    ],
)
def test_a_rehearsal_says_what_it_cannot_do(make_spec, tmp_path, monkeypatch, capsys, override, code, said):
    """Each with its exit code, and the run's folder as it was: without one."""
    spec, path, short = make_spec(), tmp_path / "spec.yaml", tmp_path / "short.parquet"
    pq.write_table(
        pa.table({"id": ["a", "b"], "pixels": [[0.0] * 63] * 2, "label": [1, 2], "author": ["x"] * 2}), short
    )
    monkeypatch.chdir(tmp_path)
    path.write_text(dump_spec(spec))
    assert code == exit_code(monkeypatch, "plan", str(path), "--calibrate", "--set", override)
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
    assert not Path(spec.run.uri).exists()


def test_rank_lists_again_without_scoring(finished):
    """Another k and transform change the ranked table and nothing under scores/."""
    before = {path: path.stat().st_mtime_ns for path in Path(finished.uri("scores")).rglob("*")}
    done = invoke("rank", finished.uri(), "--k", "2", "--transform", "relative")
    assert 0 == done.exit_code, done.output
    assert "relative:0.001 score" in done.output
    assert [(8,)] == duckdb.sql(f"SELECT count(*) FROM '{finished.uri('topk', 'ranked.parquet')}'").fetchall()
    assert before == {path: path.stat().st_mtime_ns for path in Path(finished.uri("scores")).rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLE_SPECS, ids=lambda path: path.stem)
def test_every_example_spec_is_planned(path, tmp_path, monkeypatch):
    """Each commented example parses, and plans on the data that it names; planning writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_project", "my_project.models"):
        sys.modules.pop(name, None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    prepare(path.stem, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    planned = invoke("plan", str(path))
    assert 0 == planned.exit_code, planned.output or planned.exception
    for word in ("corpus", "shards", "queries", "forward passes", "objects", "tune", "score", "fingerprint"):
        assert re.search(rf"^ {word} ", planned.output, re.MULTILINE), planned.output
    assert before == sorted(tmp_path.rglob("*"))
    assert "#" in path.read_text()


def test_errors_have_their_exit_code_and_say_what_to_do(make_spec, world, tmp_path, monkeypatch, capsys):
    """A typo exits 2, a missing file 3, a run that is not there 6; a usage error 2; messages carry no traceback."""
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**world.tree(tmp_path / "run"), "sede": 1}))
    assert 2 == exit_code(monkeypatch, "plan", str(path))
    assert "sede: 'sede' is not known; did you mean 'seed'" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(world.tree(tmp_path / "run")))
    assert 3 == exit_code(monkeypatch, "plan", str(path), "--set", "corpus.uri=/nowhere/at/all.parquet")
    assert "/nowhere/at/all.parquet" in capsys.readouterr().err
    assert 6 == exit_code(monkeypatch, "status", str(tmp_path / "nothing"))
    shown = capsys.readouterr().err
    assert "holds no run" in shown
    assert "hint:" in shown
    assert "Traceback" not in shown
    assert 2 == exit_code(monkeypatch, "rank", str(tmp_path), "--k", "0")


def test_an_unknown_query_is_named(finished, monkeypatch, capsys):
    """`show --query` of a query that the run does not have lists those it has."""
    assert 3 == exit_code(monkeypatch, "show", finished.uri(), "--query", "copy-of-9")
    assert "it has copy-of-3, copy-of-77" in capsys.readouterr().err


def test_fields_explains_the_spec():
    """`mirrorscope fields producer` tells every option of every producer."""
    shown = invoke("fields", "producer").output
    for word in ("unlearn", "finetune", "noise_radius", "max_loss_change", "regular expression"):
        assert word.lower() in shown.lower()
    assert "did you mean 'producer'" in str(invoke("fields", "producr").exception)


def test_a_stage_needs_a_known_name():
    """`python -m jobs.stage` refuses a stage that is not one."""
    refused = CliRunner().invoke(stage.app, ["scor", "spec.yaml"])
    assert 2 == refused.exit_code
    assert all(name in refused.output for name in ("'scor'", "'tune'", "'score'", "'rank'"))


def test_a_rank_that_cannot_be_leaves_the_run_as_it_was(finished, monkeypatch, capsys):
    """A wrong eps, or a run that lost a commit: refused, and run.yaml keeps its rank section."""
    before = Path(finished.uri("run.yaml")).read_bytes()
    assert 2 == exit_code(monkeypatch, "rank", finished.uri(), "--eps", "inf")
    assert "rank.eps" in capsys.readouterr().err
    Path(finished.uri("commits", "shard-000001.json")).unlink()
    assert 6 == exit_code(monkeypatch, "rank", finished.uri(), "--k", "77")
    assert before == Path(finished.uri("run.yaml")).read_bytes()


def test_brackets_in_peoples_data_stay_as_they_are(make_spec, world, tmp_path):
    """A query id that looks like markup is printed, not interpreted."""
    table = pq.read_table(world.queries).slice(0, 1)
    path = tmp_path / "queries.parquet"
    pq.write_table(table.set_column(0, "query_id", pa.array(["say [/INST] [red]x"])), path)
    run = run_without_ray(make_spec(f"queries.uri={path}"))
    finish(run)
    assert "say [/INST] [red]x" in invoke("show", run.uri()).output


@pytest.mark.parametrize("producer", ["", "producer={name: natural, sample_rows: 64}", "producer={name: natural}"])
def test_the_plan_counts_the_objects_that_a_run_writes(make_spec, producer):
    """`plan` promises as many objects as lie in the folder afterwards."""
    spec = make_spec(*([producer] if producer else []))
    planned = survey(spec)[1]
    run = run_without_ray(spec)
    finish(run)
    assert planned.objects == len([path for path in Path(run.uri()).rglob("*") if path.is_file()])
    assert (150, 450, 3) == (planned.rows, planned.forward_passes, planned.shards)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("producer=unlearn", "producer: got 'unlearn', expected a mapping, as in {name: ...}"),
        ("run.uri=''", "run.uri: string should have at least 1 character"),
        ("model.factory=foo", "model.factory: got 'foo', expected package.module:function"),
        ("producer.parameters='('", "producer.parameters: '(' is not a regular expression"),
        ("model.factory='jobs.digits:cnnn'", "module jobs.digits has no 'cnnn'"),
        ("producer={name: 'jobs.digits:cnn', options: {depth: 3}}", "does not take these options"),
    ],
)
def test_common_slips_are_named_before_any_work(world, tmp_path, monkeypatch, capsys, override, said):
    """What people type wrong exits 2 with a sentence that says what to type, and makes no folder."""
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(world.tree(tmp_path / "run")))
    assert 2 == exit_code(monkeypatch, "run", str(path), "--set", override)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_its_code_and_how_to_go_on(number, code, capsys):
    """SIGTERM and Ctrl-C in the middle of a command: no traceback, and the words that were given."""
    stopped = typer.Typer()
    stopped.command()(lambda: os.kill(os.getpid(), number))
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mirrorscope"])
        patch.setattr(sys, "orig_argv", ["python", "-m", "jobs.attribute", "a spec.yaml"])
        assert code == guarded(stopped)
    said = "stopped; what is committed stays, and the same command goes on from there:\n  python -m jobs.attribute 'a spec.yaml'"
    assert said == capsys.readouterr().err.rstrip("\n")
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
