"""What the command prints: texts of foreign origin steer no terminal."""

import io
import re
import signal
import sys

import pytest
from rich.table import Table

from jobs import cli, display
from pipeline.errors import InputError

EVIL = "a\x1b[31mred\x07\r\x9b2J\u202e[red]b[/red][link=http://c]d[/link]:smile: s3://key:secret@bucket"
SHOWN = r"a\x1b[31mred\x07\r\x9b2J\u202e[red]b[/red][link=http://c]d[/link]:smile: s3://...@bucket"
STYLES = re.compile(r"\x1b\[[0-9;]*m")
"""What rich itself writes, to a terminal alone."""


@pytest.mark.parametrize("terminal", [True, False])
def test_texts_are_shown_as_they_are(terminal):
    """Titles, heads, cells and lines: no control characters, no markup, no emoji, no credentials."""
    out = display._PlainConsole(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False)
    table = Table(title=EVIL, title_justify="left")
    table.add_column(EVIL)
    table.add_row(EVIL)
    out.print(table)
    out.print(EVIL, soft_wrap=True)
    written = STYLES.sub("", out.file.getvalue()) if terminal else out.file.getvalue()
    assert 4 == written.count(SHOWN)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", written)


def test_an_id_of_two_lines_is_one_row_of_a_table():
    """A line break in it is an escape, as in what else a row carries."""
    row = {"query_id": "q\n1", "side": "proponent", "rank": 1, "example_id": "a\nb", "text": "c\nd", "score": 0.5}
    assert [r"q\n1", "proponent", "1", r"a\nb", r"c\nd", "0.5"] == display._cells(row, ["text"], ["score"])


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 143), (InputError(EVIL, EVIL), 3), (RuntimeError(EVIL), 1)],
    ids=["stopped", "refused", "a bug"],
)
def test_however_a_command_ends_it_shows_no_secret_and_steers_no_terminal(error, code, monkeypatch, capsys):
    """The command to give again, an error with its hint, a traceback."""

    def action(**_):
        if error is None:
            signal.raise_signal(signal.SIGTERM)
        raise error

    words = ["mirrorscope", "run", "a.yaml", "--set", "corpus.uri=s3://key:sec%40ret@bucket", "s3://key:sec ret@bucket"]
    monkeypatch.setattr(sys, "orig_argv", [*words, EVIL])
    assert code == cli.guarded(action)
    written = capsys.readouterr().err
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]|sec(ret|%40ret| ret)", written)
    assert "s3://...@bucket" in written
