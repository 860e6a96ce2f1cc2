"""The whole way from spec to report, with the workers' work done in this process: what is right does not need Ray."""

import copy
import csv
import json
import os
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipeline import freeze, rank, report, storage
from pipeline.corpus import Corpus
from pipeline.errors import ArtifactError, ContractError, InputError, NumericsError, SpecError, StorageError
from pipeline.frozen import open_run
from pipeline.producers.base import Produced
from pipeline.records import Column, Shard
from pipeline.run import finish, rerank
from pipeline.scorer import ShardScorer
from pipeline.spec import CorpusSection
from pipeline.specfile import load_spec
from pipeline.tuner import Tuner
from tests.conftest import CORPUS_ROWS, read_scores, run_without_ray, tuned

pytestmark = pytest.mark.slow


def score_bytes(run):
    return {
        path.relative_to(run.uri()): path.read_bytes() for path in sorted(Path(run.uri("scores")).rglob("*.parquet"))
    }


def test_every_row_ends_in_scores_once_per_query(make_spec, world):
    """150 rows and 2 queries make 300 score rows; the run is sealed."""
    run = run_without_ray(make_spec())
    finish(run)
    scores = read_scores(run)
    assert sorted(world.table()["id"].to_pylist() * 2) == sorted(scores["example_id"].to_pylist())
    sealed = json.loads(Path(run.uri("_SUCCESS")).read_text())
    assert (sealed["shards"], sealed["rows"], sealed["rejects"]) == (3, CORPUS_ROWS, 0)


def test_the_same_spec_gives_the_same_bytes(make_spec):
    """Two runs of one spec write the same score files, to the byte."""
    first, second = run_without_ray(make_spec(name="a")), run_without_ray(make_spec(name="b"))
    assert score_bytes(first) == score_bytes(second)


@pytest.mark.parametrize(
    "shard_rows", [pytest.param(7, marks=pytest.mark.slow), 17, pytest.param(50, marks=pytest.mark.slow), 1000]
)
def test_scores_do_not_depend_on_the_shard_size(make_spec, shard_rows):
    """Other shards, in another order: every loss and score is the same to the bit."""
    ours = run_without_ray(make_spec(f"score.shard_rows={shard_rows}"), shard_order=lambda shards: shards[::-1])
    assert read_scores(run_without_ray(make_spec(name="other"))).equals(read_scores(ours))


def test_counterparts_that_find_no_room_wait_in_files(make_spec, tmp_path, monkeypatch, capsys):
    """Said, with what it means; every score is the same to the bit, and no file stays behind."""
    monkeypatch.setenv("MIRRORSCOPE_CACHE", str(tmp_path / "waiting"))
    ours = run_without_ray(make_spec("resources.score.counterparts_gib=1e-6"))
    assert "2 passes over each shard while it is in memory, with up to 1 at a time" in capsys.readouterr().err
    assert [] == os.listdir(tmp_path / "waiting")
    assert score_bytes(run_without_ray(make_spec(name="other"))) == score_bytes(ours)


def test_a_disk_without_room_for_what_waits_is_named(make_spec, tmp_path, monkeypatch):
    """With how to choose another."""
    spec = tuned(make_spec("resources.score.counterparts_gib=1e-6"))
    (tmp_path / "full").write_text("no folder")
    monkeypatch.setenv("MIRRORSCOPE_CACHE", str(tmp_path / "full"))
    with pytest.raises(
        StorageError, match=r"2 counterparts of .* GiB cannot wait in .*full(.|\n)*set MIRRORSCOPE_CACHE"
    ):
        run_without_ray(spec)


def test_run_yaml_runs_again_as_is(make_spec, tmp_path):
    """The resolved spec of a run, pointed at a new folder, gives the same score bytes."""
    first = run_without_ray(make_spec())
    again = load_spec(first.uri("run.yaml"), [f"run.uri={tmp_path / 'again'}"])
    assert score_bytes(first) == score_bytes(run_without_ray(again))


