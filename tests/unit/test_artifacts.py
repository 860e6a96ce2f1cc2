"""A run's folder: commits that read back, foreign and damaged objects that are refused, and names for odd ids."""

import dataclasses
import json
import shutil
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArtifactError, InputError
from pipeline.folder import SPEC_COMMENT, partition, with_digest_line
from pipeline.freeze import freeze
from pipeline.frozen import is_run, open_run
from pipeline.storage import bytes_digest
from pipeline.works import Receipt

ODD_IDS = ["a/b", "..", ".", "%2F", "a=b", "query_id=a", "größe 名", "two\nlines", " ", "A", "a", 'quo"te', "?*[]#&+"]


@pytest.fixture
def run(make_spec):
    """A frozen run: 150 rows in shards of 64, 64 and 22, two queries."""
    return freeze(make_spec())


@pytest.fixture
def write_queries(world, tmp_path):
    """`write_queries(ids)`: URI of a query file with one row per id."""

    def write(query_ids):
        table = {
            "query_id": query_ids,
            "pixels": list(world.pixels[: len(query_ids)]),
            "label": world.labels[: len(query_ids)],
        }
        path = tmp_path / "queries.parquet"
        pq.write_table(pa.table(table), path)
        return path

    return write


def receipt(run, shard_id, **changes):
    """What stage score would commit for a shard all of whose rows are good."""
    whole = Receipt(
        addition=0,
        shard_id=shard_id,
        fingerprint=run.resolved.fingerprint,
        rows=run.shards[shard_id].rows,
        rejects=0,
        files={"scores/query_id=a/shard-000000.parquet": {"bytes": 3, "sha256": "0" * 64}},
        started_at_s=1.5,
        finished_at_s=2.5,
        compute_s=0.25,
        k=5,
        transform="signed",
    )
    return dataclasses.replace(whole, **changes)


def commit_all(run, **changes_of_last):
    for shard in run.shards[:-1]:
        run.commit(receipt(run, shard.shard_id))
    run.commit(receipt(run, run.shards[-1].shard_id, **changes_of_last))


def test_a_frozen_run_opens_as_it_was_frozen(run):
    """Spec, manifest, task columns and queries survive the way to the folder and back."""
    opened = open_run(run.uri())
    assert (run.spec, run.shards, run.columns) == (opened.spec, opened.shards, opened.columns)
    assert run.queries.equals(opened.queries)
    assert (150, ("copy-of-3", "copy-of-77")) == (opened.rows, opened.query_ids)


def test_a_moved_run_folder_still_opens(run, tmp_path):
    """What run.yaml says of its own place does not count: reads and writes go to the new one."""
    run.commit(receipt(run, 0))
    moved = shutil.move(run.uri(), tmp_path / "elsewhere")
    opened = open_run(str(moved))
    assert (str(moved), {(0, 0)}) == (opened.uri(), opened.committed())
    opened.commit(receipt(run, 1))
    assert [0, 1] == [one.shard_id for one in open_run(str(moved)).receipts()]


def test_a_run_opens_by_a_relative_path_and_a_trailing_slash(run, monkeypatch):
    """The way to the folder does not matter."""
    monkeypatch.chdir(Path(run.uri()).parent)
    assert run.uri() == open_run("run/").uri()


def test_an_empty_folder_holds_no_run(tmp_path):
    """The message names the folder, the hint says what to give."""
    with pytest.raises(ArtifactError, match=r"holds no run \(no run.yaml\)") as caught:
        open_run(str(tmp_path))
    assert str(tmp_path) in caught.value.message
    assert "run.uri" in caught.value.hint
    assert not is_run(str(tmp_path))


def test_a_run_exists_once_run_yaml_does(run):
    """run.yaml is what makes a folder a run; it is written last."""
    assert is_run(run.uri())
    Path(run.uri("run.yaml")).unlink()
    assert not is_run(run.uri())


def test_a_spec_that_no_run_wrote_is_no_run(run, world):
    """A run.yaml without `resolved` was put there by hand."""
    tree = world.tree(run.uri())
    Path(run.uri("run.yaml")).write_text(json.dumps(tree))
    with pytest.raises(ArtifactError, match="no `resolved` section"):
        open_run(run.uri())


