"""Base losses that one run computes and others read: the same scores to the bit, and none that is not right."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

from pipeline.base_losses import ShardLosses, fingerprint
from pipeline.extend import extend
from pipeline.freeze import freeze, survey
from pipeline.plan import identity
from tests.conftest import exit_code, run_without_ray
from tests.small import CLASSES, linear, products, work_off

pytestmark = pytest.mark.slow  # every one runs twice
ROWS, REJECTED, QUERIES = 13, 1, 2
SHARDS = 4
FACTOR = 1.0


class Scaled(nn.Module):
    """The small world's model, and code that somebody edits while its weights stay."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = linear().weight, linear().bias

    def forward(self, features):
        return FACTOR * nn.functional.linear(features, self.weight, self.bias)


@pytest.fixture
def done(small, tmp_path):
    """`done("name", "path=value", ...)`: the scored run of that name, with base losses kept in `base` beside it."""

    def do(name, *overrides):
        return work_off(freeze(small.spec(tmp_path / name, f"score.base_losses={tmp_path / 'base'}", *overrides)))

    return do


@pytest.fixture
def filled(done, small, tmp_path):
    """The objects that a run with two queries left there, each of one shard."""
    done("first")
    kept = sorted((tmp_path / "base").rglob("*.npy"))
    assert SHARDS == len(kept)
    return kept


def rows_read(run):
    return sum(receipt.base_kept for receipt in run.receipts())


def objects(run):
    return products(
        {str(path.relative_to(run.uri())): path.read_bytes() for path in Path(run.uri()).rglob("*.parquet")}
    )


def bare(small, tmp_path, *overrides):
    """The objects of a run that keeps nothing."""
    return objects(work_off(freeze(small.spec(tmp_path / "bare", *overrides))))


def changed(path, change):
    """Replace losses by others that bear valid digests."""
    losses = np.load(io.BytesIO(path.read_bytes()))
    change(losses)
    ShardLosses(str(path), path.read_bytes()[-64:-32]).write(losses)


def test_another_query_reads_them_and_has_the_bits_of_a_run_without(make_spec, world, tmp_path):
    """A CNN, last batches that are filled up, weights that have moved: no base loss is computed, no byte of a score differs."""
    kept = f"score.base_losses={tmp_path / 'base'}"
    one, other, weights = tmp_path / "one.parquet", tmp_path / "other.parquet", tmp_path / "moved.safetensors"
    pq.write_table(pq.read_table(world.queries).slice(0, 1), one)
    pq.write_table(pq.read_table(world.queries).slice(1, 1), other)
    shutil.copy(world.weights, weights)
    assert 0 == rows_read(run_without_ray(make_spec(kept, f"queries.uri={one}", name="first")))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*.npy")}
    ours = run_without_ray(make_spec(kept, f"queries.uri={other}", f"model.weights_uri={weights}", name="second"))
    assert 150 == rows_read(ours)
    assert objects(run_without_ray(make_spec(f"queries.uri={other}", name="bare"))) == objects(ours)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*.npy")}


def test_what_is_kept_is_what_is_scored_with(done, small, tmp_path):
    """A loss that is moved, under valid digests and in a shard's second batch, moves the scores, and only its own."""
    batches = "score.batch_rows=2"
    done("first", batches)
    changed(max((tmp_path / "base").rglob("*.npy")), lambda losses: losses.__setitem__(-1, 7.0))
    ours, theirs = objects(done("second", batches)), bare(small, tmp_path, batches)
    tables = {name: pq.read_table(io.BytesIO(data)) for name, data in ours.items() if name.startswith("scores/")}
    assert QUERIES == sum((table["base_loss"].to_numpy() == 7.0).sum() for table in tables.values())
    assert QUERIES == sum(ours[name] != theirs[name] for name in tables)


