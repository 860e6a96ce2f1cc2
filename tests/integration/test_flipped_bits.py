"""One bit of any object of a run is another: it is found and named, makes no other result, and can be repaired."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import forecast, storage
from pipeline.artifacts import CALIBRATION
from pipeline.audit import audit
from pipeline.ensemble import members_of
from pipeline.errors import ArtifactError
from pipeline.extend import extend
from pipeline.folder import PAGE_COMMENT, SPEC_COMMENT, digest_line_problem, json_bytes, parse_json, with_digest_line
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.members import gathered
from pipeline.picture import png_problem, to_png
from pipeline.run import rerank
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from pipeline.tuner import Tuner
from tests.conftest import exit_code
from tests.small import CLASSES, linear_on_pictures, one_thread, products, work_off

QUERIES = 16
"""From which on a run is calibrated."""
SEEDS = (1, 2)
KINDS = {
    "run.yaml", "manifest.parquet", "queries.parquet", "_SUCCESS", "calibration.json", "forecast.json", "commits/*",
    "additions/addition.json", "additions/manifest", "additions/queries", "counterparts/meta.json", "counterparts/changed",
    "fitted/meta.json", "fitted/fitted", "scores/*", "rejects/*", "partials/topk/*", "partials/sources/*", "topk/meta.json",
    "topk/ranked.parquet", "topk/sources.parquet", "topk/selected/*", "report/index.html", "report/contact_sheet.png",
}  # fmt: skip

OF_MEMBERS = ("run.yaml", "scores/*", "members/01/run.yaml", "members/01/queries.parquet", "members/01/scores/*")


def kind_of(path):
    """What sort of object it is: its path without numbers, digests and queries."""
    path = re.sub(r"query_id=[^/]+/|(?<=additions/)\d+/", "", path)
    path = re.sub(r"(manifest|queries|changed|fitted)-[0-9a-f]{16}\.\w+$", r"\1", path)
    return re.sub(r"(shard|part)-[^/]*$", "*", path)


def rows(first, stop, bad=()):
    rng = np.random.default_rng(first)
    pixels = [None if i in bad else rng.normal(size=16).tolist() for i in range(first, stop)]
    columns = {
        "id": [f"row-{i:02d}" for i in range(first, stop)],
        "pixels": pa.array(pixels, pa.list_(pa.float32())),
        "label": [i % CLASSES for i in range(first, stop)],
        "site": [f"site-{i % 2}" for i in range(first, stop)],
    }
    return pa.table(columns)


class World:
    """Pictures, a model over them, and runs that have every kind of object."""

    def __init__(self, folder):
        self.folder = folder
        for kind, name, *some in (("corpus", "a", 0, 8, (6,)), ("corpus", "b", 8, 13), ("later", "c", 13, 17)):
            (folder / kind).mkdir(exist_ok=True)
            pq.write_table(rows(*some), folder / kind / f"{name}.parquet")
        for name, number in (("asked", QUERIES), ("later", 1)):
            names = [f"{name}-{i:02d}" for i in range(number)]
            pq.write_table(rows(100, 100 + number).add_column(0, "query_id", [names]), folder / f"{name}.parquet")
        for seed in SEEDS:
            torch.manual_seed(seed)
            safetensors.torch.save_file(linear_on_pictures().state_dict(), folder / f"model-{seed}.safetensors")

    @property
    def later(self):
        return str(self.folder / "later.parquet"), str(self.folder / "later")

    def spec(self, uri, *overrides):
        tree = {
            "run": {"uri": str(uri)},
            "model": {
                "factory": "tests.small:linear_on_pictures", "weights_uri": str(self.folder / "model-1.safetensors")
            },
            "task": {"features": "pixels", "shape": [1, 4, 4]},
            "corpus": {"uri": str(self.folder / "corpus"), "example_id": "id", "source": "site", "check_ids": False},
            "queries": {"uri": str(self.folder / "asked.parquet")},
            "producer": {"name": "natural", "sample_rows": 8, "damping": 0.1, "curvature": "ekfac"},
            "score": {"shard_rows": 8, "batch_rows": 8, "max_reject_fraction": 0.2},
            "rank": {"k": 2},
        }  # fmt: skip
        return parse_spec(tree, overrides)

    def run(self, spec):
        """A finished run, its way of scoring chosen by a calibration, with a forecast."""
        run = gathered(freeze(spec))
        for each in members_of(run) or (run,):
            tuner = Tuner(each, "cpu")
            for (
                query_id
            ) in each.query_ids:  # one at a time, as one that is repaired: the solver's last bits depend on it
                tuner.tune(query_id)
        if not members_of(run):
            run.commit_measured(CALIBRATION, {**ShardScorer(run, "cpu").calibrate().to_json(), "way": "gradient"})
        run = work_off(run)
        workers = forecast.Workers(1, False, 1, False, "CPU", 1.0, "CPU", 1.0)
        found = forecast.Forecast(
            run.additions[-1].fingerprint, 13, 0.1, 0.2, 0.3, 0.4, {"difference": 1.0}, "difference", "tried", "-", workers
        )  # fmt: skip
        forecast.keep(run, found)
        return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With finished runs: `run`, `grown`, an `ensemble`."""
    with one_thread():
        made = World(tmp_path_factory.mktemp("bits"))
        run = made.run(made.spec(made.folder / "run"))
        assert "gradient" == run.way
        shutil.copytree(run.uri(), made.folder / "grown")
        work_off(extend(str(made.folder / "grown"), *made.later))
        rerank(str(made.folder / "grown"), ["rank.fraction=0.5"])
        uri = str(made.folder / "model-2.safetensors")
        made.run(made.spec(made.folder / "ensemble", f"ensemble=[{uri}]"))
        yield made