def test_a_resolved_spec_is_refused_on_other_inputs(make_spec, world, tmp_path):
    """run.yaml carries digests: other queries behind the same path are noticed."""
    queries = tmp_path / "queries.parquet"
    queries.write_bytes(world.queries.read_bytes())
    run = freeze.freeze(make_spec(f"queries.uri={queries}"))
    pq.write_table(pq.read_table(queries).slice(0, 1), queries)
    with pytest.raises(ArtifactError, match="resolved with other inputs: queries changed"):
        freeze.freeze(load_spec(run.uri("run.yaml"), [f"run.uri={tmp_path / 'again'}"]))


def test_a_rerun_does_only_what_is_missing(make_spec):
    """Committed shards and counterparts keep their files; a lost commit is made again with the same bytes."""
    run = run_without_ray(make_spec())
    before = score_bytes(run)
    stamps = {path: path.stat().st_mtime_ns for path in Path(run.uri()).rglob("*.*")}
    Path(run.uri("commits", "shard-000001.json")).unlink()
    run_without_ray(make_spec())
    touched = {path.name for path, stamp in stamps.items() if path.exists() and path.stat().st_mtime_ns != stamp}
    assert before == score_bytes(run)
    assert {"shard-000001.parquet", "shard-000001-5-signed.parquet", "shard-000001.json"} == touched


def test_a_changed_spec_is_refused_naming_the_field(make_spec):
    """A run folder belongs to one spec; the refusal says which field differs."""
    run_without_ray(make_spec())
    with pytest.raises(ArtifactError, match=r"producer\.lr: 0\.01 -> 0\.7"):
        freeze.freeze(make_spec("producer.lr=0.7"))
    with pytest.raises(ArtifactError, match=r"seed: 0 -> 5"):
        freeze.freeze(make_spec("seed=5"))


def test_fields_that_move_no_score_may_change(make_spec):
    """k, workers and the reject fraction are taken from the new spec, and run.yaml says so."""
    freeze.freeze(make_spec())
    run = freeze.freeze(make_spec("rank.k=2", "score.max_reject_fraction=0.5", "resources.score.actors=1"))
    assert (run.spec.rank.k, run.spec.score.max_reject_fraction, run.spec.resources.score.actors) == (2, 0.5, 1)
    assert open_run(run.uri()).spec.rank.k == 2


def test_a_changed_corpus_is_refused_naming_the_file(make_spec, world, tmp_path, capsys):
    """Rewritten and removed corpus files are each named; one that is new is said and left out."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    pq.write_table(world.table().slice(0, 100), corpus / "a.parquet")
    pq.write_table(world.table().slice(100), corpus / "b.parquet")
    overrides = [f"corpus.uri={corpus}"]
    run = run_without_ray(make_spec(*overrides))
    pq.write_table(world.table().slice(0, 1), corpus / "c.parquet")
    assert run.shards == freeze.freeze(make_spec(*overrides)).shards
    assert "c.parquet is new in the corpus" in capsys.readouterr().err
    (corpus / "c.parquet").rename(corpus / "_c.parquet")
    (corpus / "b.parquet").rename(corpus / "_b.parquet")
    with pytest.raises(ArtifactError, match=r"b\.parquet: gone"):
        freeze.freeze(make_spec(*overrides))
    pq.write_table(world.table().slice(100, 20), corpus / "b.parquet")
    with pytest.raises(ArtifactError, match=r"b\.parquet: .* bytes of version"):
        freeze.freeze(make_spec(*overrides))
    assert run.rows == 150


# --- rejects ------------------------------------------------------------------------------------------------------------


def bad_corpus(world, folder):
    """The world's corpus with five rows that cannot be scored, each in its own way."""
    rows = world.table().to_pylist()
    rows[7]["pixels"] = [*rows[7]["pixels"][:3], float("nan"), *rows[7]["pixels"][4:]]
    rows[20]["pixels"] = rows[20]["pixels"][:63]
    rows[64]["label"] = None
    rows[65]["label"] = 99
    rows[149]["id"] = None
    path = folder / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=world.table().schema), path)
    return path