@pytest.mark.parametrize("override", ["score.batch_rows=3", "model.weights_uri={folder}/linear-2.safetensors"])
def test_what_decides_a_loss_has_losses_of_its_own(filled, done, small, tmp_path, override):
    """Other batches or weights find nothing, and touch nothing."""
    override = override.format(folder=small.folder)
    before = {path: path.read_bytes() for path in filled}
    ours = done("second", override)
    assert 0 == rows_read(ours)
    assert bare(small, tmp_path, override) == objects(ours)
    assert before == {path: path.read_bytes() for path in filled}
    assert 2 == len(list((tmp_path / "base").iterdir()))


def test_the_fingerprint_follows_what_decides_a_loss_and_nothing_else(small):
    """Contents of weights, model, task, batches, device, threads; and the seed where it makes the weights."""

    def mark(*overrides, **digests):
        return fingerprint(small.spec("run", *overrides), digests)

    base = mark(weights="a", queries="q", corpus="c")
    same = (
        "seed=1",
        "producer.steps=9",
        "score.shard_rows=3",
        "model.weights_uri=elsewhere",
        "rank.k=9",
        "queries.uri=x",
    )
    assert {base} == {mark(override, weights="a") for override in same}
    other = (
        "score.batch_rows=3",
        "score.batch_tokens=9",
        "model.dtype=float64",
        "model.factory=a:b",
        "task.temperature=3",
        "resources.score.cpus=2",
        "resources.score.gpus=1",
    )
    marks = {base, mark(weights="b"), mark(), mark("seed=1"), *(mark(override, weights="a") for override in other)}
    assert 4 + len(other) == len(marks)


def test_a_file_replaced_in_place_has_other_losses(filled, done, small, tmp_path):
    """One of two corpus files is written anew: its shards are computed, those of the other are read."""
    part = small.folder / "corpus" / "part-1.parquet"
    table = pq.read_table(part)
    pq.write_table(
        table.set_column(2, "label", [[(label + 1) % CLASSES for label in table["label"].to_pylist()]]), part
    )
    ours = done("second")
    assert 8 - REJECTED == rows_read(ours)
    assert bare(small, tmp_path) == objects(ours)


