"""Everything of a run on S3: the same bytes as on a local disk, errors that say what is wrong, and keys that stay unseen."""

import copy
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from jobs import display
from jobs.seaweed import upload
from pipeline import storage
from pipeline.errors import ArtifactError, UnavailableError
from pipeline.formats.base import list_files
from pipeline.frozen import open_run
from pipeline.queries import read_queries
from pipeline.run import attribute, finish, rerank
from pipeline.spec import QueriesSection
from pipeline.specfile import parse_spec
from tests.conftest import CORPUS_ROWS, run_without_ray
from tests.contract.test_formats import CASES, corpus, plain_rows, read

pytestmark = pytest.mark.slow

PRODUCTS = ("counterparts", "scores", "rejects", "topk/ranked.parquet", "topk/sources.parquet")
"""What of a run is a function of spec and inputs, not of places and times."""


@pytest.fixture
def tree(s3, world):
    """A spec's YAML tree whose corpus, queries, weights and run all lie on S3, under a fresh prefix."""
    prefix = s3.prefix("world")
    made = copy.deepcopy(world.tree(f"{prefix}/run"))
    made["corpus"]["uri"] = upload(world.corpus, f"{prefix}/train/corpus.parquet").rsplit("/", 1)[0]
    made["queries"]["uri"] = upload(world.queries, f"{prefix}/queries.parquet")
    made["model"]["weights_uri"] = upload(world.weights, f"{prefix}/cnn.safetensors")
    return made


def products(run):
    """Path -> bytes of what must be equal, times in it left out."""
    found = {
        name: storage.read_bytes(run.uri(name)) for name in storage.objects(run.uri()) if name.startswith(PRODUCTS)
    }
    return {name: data for name, data in found.items() if not name.endswith(".json")}


def require_equal(run, other):
    """Two runs hold the same products, to the byte."""
    ours, theirs = products(run), products(other)
    assert sorted(ours) == sorted(theirs)
    assert [] == [name for name, data in ours.items() if theirs[name] != data]
    assert any(name.startswith("scores/") for name in ours)


def test_a_run_on_s3_writes_the_bytes_of_a_local_one(tree, make_spec):
    """All of it on S3, base losses too, written and read: counterparts, scores and ranked tables are those of a local disk."""
    kept = f"score.base_losses={tree['run']['uri']}-base"
    run = run_without_ray(parse_spec(tree, [kept]))
    finish(run)
    local = run_without_ray(make_spec())
    finish(local)
    require_equal(run, local)
    again = run_without_ray(parse_spec(tree, [kept, f"run.uri={tree['run']['uri']}-again"]))
    finish(again)
    require_equal(again, local)
    assert CORPUS_ROWS == sum(receipt.base_kept for receipt in again.receipts())
    assert CORPUS_ROWS == yaml.safe_load(storage.read_bytes(run.uri("_SUCCESS")))["rows"]


@pytest.mark.slow
def test_a_run_on_s3_is_opened_ranked_and_shown(tree, capsys):
    """`status`, `rank` and `show` need nothing but the URI."""
    finish(run_without_ray(parse_spec(tree)))
    run = rerank(tree["run"]["uri"], ["rank.k=2"])
    assert 2 * 2 * len(run.query_ids) == len(run.read_ranked()[0])
    display.show_status(open_run(run.uri()))
    display.show_run(run)
    shown = capsys.readouterr().out
    assert "150 rows scored" in shown
    assert run.uri("topk", "ranked.parquet") in shown
    line = shown.split("query them")[1].strip()
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert 0 == done.returncode, done.stderr
    assert "copy-of-77" in done.stdout