def test_rows_that_cannot_be_scored_are_rejected_with_their_reason(make_spec, world, tmp_path):
    """Five bad rows end in rejects/ with row, column, got, expected; the other 145 in scores with unchanged numbers."""
    path = bad_corpus(world, tmp_path)
    run = run_without_ray(make_spec(f"corpus.uri={path}", "score.max_reject_fraction=0.1"))
    finish(run)
    rejects = pq.read_table(run.uri("rejects")).to_pylist()
    found = {row["row"]: (row["column"], row["got"], row["expected"]) for row in rejects}
    assert found == {
        7: ("pixels", "nan at position 3", "finite numbers of shape 1x8x8"),
        20: ("pixels", "63 values", "finite numbers of shape 1x8x8"),
        64: ("label", "null", "an integer"),
        65: ("base_loss", "nan", "a finite loss"),
        149: ("id", "null", "an id"),
    }
    scores, clean = read_scores(run), read_scores(run_without_ray(make_spec(name="clean")))
    assert len(scores) == 2 * 145
    bad_ids = pa.array([f"digit-{row:03d}" for row in found])
    assert clean.filter(pa.compute.invert(pa.compute.is_in(clean["example_id"], bad_ids))).equals(scores)


def test_more_rejects_than_allowed_stop_the_run_and_say_where(make_spec, world, tmp_path):
    """The default tolerates none: how many, where they are, the first ones, and what to do."""
    run = run_without_ray(make_spec(f"corpus.uri={bad_corpus(world, tmp_path)}"))
    with pytest.raises(
        InputError, match=r"5 of 150 rows could not be scored(.|\n)*nan at position 3(.|\n)*max_reject_fraction"
    ):
        finish(run)
    assert not Path(run.uri("_SUCCESS")).exists()


# --- rank ---------------------------------------------------------------------------------------------------------------


def test_ranked_rows_are_what_sql_over_the_scores_lists(make_spec):
    """The top-k from partials equals a sort of all score rows, and carries the payload of each row."""
    run = run_without_ray(make_spec("corpus.payload=[label, author]"))
    ranked = rank.rank(run)
    sql = f"""SELECT query_id, example_id, score FROM '{run.uri("scores")}/*/*.parquet'
              QUALIFY row_number() OVER (PARTITION BY query_id ORDER BY score DESC, example_id) <= 5
              ORDER BY query_id, score DESC, example_id"""
    proponents = ranked.filter(pa.compute.equal(ranked["side"], "proponent"))
    got = list(zip(*(proponents[name].to_pylist() for name in ("query_id", "example_id", "score")), strict=True))
    assert duckdb.sql(sql).fetchall() == got
    for row in ranked.to_pylist():
        assert f"author-{int(row['example_id'][-3:]) % 3}" == row["author"]


@pytest.mark.parametrize("transform", ["signed", "absolute", "relative"])
def test_ranking_again_equals_having_ranked_so(make_spec, transform):
    """Another k and transform, from the score files, gives the table that a run with them would have made."""
    ranked_before = run_without_ray(make_spec())
    again = rerank(ranked_before.uri(), ["rank.k=9", f"rank.transform={transform}"]).read_ranked()[0]
    assert (9, transform) == (
        open_run(ranked_before.uri()).spec.rank.k,
        open_run(ranked_before.uri()).spec.rank.transform,
    )
    direct = run_without_ray(make_spec("rank.k=9", f"rank.transform={transform}", name="direct"))
    assert rank.rank(direct).equals(again)


def test_a_k_beyond_the_corpus_lists_all_and_says_so(make_spec, capsys):
    """K = 1,000 over 150 rows works."""
    ranked = rank.rank(run_without_ray(make_spec("rank.k=1000")))
    assert len(ranked) == 2 * 2 * CORPUS_ROWS
    assert "rank.k is 1,000 but 150 examples were scored: all of them are listed" in capsys.readouterr().err


def test_sources_are_summed_per_query(make_spec):
    """topk/sources.parquet holds what SQL over the scores says of every author."""
    run = run_without_ray(make_spec())
    rank.rank(run)
    sources = run.read_table("topk", "sources.parquet").to_pylist()
    sql = f"""SELECT query_id, source, count(*), sum(score::DOUBLE), arg_max(example_id, score)
              FROM '{run.uri("scores")}/*/*.parquet' GROUP BY ALL ORDER BY ALL"""
    for (query_id, source, count, total, top), row in zip(duckdb.sql(sql).fetchall(), sources, strict=True):
        assert (query_id, source, count, top) == (row["query_id"], row["source"], row["count"], row["top_example_id"])
        assert total == pytest.approx(row["sum"], abs=1e-6)
        assert row["sum"] / row["count"] == pytest.approx(row["mean"])