def test_an_edited_spec_is_found_though_its_digest_was_renewed(run):
    """The fingerprint is recomputed when a run is opened: another seed is another run."""
    path = Path(run.uri("run.yaml"))
    text, _ = path.read_text().rsplit("# sha256:", 1)
    assert "\nseed: 0\n" in text
    path.write_bytes(with_digest_line(text.replace("\nseed: 0\n", "\nseed: 1\n"), SPEC_COMMENT))
    with pytest.raises(ArtifactError, match=rf"got fingerprint \w+, expected {run.resolved.fingerprint}"):
        open_run(run.uri())


FROZEN = {
    "run.yaml that is no YAML": ("run.yaml", lambda data: b"run: ["),
    "run.yaml that is empty": ("run.yaml", lambda data: b""),
    "run.yaml cut in half": ("run.yaml", lambda data: data[: len(data) // 2]),
    "run.yaml that is not text": ("run.yaml", lambda data: b"\xff\xfe\x00\x01\x02"),
    "manifest of junk": ("manifest.parquet", lambda data: b"junk"),
    "manifest that is empty": ("manifest.parquet", lambda data: b""),
    "manifest cut in half": ("manifest.parquet", lambda data: data[: len(data) // 2]),
    "queries of junk": ("queries.parquet", lambda data: b"junk"),
    "queries cut in half": ("queries.parquet", lambda data: data[: len(data) // 2]),
}


@pytest.mark.parametrize(("name", "damage"), FROZEN.values(), ids=FROZEN)
def test_damage_to_what_was_frozen_is_an_artifact_error_that_names_the_file(run, name, damage):
    """Whatever happened to one of the three frozen files, the reader learns which it is."""
    path = Path(run.uri(name))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match=name):
        open_run(run.uri())


@pytest.mark.parametrize("name", ["manifest.parquet", "queries.parquet"])
def test_a_frozen_file_that_is_gone_is_an_artifact_error_that_names_it(run, name):
    """A run.yaml alone is an incomplete run."""
    Path(run.uri(name)).unlink()
    with pytest.raises(ArtifactError, match=name):
        open_run(run.uri())


def test_another_table_is_no_manifest(run):
    """A Parquet file that is not the one that was frozen is refused by name."""
    shutil.copy(run.uri("queries.parquet"), run.uri("manifest.parquet"))
    with pytest.raises(ArtifactError, match=r"manifest\.parquet is not what its commit says"):
        open_run(run.uri())


def test_commits_read_back_by_shard(run):
    """Receipts come back equal, sorted by shard, whatever the order of writing."""
    written = [receipt(run, 2, rejects=3, rows=19), receipt(run, 0), receipt(run, 1, k=9, transform="relative:0.001")]
    for one in written:
        run.commit(one)
    assert sorted(written, key=lambda one: one.shard_id) == list(run.receipts())
    assert {(0, 0), (0, 1), (0, 2)} == run.committed()


def test_a_fresh_run_has_no_commits(run):
    """Nothing is committed before it is written."""
    assert (set(), [], set()) == (run.committed(), list(run.receipts()), run.committed_queries())


def test_a_shard_committed_twice_counts_once(run):
    """The same name is written again."""
    run.commit(receipt(run, 1))
    run.commit(receipt(run, 1))
    assert [receipt(run, 1)] == list(run.receipts())


def test_a_complete_run_is_sealed_with_its_counts(make_spec):
    """_SUCCESS says how many rows were scored and rejected."""
    run = freeze(make_spec("score.max_reject_fraction=0.1"))
    commit_all(run, rows=20, rejects=2)
    run.seal()
    expected = {"shards": 3, "rows": 148, "rejects": 2, "commits": 3, "fingerprint": run.resolved.fingerprint}
    assert expected == run.read_json("_SUCCESS")


def test_a_run_with_a_missing_shard_is_not_sealed(run):
    """The message counts the commits; no _SUCCESS appears."""
    run.commit(receipt(run, 0))
    run.commit(receipt(run, 2))
    with pytest.raises(ArtifactError, match="2 of 3 shards are committed") as caught:
        run.seal()
    assert "score" in caught.value.hint
    assert not Path(run.uri("_SUCCESS")).exists()


@pytest.mark.parametrize(("rows", "rejects"), [(21, 0), (22, 1), (0, 0)])
def test_a_run_whose_rows_do_not_add_up_is_not_sealed(run, rows, rejects):
    """Every row of the corpus is scored or rejected, none twice."""
    commit_all(run, rows=rows, rejects=rejects)
    with pytest.raises(ArtifactError, match=f"commit shard-000002: {rows} scored .* {rejects} rejected .*expected 22"):
        run.seal()
    assert not Path(run.uri("_SUCCESS")).exists()


def test_a_commit_of_another_run_is_refused(run):
    """The message shows both fingerprints, the hint what to do."""
    run.commit(receipt(run, 1, fingerprint="another"))
    with pytest.raises(ArtifactError, match="commit shard-000001 carries fingerprint another, expected") as caught:
        list(run.receipts())
    assert run.resolved.fingerprint in caught.value.message
    assert "new run.uri" in caught.value.hint


NO_RECEIPTS = {
    "half a file": b'{"shard_id": 1, "rows"',
    "nothing": b"",
    "no text": b"\xff\xfe",
    "a list": b"[]",
    "null": b"null",
    "an empty object": b"{}",
    "an unknown field": b'{"shard_id": 1, "ghost": 2}',
    "a letter that flipped": json.dumps(
        {
            "addition": 0,
            "shard_id": 1,
            "fingerprint": "f",
            "rows": 1,
            "rejects": 0,
            "files": {"a": {"bytes": 1, "sha257": ""}},
        }
        | {"started_at_s": 1, "finished_at_s": 1, "compute_s": 1, "k": 1, "transform": "signed"}
    ).encode(),
}


@pytest.mark.parametrize("data", NO_RECEIPTS.values(), ids=NO_RECEIPTS)
def test_a_damaged_commit_is_an_artifact_error_that_names_the_file(run, data):
    """Anything in commits/ that is no receipt is told by its name."""
    commit_all(run)
    Path(run.uri("commits", "shard-000001.json")).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"shard-000001\.json"):
        list(run.receipts())


def test_a_counterpart_reads_back_as_committed(run):
    """Tensors to the byte; meta with the query, the fingerprint and the digest beside what was given."""
    run.commit_counterpart("copy-of-3", b"tensors", {"direction": 1, "details": {"noise_tries": 2}})
    assert b"tensors" == run.counterpart_tensors("copy-of-3")
    expected = {
        "direction": 1,
        "details": {"noise_tries": 2},
        "query_id": "copy-of-3",
        "fingerprint": run.resolved.fingerprint,
        "tensors": {
            "name": f"changed-{bytes_digest(b'tensors')[:16]}.safetensors",
            "bytes": 7,
            "sha256": bytes_digest(b"tensors"),
        },
    }
    assert expected == run.counterpart_meta("copy-of-3")
    assert {"copy-of-3"} == run.committed_queries()


def test_a_counterpart_without_its_meta_is_not_committed(run):
    """meta.json commits; tensors alone are what a killed worker left."""
    run.commit_counterpart("copy-of-3", b"tensors", {})
    Path(run.uri("counterparts", "query_id=copy-of-3", "meta.json")).unlink()
    assert set() == run.committed_queries()


def test_a_counterpart_of_another_run_is_refused(run, make_spec):
    """A folder copied from a run with another recipe is noticed by its fingerprint."""
    other = freeze(make_spec("producer.lr=0.5", name="other"))
    other.commit_counterpart("copy-of-3", b"tensors", {"direction": 1})
    shutil.copytree(other.uri("counterparts"), run.uri("counterparts"))
    for read in (run.counterpart_meta, run.counterpart_tensors):
        with pytest.raises(ArtifactError, match="counterpart of query 'copy-of-3' carries fingerprint"):
            read("copy-of-3")


def test_changed_tensors_of_a_counterpart_are_noticed(run):
    """The digest in meta.json does not fit: the hint says what to do."""
    run.commit_counterpart("copy-of-3", b"tensors", {"direction": 1})
    Path(run.uri(run.tensors_path("copy-of-3"))).write_bytes(b"tensorz")
    with pytest.raises(
        ArtifactError, match=r"counterpart of query 'copy-of-3' is damaged: got sha256 \w+, exp"
    ) as caught:
        run.counterpart_tensors("copy-of-3")
    assert f"verify --mend {run.uri()}" in caught.value.hint


def test_the_first_counterpart_of_a_query_stands(run):
    """Whoever comes second, with other bytes, changes nothing: shards may be scored under the first already."""
    run.commit_counterpart("copy-of-3", b"first", {"direction": 1})
    run.commit_counterpart("copy-of-3", b"second", {"direction": -1})
    assert (b"first", 1) == (run.counterpart_tensors("copy-of-3"), run.counterpart_meta("copy-of-3")["direction"])


@pytest.mark.parametrize("data", [b'{"direction":', b"", b"\xff", b"[]", b"null", b"{}"], ids=repr)
def test_a_damaged_meta_of_a_counterpart_is_an_artifact_error_that_names_the_query(run, data):
    """Whatever stands in meta.json, the reader learns whose it is."""
    run.commit_counterpart("copy-of-3", b"tensors", {"direction": 1})
    Path(run.uri("counterparts", "query_id=copy-of-3", "meta.json")).write_bytes(data)
    with pytest.raises(ArtifactError, match="copy-of-3"):
        run.counterpart_meta("copy-of-3")


def test_a_meta_without_its_digest_is_damaged(run):
    """A counterpart that cannot be checked is not used."""
    run.commit_counterpart("copy-of-3", b"tensors", {"direction": 1})
    meta = json.dumps({"fingerprint": run.resolved.fingerprint})
    Path(run.uri("counterparts", "query_id=copy-of-3", "meta.json")).write_text(meta)
    with pytest.raises(ArtifactError, match="copy-of-3"):
        run.counterpart_tensors("copy-of-3")


def test_odd_query_ids_have_folders_of_their_own(make_spec, write_queries):
    """Slashes, dots, percent signs, line breaks: each id commits and reads back its own counterpart."""
    run = freeze(make_spec(f"queries.uri={write_queries(ODD_IDS)}"))
    assert tuple(ODD_IDS) == run.query_ids
    for query_id in ODD_IDS:
        run.commit_counterpart(query_id, query_id.encode(), {})
    assert set(ODD_IDS) == run.committed_queries()
    assert [query_id.encode() for query_id in ODD_IDS] == [run.counterpart_tensors(query_id) for query_id in ODD_IDS]
    assert len(ODD_IDS) == len(list(Path(run.uri("counterparts")).iterdir()))


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_a_partition_is_one_folder_name_that_says_its_query(query_id):
    """No separator is left in it, and unquoting gives the id back: no two ids share a folder."""
    name = partition(query_id)
    assert f"query_id={query_id}" == unquote(name)
    assert name.isascii()
    assert not set(name) & set('/\\ \n:*?"<>|#')


@pytest.mark.parametrize("letter", ["a", "ü", "名", "/"])
def test_a_query_id_that_freezing_accepts_can_be_committed(make_spec, write_queries, letter):
    """An id too long for a folder's name is refused before any work; all others can be stored."""
    query_id = letter * 200
    try:
        run = freeze(make_spec(f"queries.uri={write_queries([query_id])}"))
    except InputError as error:
        assert "query_id" in str(error)  # noqa: PT017  refusing is as good as storing
    else:
        run.commit_counterpart(query_id, b"tensors", {})
        assert {query_id} == run.committed_queries()


@pytest.mark.parametrize("query_id", ["", "a" * 256], ids=["empty", "long"])
def test_query_ids_that_make_no_folder_name_are_refused(make_spec, write_queries, query_id):
    """Nothing is written for an empty id, or one that is too long."""
    spec = make_spec(f"queries.uri={write_queries(['fine', query_id])}")
    with pytest.raises(InputError, match=rf"query_id .*got {len(query_id)} characters, expected 1 or more"):
        freeze(spec)
    assert not is_run(spec.run.uri)


def test_tables_read_back_with_the_digest_of_their_bytes(run):
    """`write_table` says what a commit records of the object."""
    table = pa.table({"a": [1, 2, None]})
    written = run.write_table(table, "topk", "ranked.parquet")
    data = Path(run.uri("topk", "ranked.parquet")).read_bytes()
    assert {"bytes": len(data), "sha256": bytes_digest(data)} == written
    assert table.equals(run.read_table("topk", "ranked.parquet"))


def test_a_run_that_is_not_ranked_has_no_ranked_table(run):
    """The hint says how to get there."""
    with pytest.raises(ArtifactError, match="is not ranked yet") as caught:
        run.read_ranked()
    assert "mirrorscope status" in caught.value.hint
