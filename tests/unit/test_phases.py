"""What a worker is at: said, noted in the run's folder, read by others."""

import json
import time

import pytest

from pipeline import phases
from pipeline.phases import FOLDER, OLD_S, Note, Phase, of_run


def test_a_listener_hears_what_is_said_while_it_listens():
    """Every item with how many are done before it; nothing before or after the block."""
    heard = []
    phases.at("before", 0, 1, "rows")
    with phases.heard_by(lambda *said: heard.append(said)):
        assert ["a", "b"] == list(phases.each("pass 1", "batches", ["a", "b"]))
    phases.at("after", 0, 1, "rows")
    assert [("pass 1", 0, 2, "batches"), ("pass 1", 1, 2, "batches")] == heard


def test_a_worker_leaves_a_note_that_others_read(tmp_path):
    """The last that was said, of the worker that wrote last; gone when it is forgotten."""
    uri = str(tmp_path)
    assert of_run(uri) is None
    for rank in (1, 0):
        with Note(uri, rank).taken():
            phases.at("pass 1", 0, 4, "batches")
            phases.at("pass 1", 1 + rank, 4, "batches")
    found = of_run(uri)
    assert ("pass 1", 1, 4, "batches") == (found.name, found.done, found.total, found.unit)
    assert found.line().startswith("pass 1 1/4 batches, ETA 0:00")
    phases.forget(uri)
    assert of_run(uri) is None


def test_what_is_left_is_reckoned_from_the_phase_alone():
    """Ten seconds for one of four; nothing where none is done, or all are."""
    assert "gradients 1/4 batches, ETA 0:30" == Phase("gradients", 1, 4, "batches", 100.0, 110.0).line()
    assert "gradients 0/4 batches" == Phase("gradients", 0, 4, "batches", 100.0, 110.0).line()
    assert "gradients 4/4 batches" == Phase("gradients", 4, 4, "batches", 100.0, 110.0).line()


@pytest.mark.parametrize("text", ["", "{}", "[1]", json.dumps({"name": "x"}), "cut {"])
def test_a_note_that_is_none_is_passed_over(tmp_path, text):
    """A page of status does not fail on it."""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "00000.json").write_text(text)
    assert of_run(str(tmp_path)) is None


def test_an_old_note_is_of_a_worker_that_is_gone(tmp_path):
    """Killed, it could not take it away."""
    (tmp_path / FOLDER).mkdir()
    note = {"name": "x", "done": 1, "total": 2, "unit": "", "started_s": 0.0, "at_s": time.time() - OLD_S - 1}
    (tmp_path / FOLDER / "00000.json").write_text(json.dumps(note))
    assert of_run(str(tmp_path)) is None