@pytest.mark.parametrize("word", CASES)
def test_every_format_reads_from_s3_what_it_reads_from_disk(word, s3, tmp_path):
    """Ids, sources, values and rejects of folders in folders, in small shards; a glob and a single file find theirs."""
    case, rows = CASES[word], plain_rows(9, labels=[0, 0, 0, 1, 1, 1, 2, 2, 2])
    rows[4]["pixels"] = None
    for folder in ("one", "two/deep"):
        (tmp_path / folder).mkdir(parents=True)
        case.write(tmp_path / folder / case.name, rows)
    uri = upload(tmp_path, s3.prefix(word))
    expected = read(corpus(tmp_path, source="label"), case.columns, 2)
    assert expected == read(corpus(uri, source="label"), case.columns, 2)
    assert (16, 2) == (len(expected["ids"]), len(expected["rejects"]))
    ending = f"{case.name}/*/*.png" if word == "image_folder" else case.name
    for path in (f"*/{ending}", f"**/{ending}", f"t?o/[a-e]eep/{ending}", f"two/deep/{case.name}"):
        here, there = (read(corpus(f"{folder}/{path}"), case.columns) for folder in (tmp_path, uri))
        assert here == there


@pytest.mark.parametrize("path", ["", "/*/*.csv", "/**/*.csv", "/*/part-*", "/one/part-0.csv"])
def test_a_listing_in_a_bad_moment_is_never_a_shorter_one(s3_fresh, s3_proxy, tmp_path, path):
    """Any one request of it may be throttled: all files are found, or none and an error."""
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
        for i in range(2):
            CASES["csv"].write(tmp_path / folder / f"part-{i}.csv", plain_rows(1))
    uri = upload(tmp_path, s3_fresh.prefix("listing")) + path
    files = list_files(uri)
    assert len(files.files) == (1 if path.endswith("0.csv") else 6)
    for after in range(4):
        s3_proxy.clear()
        s3_proxy.add("slow_down", after=after)
        assert files == list_files(uri)
    s3_proxy.add("slow_down", times=None)
    with pytest.raises(UnavailableError, match=r"; tried 8 times"):
        list_files(uri)


@pytest.mark.parametrize("word", ["parquet", "jsonl", "csv"])
def test_queries_in_every_format_are_read_from_s3(word, s3, tmp_path):
    """As from disk."""
    case = CASES[word]
    case.write(tmp_path / case.name, [{**row, "query_id": f"q{i}"} for i, row in enumerate(plain_rows(3))])
    uri = upload(tmp_path / case.name, f"{s3.prefix(word)}/{case.name}")
    there, here = (
        read_queries(QueriesSection(uri=str(one)), case.columns, None) for one in (uri, tmp_path / case.name)
    )
    assert here.equals(there)


def test_a_changed_object_is_refused(tree):
    """The same size and other bytes: the ETag says so, and the run is not gone on with."""
    run = run_without_ray(parse_spec(tree))
    path = f"{tree['corpus']['uri']}/corpus.parquet"
    data = bytearray(storage.read_bytes(path))
    data[100] ^= 1
    storage.write_bytes(path, bytes(data))
    with pytest.raises(ArtifactError, match=r"changed since(.|\n)*corpus\.parquet"):
        run_without_ray(parse_spec(tree))
    assert len(run.shards) == len(run.committed())


def command(folder, *words, **environment):
    """The command as a process of its own, with its exit code, output and seconds; None takes a variable away."""
    env = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    started_s = time.monotonic()
    words = [sys.executable, "-m", "jobs.cli", *words]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started_s


@pytest.fixture
def spec_path(tree, tmp_path):
    """The spec in a file of a folder from which `jobs` can be imported."""
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "spec.yaml"


