"""What a person sees: plain lines where there is no terminal, units, and actions that repeat."""

import threading

import pytest

from pipeline import observe
from pipeline.errors import PipelineError
from pipeline.observe import (
    Progress,
    duration,
    every,
    for_terminal,
    has_credentials,
    printable,
    rate,
    say,
    spoken,
    without_controls,
    without_credentials,
)


def fail(_):
    raise RuntimeError("work")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00"), (0.4, "0:00"), (9, "0:09"), (59.6, "1:00"), (61, "1:01"), (3599.7, "1:00:00"), (90_061, "25:01:01")],
)
def test_durations_read_as_clocks(seconds, expected):
    """m:ss below an hour, h:mm:ss above, rounded before they are cut up."""
    assert expected == duration(seconds)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.042, "0.042 s"),
        (9.96, "10 s"),
        (12.4, "12 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_predictions_are_spoken_to_two_or_three_digits(seconds, expected):
    """No more digits than a prediction has; rounded before they are cut up."""
    assert expected == spoken(seconds)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(4, "4.0 GPU-seconds"), (119, "119 GPU-seconds"), (150, "2.5 GPU-minutes"), (7200, "2.0 GPU-hours")],
)
def test_costs_are_spoken_in_what_is_paid_for(seconds, expected):
    """Seconds, minutes or hours of a CPU or GPU."""
    assert expected == spoken(seconds, "GPU")


@pytest.mark.parametrize(
    ("examples", "seconds", "expected"),
    [(5000, 2.0, "2,500 examples/s"), (1, 4.0, "0 examples/s"), (0, 2.0, ""), (5, 0.0, "")],
)
def test_rates_are_examples_per_second_or_nothing(examples, seconds, expected):
    """No rate is claimed where none can be known."""
    assert expected == rate(examples, seconds)


def test_a_notice_is_one_line_on_standard_error(capsys):
    """Standard output stays free for results."""
    say("hello")
    assert ("", "hello\n") == capsys.readouterr()


def test_a_log_gets_a_line_at_the_start_and_one_at_the_end(capsys, monkeypatch):
    """Between them at most one per interval: nothing here, where the interval is an hour."""
    monkeypatch.setattr(observe, "PLAIN_EVERY_S", 3600.0)
    with Progress("score", 3, "shards") as progress:
        for _ in range(3):
            progress.advance(100)
    first, last = capsys.readouterr().err.splitlines()
    assert "score 0/3 shards    0%  ETA ?" == first
    assert last.startswith("score 3/3 shards  100%")
    assert "examples/s  took 0:00" in last


def test_a_line_is_due_once_the_interval_has_passed(capsys, monkeypatch):
    """With an interval of nothing every step has its line."""
    monkeypatch.setattr(observe, "PLAIN_EVERY_S", 0.0)
    with Progress("tune", 2, "queries") as progress:
        progress.advance()
        progress.advance()
    shown = [line[: len("tune  0/2 queries")] for line in capsys.readouterr().err.splitlines()]
    assert ["tune  0/2 queries", "tune  1/2 queries", "tune  2/2 queries"] == shown


def test_equal_lines_are_not_repeated(capsys, monkeypatch):
    """Nothing new is no news; what workers are at is."""
    monkeypatch.setattr(observe, "PLAIN_EVERY_S", 0.0)
    with Progress("tune", 2, "queries") as progress:
        for at_work in ("", "", "pass 1", "pass 1", "pass 2"):
            progress.at_work = at_work
            progress.at(0)
    lines = capsys.readouterr().err.splitlines()
    assert ["", "pass 1", "pass 2"] == [line.partition("ETA ?")[2].strip() for line in lines]


def test_plain_lines_carry_no_terminal_codes(capsys):
    """A log file stays readable."""
    with Progress("score", 1, "shards") as progress:
        progress.advance(1)
    written = capsys.readouterr().err
    assert "\x1b" not in written
    assert "\r" not in written


def test_what_was_done_before_counts_as_done_but_not_as_speed():
    """A resumed stage starts at its fraction, and guesses no end before its first step."""
    line = Progress("score", 4, "shards", done=2).line()
    assert "score 2/4 shards   50%  ETA ?" == line


def test_a_stage_of_nothing_has_no_fraction():
    """Zero of zero is done, not a division by zero."""
    assert "score 0/0 shards  took 0:00" == Progress("score", 0, "shards").line()


def test_thousands_are_grouped():
    """Long counts stay readable."""
    assert "1,500/2,000,000 shards" in Progress("score", 2_000_000, "shards", done=1500).line()


def test_the_last_line_is_shown_even_when_the_work_fails(capsys):
    """A log ends with how far it came."""
    progress = Progress("score", 9, "shards")
    with pytest.raises(RuntimeError, match="work"), progress:
        fail(progress.at(4))
    assert "4/9 shards" in capsys.readouterr().err.splitlines()[-1]


def test_every_repeats_while_the_block_lasts_and_once_at_its_end():
    """The action runs again and again meanwhile, and after the block no more."""
    calls, thrice = [], threading.Event()

    def action():
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) == 3:
            thrice.set()

    with every(0.001, action):
        assert thrice.wait(60)
    counted = len(calls)
    assert [False] * (counted - 1) + [True] == calls
    assert not threading.Event().wait(0.02)
    assert counted == len(calls)