def test_a_file_replaced_under_its_old_name_size_and_time_is_noticed(done, small, tmp_path, capsys):
    """What went through the model is compared, not what the listing says; the losses are replaced."""
    part = small.folder / "corpus" / "part-1.parquet"
    table, plain = pq.read_table(part), {"compression": "none", "use_dictionary": False}
    pq.write_table(table, part, **plain)
    was = part.stat()
    done("first")
    features = [[-x for x in row] for row in table["features"].to_pylist()]
    pq.write_table(table.set_column(1, "features", pa.array(features, table["features"].type)), part, **plain)
    os.utime(part, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (was.st_size, was.st_mtime) == (part.stat().st_size, part.stat().st_mtime)
    ours = done("second")
    assert 2 == capsys.readouterr().err.count("is of other contents than the corpus has now")
    assert 8 - REJECTED == rows_read(ours)
    assert bare(small, tmp_path) == objects(ours)
    assert ROWS - REJECTED == rows_read(done("third"))


DAMAGES = {
    "cut": lambda data: data[:-5],
    "empty": lambda data: b"",
    "a bit": lambda data: data[:130] + bytes([data[130] ^ 1]) + data[131:],
    "longer": lambda data: data + b"\0",
    "foreign": lambda data: b"PAR1" * 100,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_losses_are_computed_anew_and_replaced(filled, done, small, tmp_path, capsys, how):
    """Said by name; the run goes on, its scores are right, and the object is what it was."""
    before = filled[1].read_bytes()
    filled[1].write_bytes(DAMAGES[how](before))
    ours = done("second")
    assert f"warning: {filled[1]} is damaged" in capsys.readouterr().err
    assert 0 < rows_read(ours) < ROWS - REJECTED
    assert bare(small, tmp_path) == objects(ours)
    assert before == filled[1].read_bytes()


def test_other_code_than_the_losses_were_made_with_is_noticed(done, small, tmp_path, capsys, monkeypatch):
    """Code has no digest: a worker computes one batch itself before it takes what is kept, then all of it, and replaces it."""
    factory = "model.factory=tests.integration.test_base_losses:Scaled"
    done("first", factory)
    monkeypatch.setattr("tests.integration.test_base_losses.FACTOR", 0.5)
    ours = done("second", factory)
    assert 1 == capsys.readouterr().err.count("computed with other code, libraries or hardware")
    assert 0 == rows_read(ours)
    assert bare(small, tmp_path, factory) == objects(ours)
    assert ROWS - REJECTED == rows_read(done("third", factory))


def test_a_folder_that_cannot_be_written_ends_no_run(done, small, tmp_path, capsys):
    """Said, at most once in a while; scores are as ever."""
    (tmp_path / "base").write_text("a file stands here")
    ours = done("first")
    assert "warning: base losses are not kept: " in capsys.readouterr().err
    assert bare(small, tmp_path) == objects(ours)


def test_members_of_an_ensemble_have_losses_each_and_find_them_again(filled, done, small, tmp_path):
    """The first member is the model of a run before: its losses are read, those of the others kept for the next."""
    ours = done("second", small.ensemble())
    rows = ROWS - REJECTED
    assert [rows, 0, 0] == [rows_read(member) for member in ours.members]
    assert 0 == rows_read(ours)
    assert bare(small, tmp_path, small.ensemble()) == objects(ours)
    kept = f"score.base_losses={tmp_path / 'base'}"
    plan = survey(small.spec(tmp_path / "third", kept, small.ensemble()))[1]
    assert (3 * ROWS, 3 * ROWS * QUERIES) == (plan.kept, plan.forward_passes)
    assert [rows, rows, rows] == [rows_read(member) for member in done("third", small.ensemble()).members]


def test_a_grown_run_reads_them_under_its_new_queries(filled, done, small, tmp_path):
    """Old shards under new queries need no base pass; new shards leave theirs."""
    run = done("first")
    queries, corpus = small.later
    run = work_off(extend(run.uri(), queries, corpus))
    read = {receipt.name: receipt.base_kept for receipt in run.receipts() if receipt.addition == 1}
    assert ROWS - REJECTED == sum(read.values())
    assert len(read) == len(list((tmp_path / "base").rglob("*.npy")))


def test_it_may_change_between_two_starts_and_plan_and_status_say_what_is_kept(
    filled, small, tmp_path, monkeypatch, capsys
):
    """Not part of a run's identity; forward passes that are left out are counted, and so are rows that were."""
    run_uri, kept = tmp_path / "second", f"score.base_losses={tmp_path / 'base'}"
    freeze(small.spec(run_uri))
    spec = small.spec(run_uri, kept)
    assert identity(small.spec(run_uri)) == identity(spec)
    path = tmp_path / "spec.yaml"
    path.write_text(Path(run_uri, "run.yaml").read_text())
    assert 0 == exit_code(monkeypatch, "plan", str(path), "--set", kept)
    said = f"26 = 13 examples x (1 base + {QUERIES} counterparts) - {ROWS} base losses that are kept"
    assert said in capsys.readouterr().out
    work_off(freeze(spec))
    assert 0 == exit_code(monkeypatch, "status", str(run_uri))
    assert f"{ROWS - REJECTED} rows with base losses that were kept" in capsys.readouterr().out


def test_verify_and_gc_leave_them_alone(filled, done, tmp_path, monkeypatch):
    """They belong to no run."""
    run_uri = done("second").uri()
    assert 0 == exit_code(monkeypatch, "verify", run_uri)
    assert 0 == exit_code(monkeypatch, "gc", run_uri, "--older-than", "0")
    assert all(path.exists() for path in filled)