@pytest.fixture
def copy_of(world, tmp_path):
    """`copy_of(name)`: URI of a copy of a run, to be damaged."""
    return lambda name: str(shutil.copytree(world.folder / name, tmp_path / name))


def objects(uri):
    return {path: storage.read_bytes(f"{uri}/{path}") for path in storage.objects(uri)}


def one_of_each_kind(uri, rng):
    """Kind -> a random object of it."""
    found = {}
    for path in rng.permutation(sorted(storage.objects(uri))).tolist():
        found.setdefault(kind_of(path), path)
    return dict(sorted(found.items()))


def flipped(data, bit):
    """Bytes of which one bit is another."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def problems(uri):
    """What `verify` says: the error where the run cannot be opened, else path -> what is wrong."""
    try:
        run = open_run(uri)
    except ArtifactError as error:
        return str(error)
    return {
        each.uri(finding.path): finding.what
        for each in (run, *members_of(run))
        for finding in audit(each, shown=False).damage
    }


# --- digests of their own --------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), JSON, min_size=1, max_size=4), st.data())
def test_any_bit_of_a_json_object_counts(value, data):
    """It comes back as it was written, and no other bytes come back at all: not those that mean the same either."""
    written = json_bytes(value)
    assert value == parse_json(written, "here", "")
    changed = flipped(written, data.draw(st.integers(0, 8 * len(written) - 1)))
    with pytest.raises(ArtifactError, match="here is damaged"):
        parse_json(changed, "here", "")


@pytest.mark.parametrize(
    "same", [lambda data: data.replace(b"1e-05", b"1E-05"), lambda data: data + b" ", lambda data: b" " + data]
)
def test_bytes_count_and_not_what_they_mean(same):
    """An exponent in capitals or a blank is the same value, and damage."""
    changed = same(json_bytes({"lr": 1e-05}))
    assert changed != json_bytes({"lr": 1e-05})
    with pytest.raises(ArtifactError, match=r"is damaged, or was edited: got sha256 \w+, expected \w+"):
        parse_json(changed, "here", "")


@pytest.mark.parametrize("comment", [SPEC_COMMENT, PAGE_COMMENT])
def test_any_bit_of_a_text_with_a_digest_line_counts(comment):
    """In the text and in the line itself."""
    data = with_digest_line("seed: 0\nname: ü\n", comment)
    assert "" == digest_line_problem(data, comment)
    assert [] == [bit for bit in range(8 * len(data)) if not digest_line_problem(flipped(data, bit), comment)]


def test_any_bit_of_a_picture_counts():
    """PNG has a checksum for each of its chunks; a byte more or less is found, too."""
    from PIL import Image

    data = to_png(Image.new("RGB", (9, 5), "#336699"))
    assert "" == png_problem(data)
    assert [] == [bit for bit in range(8 * len(data)) if not png_problem(flipped(data, bit))]
    assert png_problem(data[:-1])
    assert png_problem(data + b"\0")


# --- a whole run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["run", "grown", pytest.param("ensemble", marks=pytest.mark.night)])
def test_any_bit_of_any_object_is_found_and_named(copy_of, name):
    """Random bits of one object of each kind: `verify` names the object."""
    uri, rng = copy_of(name), np.random.default_rng(0)
    assert {} == problems(uri)
    there = one_of_each_kind(uri, rng)
    only_grown = "additions/.*|topk/selected/.*"
    missing = {"ensemble": f"calibration.json|{only_grown}", "run": only_grown, "grown": "nothing"}[name]
    kinds = {re.sub(r"members/\d\d/", "", kind) for kind in there}
    assert {kind for kind in KINDS if not re.fullmatch(missing, kind)} == kinds
    for path in there.values():
        place = Path(uri, path)
        data = place.read_bytes()
        for bit in rng.integers(0, 8 * len(data), 1 if name == "ensemble" else 2).tolist():
            place.write_bytes(flipped(data, bit))
            found = problems(uri)
            assert f"{uri}/{path}" in found, f"bit {bit} of {path}: {found}"
        place.write_bytes(data)
    assert {} == problems(uri)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.night)], ids=["by turns", "every"])
def test_no_command_makes_another_result_of_a_flipped_bit(world, copy_of, monkeypatch, capsys, tmp_path, every):
    """status, show, gc, rank, run and extend: each ends with 6, or with the result of a run that is whole."""
    whole, rng = str(world.folder / "run"), np.random.default_rng(1)
    ranked = work_off(freeze(world.spec(copy_of("run"), "rank.k=3")))
    expected = storage.read_bytes(ranked.uri("topk", "ranked.parquet"))
    results = {"run": products(objects(whole)), "extend": products(objects(str(world.folder / "grown")))}
    for number, (kind, path) in enumerate(one_of_each_kind(whole, rng).items()):
        uri = str(shutil.copytree(whole, tmp_path / f"copy-{number}"))
        data = Path(uri, path).read_bytes()
        Path(uri, path).write_bytes(flipped(data, int(rng.integers(8 * len(data)))))
        for words in (["status"], ["show"], ["gc"], ["rank", "--k", "3"]):
            code = exit_code(monkeypatch, words[0], uri, *words[1:])
            assert code in (0, 6), f"{words} with {kind}: {capsys.readouterr().err}"
            if words[0] == "rank" and code == 0:
                assert expected == storage.read_bytes(f"{uri}/topk/ranked.parquet"), kind
        shutil.rmtree(uri)
        tried = list(results.items())  # all of them take minutes
        for command, result in tried if every else [tried[number % len(tried)]]:
            shutil.copytree(whole, uri)
            Path(uri, path).write_bytes(flipped(data, int(rng.integers(8 * len(data)))))
            try:
                work_off(freeze(world.spec(uri)) if command == "run" else extend(uri, *world.later))
            except ArtifactError:
                assert problems(uri), f"{command} with {kind}"
            else:
                assert result == products(objects(uri)), f"{command} with {kind}"
                assert {} == problems(uri), f"{command} with {kind}"
            shutil.rmtree(uri)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["grown", pytest.param("ensemble", marks=pytest.mark.night)])
def test_any_object_is_repaired_as_verify_says(world, tmp_path, name, monkeypatch, capsys):
    """`verify --mend`, then the run's command, or extend for an addition: the bytes of an undisturbed run."""
    whole, rng = str(world.folder / name), np.random.default_rng(2)
    before = products(objects(whole))
    overrides = [f"ensemble=[{world.folder / 'model-2.safetensors'}]"] if name == "ensemble" else []
    kinds = one_of_each_kind(whole, rng)
    if name == "ensemble":  # what differs from an ordinary run
        kinds = {kind: path for kind, path in kinds.items() if kind in OF_MEMBERS}
    for number, (kind, path) in enumerate(kinds.items()):
        uri = str(shutil.copytree(whole, tmp_path / f"copy-{number}"))
        data = Path(uri, path).read_bytes()
        Path(uri, path).write_bytes(flipped(data, int(rng.integers(8 * len(data)))))
        assert 6 == exit_code(monkeypatch, "verify", uri), kind
        said = capsys.readouterr()
        assert re.search(r"verify --mend|extend the run by the same", said.out + said.err), kind
        code = exit_code(monkeypatch, "verify", uri, "--mend")
        assert code == (6 if "additions/" in path else 0), (kind, capsys.readouterr().err)
        if name == "grown" and "additions/" in path:
            work_off(extend(uri, *world.later))
        run = work_off(freeze(world.spec(uri, *overrides)))
        assert before == products(objects(run.uri())), kind
        assert {} == problems(uri), kind
        assert run.is_sealed()
        rerank(uri, ["rank.k=2"])
        shutil.rmtree(uri)