def test_every_runs_its_action_at_the_end_of_a_short_block():
    """The last state is seen even when the block ends before the first interval."""
    calls = []
    with every(3600, lambda: calls.append(1)):
        pass
    assert [1] == calls


def test_every_stops_when_the_block_fails():
    """An error passes through, and no thread is left behind."""
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="work"), every(3600, lambda: None):
        raise RuntimeError("work")
    assert before == threading.active_count()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe 12 日本 😀", "größe 12 日本 😀"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("two\nlines\r\tand a tab", r"two\nlines\r\tand a tab"),
        ("\x9b31m\x85\x7f", r"\x9b31m\x85\x7f"),
        ("\u202egnp.exe\u2069\u200f", r"\u202egnp.exe\u2069\u200f"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_what_would_steer_a_terminal_is_shown_as_an_escape(text, shown):
    """Control characters, marks of direction and lone surrogates; letters of any script stay."""
    assert shown == printable(text)


def test_a_line_break_in_an_id_begins_no_line_of_ours(capsys):
    """Notices and errors: further lines are indented, control characters are escapes."""
    say("example a\nerror: the run is lost\r\x1b[2J: rejected")
    assert "example a\n  error: the run is lost\\r\\x1b[2J: rejected\n" == capsys.readouterr().err
    assert "what\n  where\n  hint: how" == for_terminal(str(PipelineError("what\n  where", "how")))


def test_a_page_keeps_lines_and_tabs_alone():
    """Other control characters, marks of direction and lone surrogates go."""
    assert "a\n\tb c" == without_controls("a\n\t\x1b\x07b\u202e \ud83d\x9bc\r")


SECRETS = [
    "s3://key:secret@bucket/a",
    "s3://key:sec%40secret@bucket",
    "s3://key%3Asecret@bucket/a",
    "s3://key%3asecret%40bucket/a",
    "s3://key:secret%40bucket/a",
    "s3://key:a secret@bucket/a",
    "s3://key:se/cret/secret@bucket/a",
    "s3://key:12/secret@bucket/a",
    "s3://key:s@secret@bucket",
    "s3://:secret@bucket",
    "s3://AKIAIOSFODNN7secret@bucket/a",
    "s3a://secret@bucket",
    "gs://secret@bucket/a",
    "simplecache::s3://key:secret@bucket/a",
    "S3://key:secret@bucket",
    "https://ghp_secret@host/a",
    "https://user:secret@host/a",
    "https://user:1secret@host:8080/a",
    "sftp://user:secret@host/a",
    "postgresql+psycopg://user:secret@host:5432/db",
    "postgresql://host/db?user=u&password=secret",
    "abfs://ASIAIOSFODNN7SECRET@account/a",
    "abfss://container:secret@account.dfs.core.windows.net/a",
    "https://host/a?X-Amz-Algorithm=x&X-Amz-Credential=secret",
    "https://host/a?X-Amz-Signature=secret",
    "https://host/a?X%2DAmz%2DSignature=secret",
    "https://host/a?X-Amz-Security-Token=secret",
    "https://host/a b?X-Goog-Signature=secret&x=1",
    "https://host/a?sv=1&sig=secret%3D",
    "https://host/a?Signature=secret&AWSAccessKeyId=secret",
    "https://host/a?OSSAccessKeyId=secret",
    "https://host/a?AccessKeyId=secret",
    "https://host/a?token=secret",
    "https://host/a?access_token=secret",
    "https://host/a%3Ftoken%3Dsecret",
    "https://host/a#api_key=secret",
]
NO_SECRETS = [
    "s3://bucket/a@b",
    "s3://bucket/a:b@c",
    "s3://bucket/year=2026/x[0-9]?.parquet",
    "s3://bucket/signature=3/token=4",
    "abfs://container@account.dfs.core.windows.net/a",
    "wasbs://container@account.blob.core.windows.net/a",
    "hdfs://host:9000/a@b",
    "hdfs://user@host:9000/a",
    "sftp://user@host/a",
    "postgresql://user@host:5432/db",
    "http://host:9000/bucket/a@b",
    "https://host:8080?version=3",
    "hf://gpt2@main/a",
    "hf://owner/name@main",
    "sqlite:///lake.db",
    "ray://head:10001",
    "file:///a/b@c",
    "memory://a/b@c",
    "/local/path:a@b",
    "/local/what?token=5.parquet",
]


@pytest.mark.parametrize("uri", SECRETS)
def test_a_uri_with_a_secret_is_known_and_cleaned(uri):
    """Passwords, keys and signatures, plain or percent-encoded; in a message none of them is left."""
    assert has_credentials(uri)
    assert "secret" not in str(PipelineError(f"{uri!r} is refused", uri)).lower()
    assert without_credentials(uri) == without_credentials(without_credentials(uri))


@pytest.mark.parametrize("uri", NO_SECRETS)
def test_a_uri_without_a_secret_stays_as_it_is(uri):
    """A container, a user, a port, a version, a folder of a partition."""
    assert not has_credentials(uri)
    assert f"{uri}: no such file; see a@b" == without_credentials(f"{uri}: no such file; see a@b")


@pytest.mark.parametrize("text", ["x://" + "%26" * 20_000, "s3://" + ":" * 50_000 + "@", "a:" * 20_000 + "://@"])
def test_a_long_text_of_foreign_origin_is_cleaned_in_one_go(text):
    """As an id may be: the time grows with its length, not with the square, which would be minutes here."""
    assert len(without_credentials(text)) <= len(text)
