"""A run folder that somebody else made: its texts steer neither terminal nor page, and to look at it runs none of its code."""

import html
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.producer_choices import Finetune
from pipeline.run import finish
from tests.conftest import exit_code, run_without_ray

EVIL = "\x1b]0;title\x07\x9b2J\r\u202e<script>[red]a[/red]</script>\nerror: it is lost"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
MODULE = """
from pathlib import Path
from jobs.digits import cnn
from pipeline.producers.finetune import Finetune
from pipeline.tasks.classification import Classification
Path({mark!r}).touch()
class Task(Classification): pass
class Producer(Finetune): pass
"""


@pytest.fixture
def of_somebody_else(make_spec, world, tmp_path):
    """A finished run: ids, a query id and sources of control characters and markup."""
    rows, size = pq.read_table(world.corpus), 150
    ids = pa.array([f"{i}{EVIL}" for i in range(size)])
    corpus = rows.set_column(0, "id", ids).set_column(3, "author", pa.array([EVIL] * size))
    queries = pq.read_table(world.queries).slice(0, 1).set_column(0, "query_id", pa.array([EVIL]))
    for name, table in (("corpus", corpus), ("queries", queries)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    payload = "corpus.payload=[pixels, label, author]"
    inputs = [f"{name}.uri={tmp_path}/{name}.parquet" for name in ("corpus", "queries")]
    run = run_without_ray(make_spec(*inputs, payload))
    finish(run)
    return run


@pytest.mark.slow
def test_its_texts_steer_no_terminal_and_no_page(of_somebody_else, monkeypatch, capsys):
    """Ids, sources and query ids: shown as escapes by every command that names them; escaped or left out in the page."""
    uri = of_somebody_else.uri()
    for words in (["show", uri], ["status", uri], ["verify", uri], ["rank", uri, "--k", "2"], ["gc", uri]):
        assert 0 == exit_code(monkeypatch, *words)
    printed = capsys.readouterr()
    assert not CONTROLS.search(printed.out + printed.err)
    assert not re.search("^error: it is lost", printed.out + printed.err, re.MULTILINE)
    assert 3 == exit_code(monkeypatch, "show", uri, "--query", EVIL.replace("a", "b"))
    assert not CONTROLS.search(capsys.readouterr().err)
    page = Path(of_somebody_else.uri("report", "index.html")).read_text()
    assert not CONTROLS.search(page)
    assert "<script>" not in page
    assert html.escape("]0;title2J<script>[red]a[/red]</script>\nerror: it is lost") in page


def test_looking_at_it_runs_none_of_its_code(make_spec, tmp_path, monkeypatch, capsys):
    """status, verify, show, rank and gc import neither the factory nor the task nor the producer that its spec names."""
    mark = tmp_path / "mark"
    (tmp_path / "of_somebody_else.py").write_text(MODULE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    task = "{name: 'of_somebody_else:Task', options: {features: pixels, label: label, shape: [1, 8, 8]}}"
    options = {**Finetune().keywords, "steps": 2}
    producer = yaml.safe_dump({"name": "of_somebody_else:Producer", "options": options}, default_flow_style=True)
    spec = make_spec("model.factory=of_somebody_else:cnn", f"task={task}", f"producer={producer}")
    run = run_without_ray(spec)
    finish(run)
    assert mark.exists()
    mark.unlink()
    monkeypatch.delitem(sys.modules, "of_somebody_else")
    uri = run.uri()
    for words in (["status"], ["verify"], ["show"], ["rank", "--k", "3"], ["gc", "--dry-run"], ["verify", "--mend"]):
        assert 0 == exit_code(monkeypatch, words[0], uri, *words[1:])
        assert not mark.exists(), words
    assert "of_somebody_else" not in sys.modules