def test_every_column_is_described_in_the_parquet_metadata(make_spec):
    """Scores, ranked table, sources and manifest explain themselves to a lake."""
    run = run_without_ray(make_spec())
    rank.rank(run)
    files = [*Path(run.uri("scores")).rglob("*.parquet"), *Path(run.uri("topk")).glob("*.parquet")]
    for file in files:
        assert all((field.metadata or {}).get(b"description") for field in pq.read_schema(file)), file


def test_an_unfinished_run_is_not_ranked(make_spec):
    """Ranking half the corpus would be a wrong answer; it is refused."""
    run = run_without_ray(make_spec())
    Path(run.uri("commits", "shard-000001.json")).unlink()
    with pytest.raises(ArtifactError, match="2 of 3 shards are committed"):
        rank.rank(run)


def test_scoring_before_tuning_is_refused(make_spec):
    """The stages' order is checked from what is committed."""
    with pytest.raises(ArtifactError, match="2 counterparts are not made yet"):
        ShardScorer(freeze.freeze(make_spec()), "cpu")


# --- report -------------------------------------------------------------------------------------------------------------


def test_the_picture_shows_every_query_beside_its_examples(make_spec):
    """The sheet has one strip per query, and drawn pixels where a proponent stands."""
    run = run_without_ray(make_spec())
    rank.rank(run)
    report.report(run)
    with Image.open(run.uri("report", "contact_sheet.png")) as sheet:
        pixels = np.asarray(sheet.convert("L"))
    page = Path(run.uri("report", "index.html")).read_text()
    assert pixels.shape[0] > 2 * 84
    assert np.std(pixels[60:140, 190:270]) > 40
    assert all(query_id in page for query_id in run.query_ids)
    assert page.count("data:image/png") == 2 + 2 * 2 * 5


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_any_work(make_spec, world, tmp_path):
    """Missing columns, duplicate ids, wrong types: each has its message, and no run folder appears."""
    with pytest.raises(InputError, match=r"task column 'label': column 'lable' is not known; did you mean 'label'"):
        freeze.freeze(make_spec("task.label=lable"))
    with pytest.raises(InputError, match=r"corpus\.example_id: column 'idd'"):
        freeze.freeze(make_spec("corpus.example_id=idd"))
    with pytest.raises(InputError, match="got string, expected finite numbers of shape 1x8x8"):
        freeze.freeze(make_spec("task.features=id"))
    twice = tmp_path / "twice.parquet"
    pq.write_table(pa.concat_tables([world.table(), world.table().slice(3, 1)]), twice)
    with pytest.raises(InputError, match=r"'digit-003': .*twice\.parquet row 3 and .*twice\.parquet row 150"):
        freeze.freeze(make_spec(f"corpus.uri={twice}"))
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(world.queries).slice(0, 0), empty)
    with pytest.raises(InputError, match="no rows"):
        freeze.freeze(make_spec(f"queries.uri={empty}"))
    with pytest.raises(InputError, match="does not exist, or is an empty folder"):
        freeze.freeze(make_spec(f"corpus.uri={tmp_path / 'nowhere'}"))
    clash = tmp_path / "clash.parquet"
    pq.write_table(world.table().append_column("source", world.table()["author"]), clash)
    with pytest.raises(SpecError, match=r"corpus\.payload: source: the ranked table has columns of that name"):
        freeze.freeze(make_spec(f"corpus.uri={clash}", "corpus.payload=[source]"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is no Parquet")
    with pytest.raises(InputError, match=r"broken\.parquet cannot be read as Parquet"):
        freeze.freeze(make_spec(f"corpus.uri={tmp_path / 'broken.parquet'}"))
    assert not (tmp_path / "run").exists()


def test_wrong_weights_are_refused_with_the_names(make_spec):
    """Weights of a wider CNN do not fit a narrower one; names and shapes say so."""
    run = freeze.freeze(make_spec("model.arguments.width=4"))
    with pytest.raises(ContractError, match=r"0\.weight is \[8, 1, 3, 3\] in the file, \[4, 1, 3, 3\] in the model"):
        Tuner(run, "cpu")


def test_text_corpora_give_the_same_scores(make_spec, world, tmp_path):
    """The same digits as JSON lines score as they do from Parquet."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in world.table().to_pylist()))
    ours = read_scores(run_without_ray(make_spec(f"corpus.uri={path}", name="text")))
    assert read_scores(run_without_ray(make_spec())).equals(ours)


def test_a_frozen_run_without_commits_takes_a_mended_spec(make_spec):
    """A folder where nothing was committed yet belongs to no spec: fixing a typo does not need a new one."""
    freeze.freeze(make_spec("producer.lr=0.7"))
    assert 0.3 == freeze.freeze(make_spec("producer.lr=0.3")).spec.producer.lr
    assert 0.3 == open_run(make_spec().run.uri).spec.producer.lr


def test_what_is_ranked_is_what_was_committed(make_spec):
    """A partial or score file that is not the committed one is found by its digest, in both ways of ranking."""
    run = run_without_ray(make_spec())
    partials, scores = Path(run.uri("partials", "topk")), Path(run.uri("scores", "query_id=copy-of-3"))
    for folder, ending, k in ((partials, "-5-signed.parquet", 5), (scores, ".parquet", 9)):
        path = folder / f"shard-000000{ending}"
        whole = path.read_bytes()
        path.write_bytes((folder / f"shard-000001{ending}").read_bytes())
        with pytest.raises(ArtifactError, match=rf"{path.name} is not what its commit says"):
            rerank(run.uri(), [f"rank.k={k}"])
        path.write_bytes(whole)
    rerank(run.uri(), ["rank.k=5"])


def test_text_tables_reach_the_picture(make_spec, world, tmp_path):
    """CSV with pixels as JSON text and labels as text: the same scores as from Parquet, and a contact sheet."""
    path = tmp_path / "corpus.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "pixels", "label", "author"])
        writer.writerows(
            [row["id"], json.dumps(row["pixels"]), row["label"], row["author"]] for row in world.table().to_pylist()
        )
    run = run_without_ray(make_spec(f"corpus.uri={path}", name="text"))
    finish(run)
    assert read_scores(run_without_ray(make_spec())).equals(read_scores(run))
    assert Path(run.uri("report", "contact_sheet.png")).exists()


def test_a_stray_type_among_json_lines_does_not_stop_the_ranking(make_spec, world, tmp_path):
    """One label is text among integers: it is read as the number that it is, and the payload column becomes text."""
    rows = world.table().to_pylist()
    rows[70]["label"] = str(rows[70]["label"])
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_without_ray(make_spec(f"corpus.uri={path}", "rank.k=150"))
    finish(run)
    labels = run.read_ranked()[0]["label"].to_pylist()
    assert {str(label) for label in world.labels} == set(labels)


def test_images_with_another_order_of_axes_are_rejected(world, tmp_path):
    """Nested lists must have the column's shape: as many numbers in another order are another picture."""
    table = world.table()
    wide = [[[float(value)] * 2 for value in row] for row in table["pixels"].to_pylist()]  # [64, 2], not [2, 64]
    path = tmp_path / "wide.parquet"
    pq.write_table(table.set_column(1, "pixels", pa.array(wide)), path)
    columns = [Column("features", ("pixels",), "float32", (2, 64))]
    shard = Shard(0, str(path), 0, 150, None, None, None, *storage.stat(str(path)))
    examples = Corpus(CorpusSection(uri=str(path))).read(shard, columns)
    assert 150 == len(examples.rejects)
    assert "64x2 values" == examples.rejects[0].got


def test_number_like_query_ids_are_text_everywhere(make_spec, world, tmp_path):
    """Row numbers are natural query ids: DuckDB and pyarrow (without guessing from folder names) read them as text."""
    path = tmp_path / "queries.parquet"
    pq.write_table(pq.read_table(world.queries).set_column(0, "query_id", pa.array(["007", "42"])), path)
    run = run_without_ray(make_spec(f"queries.uri={path}"))
    finish(run)
    assert {"007", "42"} == set(pq.read_table(run.uri("scores"), partitioning=None)["query_id"].to_pylist())
    sql = f"SELECT DISTINCT query_id FROM '{run.uri('scores')}/*/*.parquet' ORDER BY ALL"
    assert [("007",), ("42",)] == duckdb.sql(sql).fetchall()


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [("Idle", NumericsError, "moved no weight"), ("Careless", ContractError, "changed the base model")],
)
def test_producers_that_do_nothing_or_too_much_are_found(make_spec, name, error, said):
    """Steps that move no weight, and steps taken on the base itself, would give a ranking that means nothing."""
    run = freeze.freeze(make_spec(f"producer={{name: 'tests.integration.test_without_ray:{name}'}}"))
    with pytest.raises(error, match=said):
        Tuner(run, "cpu").tune("copy-of-3")
    assert set() == run.committed_queries()


def test_a_dirtied_base_voids_the_queries_that_follow(make_spec):
    """A producer that changes the base once is refused for every later query too: none is tuned from a wrong base."""
    run = freeze.freeze(make_spec("producer={name: 'tests.integration.test_without_ray:CarelessOnce'}"))
    tuner = Tuner(run, "cpu")
    for query_id in run.query_ids:
        with pytest.raises(ContractError, match="changed the base model"):
            tuner.tune(query_id)
    assert set() == run.committed_queries()


def test_a_counterpart_holds_only_what_changed_and_says_how_it_was_made(make_spec):
    """With one layer tuned, two tensors are saved; meta.json has recipe, seed, steps, losses, norm and digest."""
    run = freeze.freeze(make_spec("producer.parameters='^9[.]'"))
    Tuner(run, "cpu").tune("copy-of-3")
    data, meta = run.counterpart_tensors("copy-of-3"), run.counterpart_meta("copy-of-3")
    assert {"9.weight", "9.bias"} == set(safetensors.torch.load(data)) == set(meta["changed"])
    assert (1, 3, run.resolved.fingerprint) == (meta["direction"], meta["steps"], meta["fingerprint"])
    assert run.spec.producer.model_dump(mode="json") == meta["producer"]
    assert storage.bytes_digest(data) == meta["tensors"]["sha256"]
    assert 0.03 == pytest.approx(meta["change_norm"], rel=0.05)  # three steps of length .01, nearly straight
    assert meta["query_loss_after_nats"] > meta["query_loss_before_nats"]


@pytest.mark.parametrize("name", ["unlearn", pytest.param("natural", marks=pytest.mark.slow)])
def test_meta_says_which_blocks_were_tuned(make_spec, tmp_path, name):
    """How many there are and of what kind, and how many of the model's parameters; nothing where all of it is tuned."""
    whole, last = (
        freeze.freeze(make_spec(f"run.uri={tmp_path / str(n)}", f"producer={{name: {name}, last_blocks: {n}}}"))
        for n in (0, 2)
    )
    for run in (whole, last):
        Tuner(run, "cpu").tune("copy-of-3")
    meta = last.counterpart_meta("copy-of-3")
    assert {"7.weight", "7.bias", "9.weight", "9.bias"} == set(meta["changed"])
    assert ("3-4 of 4 layers", "4,810 of 6,058") == (meta["details"]["blocks"], meta["details"]["parameters"])
    assert set() == {"blocks", "parameters"} & set(whole.counterpart_meta("copy-of-3")["details"])


def test_a_task_that_cannot_say_its_columns_is_named(make_spec):
    """An error in somebody's own columns() is theirs, with its place, before any work."""
    with pytest.raises(
        ContractError, match=r"Speechless: KeyError: 'pixels' \(at .*test_without_ray\.py:\d+, columns\)"
    ):
        freeze.freeze(make_spec("task={name: 'tests.integration.test_without_ray:Speechless'}"))


class Speechless:
    def columns(self):
        raise KeyError("pixels")


class Idle:
    direction = 1

    def produce(self, base, task, query, seed):
        return Produced(copy.deepcopy(base), steps=3)


class Careless:
    direction = 1

    def produce(self, base, task, query, seed):
        with torch.no_grad():
            next(base.parameters()).mul_(1.5)
        return Produced(copy.deepcopy(base), steps=1)


class CarelessOnce(Careless):
    def __init__(self):
        self.calls = 0

    def produce(self, base, task, query, seed):
        self.calls += 1
        if self.calls == 1:
            return super().produce(base, task, query, seed)
        model = copy.deepcopy(base)
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        return Produced(model, steps=1)