WRONG = {
    "secret": ({"AWS_SECRET_ACCESS_KEY": "never-show-this"}, [], 7, "access denied", "credentials in the environment"),
    "no keys": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "HOME": "/nonexistent"},
        [], 7, "Unable to locate credentials", "AWS_ACCESS_KEY_ID",
    ),
    "endpoint": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, [], 7, "tried 4 times in", "AWS_ENDPOINT_URL"),
    "no url": ({"AWS_ENDPOINT_URL": "127.0.0.1:9"}, [], 7, "Invalid endpoint", "http://host:port"),
    "bucket of the run": ({}, ["run.uri=s3://no-such-bucket/run"], 7, "bucket does not exist", "AWS_ENDPOINT_URL"),
    "bucket of the corpus": ({}, ["corpus.uri=s3://no-such-bucket/x.parquet"], 7, "bucket does not exist", "AWS_ENDPOINT_URL"),
    "corpus": ({}, ["corpus.uri=s3://{bucket}/none/x.parquet"], 3, "does not exist", ""),
    "queries": ({}, ["queries.uri=s3://{bucket}/none/x.parquet"], 3, "does not exist", ""),
    "weights": ({}, ["model.weights_uri=s3://{bucket}/none/x.safetensors"], 3, "does not exist", ""),
}  # fmt: skip
"""What is wrong -> environment, overrides, exit code, what the message says, what the hint says."""
FAST = ("secret",)


@pytest.mark.parametrize("what", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in WRONG])
def test_what_is_wrong_with_a_store_is_said_in_seconds(what, s3, spec_path):
    """`mirrorscope plan` ends with the exit code of its kind of error, a sentence, a hint, and no traceback."""
    environment, overrides, expected, message, hint = WRONG[what]
    words = [word for override in overrides for word in ("--set", override.format(bucket=s3.bucket))]
    code, output, seconds = command(spec_path.parent, "plan", str(spec_path), *words, **environment)
    assert expected == code, output
    assert message in output
    assert hint in output
    assert "Traceback" not in output
    assert "never-show-this" not in output
    assert seconds < 60  # mostly imports; about 3 tries' pauses with a wrong endpoint


@pytest.mark.ray
def test_a_whole_run_on_s3_and_the_secret_nowhere_in_it(s3, spec_path, tree, make_spec):
    """As a process, all on S3, and again: the bytes of a local run, nothing done twice; in no object and no line the secret."""
    code, output, _ = command(spec_path.parent, "run", str(spec_path))
    assert 0 == code, output
    run, local = open_run(tree["run"]["uri"]), run_without_ray(make_spec())
    finish(local)
    require_equal(run, local)
    versions = {name: storage.stat(run.uri(name)) for name in products(run)}
    attribute(parse_spec(tree))
    assert versions == {name: storage.stat(run.uri(name)) for name in versions}
    assert not any(name.startswith(".train") for name in storage.objects(run.uri()))
    outputs = [output, command(spec_path.parent, "status", tree["run"]["uri"])[1]]
    outputs.append(command(spec_path.parent, "plan", str(spec_path), AWS_ACCESS_KEY_ID="wrong")[1])
    found = storage.objects(tree["run"]["uri"])
    assert {"run.yaml", "manifest.parquet", "_SUCCESS"} <= set(found)
    everything = {name: storage.read_bytes(f"{tree['run']['uri']}/{name}") for name in found}
    everything |= {name: unpacked(data) for name, data in everything.items() if name.endswith(".parquet")}
    everything["output"] = "\n".join(outputs).encode()
    for word in (s3.environment["AWS_SECRET_ACCESS_KEY"], s3.environment["AWS_ACCESS_KEY_ID"]):
        assert [] == [name for name, data in everything.items() if word.encode() in data]
    endpoint = s3.environment["AWS_ENDPOINT_URL"].encode()
    assert [] == [name for name, data in everything.items() if endpoint in data]


def unpacked(data):
    """A Parquet file's values and metadata as text: compressed pages hide what they hold."""
    table = pq.read_table(io.BytesIO(data))
    return f"{table.schema.to_string(show_field_metadata=True)} {table.to_pydict()}".encode()


def test_the_spec_has_no_place_for_keys():
    """Credentials and endpoint come from the environment only: no field of any section is meant for them."""
    code, output, _ = command(Path.cwd(), "fields")
    assert 0 == code
    for word in ("secret", "credential", "access_key", "endpoint"):
        assert word not in output.lower()
