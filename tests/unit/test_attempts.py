"""Who works on which shard, how often it was begun, and the gate that keeps a suspect alone."""

import threading
import time

import pytest

from pipeline.attempts import Attempts, Gate

SOON_S = 5.0
A_MOMENT_S = 0.05


def begin(attempts, actor, name, alone=False):
    return attempts.begin(actor, f"handle of {actor}", f"worker {actor}", name, alone)


def test_a_shard_is_counted_until_it_ends():
    """An attempt that ends is forgotten; one that does not is a death, and the next attempt says so."""
    attempts = Attempts()
    assert 1 == begin(attempts, "a", "one")
    attempts.end("a", "worker a", "one")
    assert 1 == begin(attempts, "a", "one")
    attempts.hello("a")  # it died and was started again
    assert [] == attempts.running()
    assert [2, 3] == [begin(attempts, "a", "one", alone=True), begin(attempts, "b", "one", alone=True)]


def test_a_shard_that_was_begun_before_is_refused_beside_others():
    """0 says: try it alone. Asking is not an attempt."""
    attempts = Attempts()
    begin(attempts, "a", "one")
    attempts.hello("a")
    assert [0, 0] == [begin(attempts, "a", "one"), begin(attempts, "b", "one")]
    assert 2 == begin(attempts, "a", "one", alone=True)
    assert 1 == begin(attempts, "a", "innocent")


def test_what_is_worked_on_is_told_longest_first():
    """Of all actors, with worker and number."""
    attempts = Attempts()
    for actor, name in (("a", "one"), ("b", "two"), ("a", "three")):
        begin(attempts, actor, name)
        time.sleep(0.002)
    attempts.end("b", "worker b", "two")
    told = attempts.running()
    assert [("one", "worker a", 1), ("three", "worker a", 1)] == [
        (each.name, each.worker, each.number) for each in told
    ]
    assert told[0].lasting_s >= told[1].lasting_s + 0.004


def test_how_long_a_shard_lasts_is_no_question_of_the_clock(monkeypatch):
    """A machine's time that is set forward by a day, or back, makes no shard last longer or shorter."""
    attempts = Attempts()
    for name, day_s in (("one", 0.0), ("two", 86400.0), ("three", -86400.0)):
        monkeypatch.setattr(time, "time", lambda day_s=day_s: 1e9 + day_s)
        begin(attempts, "a", name)
    told = attempts.running()
    assert ["one", "two", "three"] == [each.name for each in told]
    assert all(0 <= each.lasting_s < SOON_S for each in told)
    assert 1e9 == told[0].begun_at_s


def test_news_of_a_process_that_is_over_counts_for_nothing():
    """An actor that has started again is at work on the shard: what its last process still sends does not end that."""
    attempts = Attempts()
    begin(attempts, "a", "one")
    attempts.hello("a")
    attempts.begin("a", "handle of a", "next worker of a", "one", alone=True)
    attempts.end("a", "worker a", "one")
    assert [("one", 2)] == [(each.name, each.number) for each in attempts.running()]


class Walker(threading.Thread):
    """Goes through a gate and stays in there until it is told to leave."""

    def __init__(self, passage):
        super().__init__(daemon=True)
        self.passage, self.inside, self.leave = passage, threading.Event(), threading.Event()
        self.start()

    def run(self):
        with self.passage:
            self.inside.set()
            self.leave.wait(SOON_S)

    def is_inside(self):
        return self.inside.wait(A_MOMENT_S)

    def goes(self):
        self.leave.set()
        self.join(SOON_S)
        assert not self.is_alive()


def test_together_are_several():
    """Shards that nothing is known of pass side by side."""
    gate = Gate()
    walkers = [Walker(gate.together()) for _ in range(3)]
    assert all(walker.inside.wait(SOON_S) for walker in walkers)
    for walker in walkers:
        walker.goes()


def test_alone_is_alone_and_does_not_starve():
    """A suspect waits for all who are inside; who comes later waits for it, other suspects too."""
    gate = Gate()
    first = Walker(gate.together())
    assert first.inside.wait(SOON_S)
    suspect = Walker(gate.alone())
    assert not suspect.is_inside()
    later, other = Walker(gate.together()), Walker(gate.alone())
    assert not later.is_inside()
    first.goes()
    inside = next(one for _ in range(100) for one in (suspect, other) if one.is_inside())
    assert inside.inside.is_set()
    assert not later.is_inside()
    inside.goes()
    second = other if inside is suspect else suspect
    assert second.inside.wait(SOON_S)
    assert not later.is_inside()
    second.goes()
    assert later.inside.wait(SOON_S)
    later.goes()


@pytest.mark.parametrize("passage", ["together", "alone"])
def test_an_error_opens_the_gate_again(passage):
    """Whoever leaves by an exception leaves."""
    gate = Gate()
    with pytest.raises(ValueError, match="work"), getattr(gate, passage)():
        raise ValueError("work")
    walker = Walker(gate.alone())
    assert walker.inside.wait(SOON_S)
    walker.goes()
