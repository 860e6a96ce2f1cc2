"""Ensembles: the mean of members that are runs of their own; what goes wrong in one is said, and made good, as in any run."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml

from pipeline import storage
from pipeline.audit import audit, collect
from pipeline.errors import ArtifactError, ContractError, InputError, PipelineError, SpecError
from pipeline.extend import extend
from pipeline.folder import json_bytes
from pipeline.freeze import freeze, survey
from pipeline.frozen import open_run
from pipeline.mean import MeanScorer
from pipeline.members import gathered
from pipeline.producers.base import Produced
from pipeline.run import rerank, run_stage
from pipeline.scorer import ShardScorer
from pipeline.specfile import load_spec, parse_spec
from pipeline.tuner import Tuner
from tests.conftest import exit_code, read_scores
from tests.integration.test_extend import objects, require_equal
from tests.language import gpt, saved, sentences
from tests.small import SEEDS, Small, linear, products, work_off

pytestmark = pytest.mark.slow

NATURAL = "producer={name: natural}"
LOSSES = ("score", "base_loss")


class Sloped:
    """A step along the gradient, of another length for each model: scores are proportional to it."""

    direction = 1

    def __init__(self, lengths, scaled=True):
        self._lengths, self._scaled = lengths, scaled

    def produce(self, base, task, query, seed):
        place = next(i for i, seed in enumerate(SEEDS) if torch.equal(linear(seed).weight, base.weight))
        model, length = linear(), self._lengths[place]
        gradients = torch.autograd.grad(task.loss_B(base, query).mean(), list(base.parameters()))
        with torch.no_grad():
            for new, old, gradient in zip(model.parameters(), base.parameters(), gradients, strict=True):
                new.copy_(old + length * gradient)
        return Produced(model.eval(), 1, scale=length if self._scaled else 1.0)


def sloped(lengths, scaled=True):
    """Override: this producer."""
    return f"producer={{name: 'tests.integration.test_ensemble:Sloped', options: {{lengths: {lengths}, scaled: {scaled}}}}}"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small world, with a finished ensemble of three in `run`, of weights 1, 2 and .5."""
    made = Small(tmp_path_factory.mktemp("small"))
    work_off(freeze(made.spec(made.folder / "run", made.ensemble(2, 0.5))))
    return made


@pytest.fixture
def run_uri(small, tmp_path):
    """A copy of it."""
    return str(shutil.copytree(small.folder / "run", tmp_path / "run"))


def spec_of(small, uri, *overrides):
    return small.spec(uri, small.ensemble(2, 0.5), *overrides)


def every_row(run):
    """(shard, row) -> how often it is in scores of the first query and in rejects."""
    found = [tuple(row.values()) for row in rows_of(run, "shard_id", "row")]
    for receipt in run.receipts():
        if receipt.rejects:
            table = run.read_shard(receipt, receipt.rejects_path)
            found += [(row["shard_id"], row["row"]) for row in table.to_pylist()]
    return sorted(found)


def rows_of(run, *names):
    tables = [pq.read_table(path) for path in sorted(Path(run.uri("scores", "query_id=red")).glob("*.parquet"))]
    return pa.concat_tables(tables).select(names).to_pylist()


def expected_rows(run):
    return sorted((shard.shard_id, shard.row_start + i) for shard in run.shards for i in range(shard.rows))


# --- the mean ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "producer",
    [
        sloped([0.01, 0.2, 0.003]),
        pytest.param(NATURAL, marks=pytest.mark.slow),
        pytest.param("producer.lr=0.01", marks=pytest.mark.slow),
    ],
    ids=["scaled", "natural", "unlearn"],
)
def test_scores_are_the_mean_of_the_members(small, tmp_path, producer):
    """By weight / scale for scores, by weight for base losses; everything else of a row is as in the members."""
    run = work_off(freeze(spec_of(small, tmp_path / "run", producer)))
    ours, members = read_scores(run), [read_scores(member) for member in run.members]
    query_N = ours["query_id"].to_numpy(zero_copy_only=False)
    weight_M = np.array([1, 2, 0.5])
    for query_id in run.query_ids:
        mine_N = query_N == query_id
        score_MN, base_MN = (np.array([each[name].to_numpy()[mine_N] for each in members], float) for name in LOSSES)
        part_M = weight_M / [member.counterpart_meta(query_id)["scale"] for member in run.members]
        score_N, base_N = part_M @ score_MN / part_M.sum(), weight_M @ base_MN / weight_M.sum()
        for expected_N, name in ((score_N, "score"), (base_N, "base_loss"), (base_N + score_N, "counterpart_loss")):
            np.testing.assert_allclose(expected_N, ours[name].to_numpy()[mine_N], rtol=3e-7, atol=1e-12)
    for name in ("query_id", "example_id", "source", "row"):
        assert [members[0][name]] * 2 == [ours[name], members[2][name]]


def test_the_direction_of_descent_is_kept(small, tmp_path):
    """Scores of `finetune` are base less counterpart, in the mean too."""
    run = work_off(freeze(spec_of(small, tmp_path / "run", "producer={name: finetune, steps: 2}")))
    ours = read_scores(run)
    difference_N = ours["base_loss"].to_numpy() - ours["counterpart_loss"].to_numpy()
    np.testing.assert_allclose(difference_N, ours["score"].to_numpy(), atol=1e-6)


def test_members_of_different_step_lengths_count_alike(small, tmp_path):
    """One member's steps ten times as long, another's a tenth: the same ranking; not so if scales are kept secret."""
    made = {}
    for name, lengths, scaled in (
        ("alike", [0.01, 0.01, 0.01], True),
        ("scaled", [0.01, 0.1, 0.001], True),
        ("secret", [0.01, 0.1, 0.001], False),
    ):
        run = work_off(freeze(small.spec(tmp_path / name, small.ensemble(), sloped(lengths, scaled))))
        score_N = read_scores(run)["score"].to_numpy()[:12].astype(float)
        made[name] = score_N / np.linalg.norm(score_N)
    assert np.linalg.norm(made["alike"] - made["scaled"]) < 0.03
    assert np.linalg.norm(made["alike"] - made["secret"]) > 0.1


def test_language_models_are_averaged_per_token(tmp_path):
    """Two checkpoints under one tokenizer, the first's: losses per token by their name, and every text's tokens."""
    for seed in (0, 1):
        saved(gpt(seed), tmp_path / f"model-{seed}")
    texts = sentences(12)
    pq.write_table(pa.table({"id": [f"text-{i:02d}" for i in range(12)], "text": texts}), tmp_path / "corpus.parquet")
    pq.write_table(pa.table({"query_id": ["red"], "text": texts[3:4]}), tmp_path / "queries.parquet")
    tree = {
        "run": {"uri": str(tmp_path / "run")},
        "model": {"loader": "hf_transformers", "weights_uri": str(tmp_path / "model-0")},
        "ensemble": [{"weights_uri": str(tmp_path / "model-1")}],
        "task": {"name": "causal_lm"},
        "corpus": {"uri": str(tmp_path / "corpus.parquet"), "example_id": "id"},
        "queries": {"uri": str(tmp_path / "queries.parquet")},
        "producer": {"name": "unlearn", "steps": 2},
        "score": {"shard_rows": 8},
    }
    run = work_off(freeze(parse_spec(tree)))
    names = ("example_id", "num_tokens", "base_loss_per_token", "score")
    ours, *members = (sorted(tuple(row.values()) for row in rows_of(each, *names)) for each in (run, *run.members))
    for mine, first, second in zip(ours, *members, strict=True):
        assert first[:2] == second[:2] == mine[:2]
        assert np.mean([first[2:], second[2:]], axis=0).tolist() == pytest.approx(mine[2:], rel=1e-6, abs=1e-9)
    assert {str(tmp_path / "model-0")} == {each.spec.task.tokenizer_uri for each in run.members}


def test_ranks_come_from_the_mean(small, run_uri):
    """The strongest of a query are those of the mean's score files; another k ranks again without scoring."""
    for k in (3, 5):
        run = rerank(run_uri, [f"rank.k={k}"])
        scores = read_scores(run).filter(pa.compute.equal(read_scores(run)["query_id"], "red"))
        strongest = scores.sort_by([("score", "descending"), ("example_id", "ascending")])["example_id"][:k]
        rows = [
            row for row in run.read_ranked()[0].to_pylist() if (row["query_id"], row["side"]) == ("red", "proponent")
        ]
        assert strongest.to_pylist() == [row["example_id"] for row in rows]
    assert ([], {}, True) == ((found := audit(run, shown=False)).damage, found.orphans, found.sealed)


def test_an_ensemble_of_none_is_the_run_that_it_was(small, tmp_path):
    """`ensemble: []` changes no byte and no fingerprint, and makes no members; every member is such a run, too."""
    plain, empty = (work_off(freeze(small.spec(tmp_path / f"run{i}", *o))) for i, o in enumerate(([], ["ensemble=[]"])))
    assert products(objects(plain.uri())) == products(objects(empty.uri()))
    assert not Path(plain.uri("members")).exists()
    first = open_run(str(small.folder / "run" / "members" / "00"))
    assert plain.resolved.fingerprint == empty.resolved.fingerprint == first.resolved.fingerprint
    assert products(objects(plain.uri())) == products(objects(first.uri()))


def test_a_members_run_yaml_runs_by_itself(small, run_uri):
    """It is the spec of an ordinary run, done already."""
    before = products(objects(f"{run_uri}/members/01"))
    assert before == products(objects(work_off(freeze(load_spec(f"{run_uri}/members/01/run.yaml"))).uri()))


# --- rows that cannot be scored, shards that are quarantined -----------------------------------------------------------


def test_a_row_that_one_member_rejects_is_rejected(small, tmp_path):
    """With that member's reason and name; a row that all reject alike, with the reason alone. Every row is in one place."""
    shutil.copytree(small.folder / "corpus", tmp_path / "corpus")
    path = tmp_path / "corpus" / "part-0.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[2] |= {"features": [0, 0, 3e38, 3e38], "label": 1}
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    larger = {name: 4 * tensor for name, tensor in linear(2).state_dict().items()}  # its logits overflow
    safetensors.torch.save_file(larger, tmp_path / "larger.safetensors")
    overrides = [f"corpus.uri={tmp_path / 'corpus'}", "score.max_reject_fraction=0.2"]
    overrides += [f"ensemble=[{{weights_uri: {tmp_path / 'larger.safetensors'}}}]"]
    run = work_off(freeze(small.spec(tmp_path / "run", *overrides)))
    assert expected_rows(run) == every_row(run)
    rejects = [each for receipt in run.receipts() if receipt.rejects for each in rejects_of(run, receipt)]
    assert [2, 6] == [each["row"] for each in rejects]
    assert [("base_loss", "row-02"), ("features", "row-06")] == [
        (each["column"], each["example_id"]) for each in rejects
    ]
    assert rejects[0]["got"].endswith("under member 2 of 2 (members/01)")
    assert "member" not in rejects[1]["got"]


def rejects_of(run, receipt):
    return run.read_shard(receipt, receipt.rejects_path).to_pylist()


def test_a_shard_that_is_quarantined_in_one_member_is_so_in_the_ensemble(small, tmp_path, capsys):
    """With the member's reason; tolerated it stays so; else it is tried again in both, though each alone tolerates it."""
    spec = spec_of(small, tmp_path / "run", "score.max_reject_fraction=0.5")
    run = gathered(freeze(spec))
    for member, shard in ((run.members[0], 3), (run.members[1], 0)):
        tune(member)
        ShardScorer(member, "cpu").quarantine(member.work(0, shard), "its workers died")
    run = work_off(freeze(spec))
    assert expected_rows(run) == every_row(run)
    reasons = {receipt.shard_id: receipt.quarantined for receipt in run.receipts() if receipt.quarantined}
    assert {
        3: "member 1 of 3 (members/00): its workers died",
        0: "member 2 of 3 (members/01): its workers died",
    } == reasons
    assert 5 + 1 == sum(receipt.rejects for receipt in run.receipts())
    assert reasons == {
        each.shard_id: each.quarantined for each in work_off(freeze(spec)).receipts() if each.quarantined
    }
    capsys.readouterr()
    run = work_off(freeze(spec_of(small, tmp_path / "run", "score.max_reject_fraction=0.4")))
    assert [None] * 4 == [receipt.quarantined for receipt in run.receipts()]
    assert products(objects(f"{small.folder}/run")) == products(objects(run.uri()))
    assert ([], True) == ((found := audit(run, shown=False)).damage, found.sealed)


def tune(run):
    for query_id in run.query_ids:
        Tuner(run, "cpu").tune(query_id)


# --- damage, resume, growth --------------------------------------------------------------------------------------------


def damage(uri):
    path = next(Path(uri).rglob("scores/query_id=red/shard-000002.parquet"))
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    return path


def test_a_damaged_score_file_of_a_member_is_found_and_made_anew(small, run_uri, monkeypatch, capsys):
    """`verify` names it; `verify --mend` and the run's command put back the bytes that were there."""
    before = products(objects(run_uri))
    damage(f"{run_uri}/members/01")
    assert 6 == exit_code(monkeypatch, "verify", run_uri)
    printed = capsys.readouterr()
    assert "damaged   members/01/scores/query_id=red/shard-000002.parquet: got sha256" in printed.out
    assert "1 things are damaged" in printed.err
    assert 0 == exit_code(monkeypatch, "verify", "--mend", run_uri)
    assert not Path(run_uri, "members", "01", "commits", "shard-000002.json").exists()
    assert before == products(objects(work_off(freeze(spec_of(small, run_uri))).uri()))
    assert 0 == exit_code(monkeypatch, "verify", run_uri)


def test_an_ensemble_may_be_asked_by_rows_with_holes(small, tmp_path):
    """A column that nobody reads, of numbers that are none: members are asked the same as the ensemble all the same."""
    table, path = pq.read_table(small.folder / "queries.parquet"), tmp_path / "queries.parquet"
    pq.write_table(table.append_column("margin", pa.array([np.nan] * len(table))), path)
    assert work_off(freeze(spec_of(small, tmp_path / "run", f"queries.uri={path}"))).is_sealed()


def test_members_of_which_one_has_other_rows_are_not_averaged(small, run_uri):
    """One id is another's, under a commit that says so: rows that do not belong together have no mean."""
    path, commit = (
        Path(run_uri, "members", "01", *parts)
        for parts in (("scores", "query_id=red", "shard-000002.parquet"), ("commits", "shard-000002.json"))
    )
    before, table = path.read_bytes(), pq.read_table(path, partitioning=None)
    ids = ["row-99", *table["example_id"].to_pylist()[1:]]
    pq.write_table(
        table.set_column(table.column_names.index("example_id"), table.schema.field("example_id"), [ids]), path
    )
    text = commit.read_text()
    for old, new in zip(
        *((hashlib.sha256(data).hexdigest(), str(len(data))) for data in (before, path.read_bytes())), strict=True
    ):
        assert old in text
        text = text.replace(old, new)
    tree = json.loads(text)
    del tree["sha256"]
    commit.write_bytes(json_bytes(tree))
    run = open_run(run_uri)
    run.void(["commits/shard-000002.json"])
    with pytest.raises(ArtifactError, match=r"member 2 of 3 \(members/01\): .*has other rows than expected"):
        MeanScorer(run).score(run.work(0, 2))


def test_a_damaged_score_file_is_not_averaged(small, run_uri):
    """What is read is held against the member's commit, and named."""
    damage(f"{run_uri}/members/01")
    run = open_run(run_uri)
    run.void(["commits/shard-000002.json"])
    with pytest.raises(ArtifactError, match=r"members/01/scores/.*shard-000002\.parquet is not what its commit says"):
        MeanScorer(run).score(run.work(0, 2))


def test_a_member_that_is_gone_is_named_and_made_anew(small, run_uri, monkeypatch, capsys):
    """The seal stands for no less than all of it; the run's command makes it again, with the same bytes."""
    before = products(objects(run_uri))
    shutil.rmtree(f"{run_uri}/members/01")
    assert 6 == exit_code(monkeypatch, "verify", run_uri)
    assert "_SUCCESS: stands, but of 3 members members/01 is gone" in capsys.readouterr().out
    assert 0 == exit_code(monkeypatch, "status", run_uri)
    assert before == products(objects(work_off(freeze(spec_of(small, run_uri))).uri()))


def test_only_what_is_missing_is_done(small, run_uri):
    """Stopped before anything, after one member, amid its shards or amid the mean: the same bytes; what is done is left alone."""
    before = products(objects(run_uri))
    for lost in (
        ["members/02/counterparts", "members/02/commits", "members/02/scores", "commits", "scores"],
        ["members/01/commits/shard-000001.json", "members/01/_SUCCESS", "commits/shard-000003.json", "_SUCCESS"],
    ):
        for path in lost:
            target = Path(run_uri, path)
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        kept = {path: path.stat().st_mtime_ns for path in Path(run_uri, "members").rglob("shard-*.parquet")}
        work_off(freeze(spec_of(small, run_uri)))
        written = {path for path, stamp in kept.items() if path.stat().st_mtime_ns != stamp}
        assert before == products(objects(run_uri))
        assert not any("members/00" in str(path) for path in written)
    assert {"shard-000001.parquet", "shard-000001-3-signed.parquet"} == {path.name for path in written}


def test_frozen_and_not_begun_it_makes_way_for_a_mended_spec(small, tmp_path):
    """As an ordinary run does; once a member has begun, another spec is refused."""
    uri = tmp_path / "run"
    gathered(freeze(spec_of(small, uri, "producer.steps=3")))
    run = gathered(freeze(spec_of(small, uri)))
    tune(run.members[1])
    with pytest.raises(ArtifactError, match=r"producer\.steps: 2 -> 3"):
        freeze(spec_of(small, uri, "producer.steps=3"))
    with pytest.raises(ArtifactError, match=r"ensemble: \[\{.*'weight': 2\.0.* -> "):
        freeze(small.spec(uri, small.ensemble(1, 1)))


@pytest.mark.parametrize("broken_off", [True, False], ids=["broken off", "at a stretch"])
def test_a_grown_ensemble_equals_one_made_of_everything(small, run_uri, tmp_path, broken_off):
    """Members grow as it does; broken off when it knows of the addition and one member has it, the same command goes on."""
    if broken_off:
        extend(run_uri, *small.later)
        grown = gathered(open_run(run_uri))
        storage.remove(f"{run_uri}/members/02/additions/0001/addition.json")
        work_off(grown.members[0])
        assert set() == {"blue"} & open_run(run_uri).committed_queries()
    run = work_off(extend(run_uri, *small.later))
    everything = tmp_path / "everything"
    shutil.copytree(small.folder / "corpus", everything)
    shutil.copytree(small.folder / "later", everything, dirs_exist_ok=True)
    queries = [pq.read_table(small.folder / f"{name}.parquet") for name in ("queries", "later-queries")]
    pq.write_table(pa.concat_tables(queries), tmp_path / "queries.parquet")
    overrides = [f"corpus.uri={everything}", f"queries.uri={tmp_path / 'queries.parquet'}"]
    at_once = work_off(freeze(spec_of(small, tmp_path / "at-once", *overrides)))
    require_equal(run, at_once)
    for each in (run, *run.members):
        assert ([], {}, True) == ((found := audit(each, shown=False)).damage, found.orphans, found.sealed)
    before = objects(run_uri)
    assert 2 == len(extend(run_uri, *small.later).additions)
    assert before == objects(run_uri)


def test_a_member_that_was_extended_by_itself_is_named(small, run_uri):
    """Members are asked the same: refused until the ensemble is extended by the same."""
    queries, _ = small.later
    work_off(extend(f"{run_uri}/members/01", queries, None))
    with pytest.raises(ArtifactError, match=r"member 2 of 3 \(members/01\): .*not asked the same: other queries"):
        work_off(freeze(spec_of(small, run_uri)))
    run = work_off(extend(run_uri, queries, None))
    assert ("red", "green", "blue") == run.query_ids
    assert audit(run, shown=False).sealed


def test_gc_and_verify_leave_members_alone(small, run_uri, monkeypatch, capsys):
    """Nothing of theirs is an orphan of the ensemble's; their own orphans are found and collected."""
    stray = Path(run_uri, "members", "01", "partials", "topk", "shard-000000-9-signed.parquet")
    stray.write_bytes(b"nobody's")
    before = objects(run_uri)
    assert 0 == exit_code(monkeypatch, "verify", run_uri)
    assert "orphan    members/01/partials/topk/shard-000000-9-signed.parquet" in capsys.readouterr().out
    assert {} == collect(open_run(run_uri), 0)
    assert 0 == exit_code(monkeypatch, "gc", run_uri, "--older-than", "0")
    assert {f"members/01/{stray.relative_to(Path(run_uri, 'members', '01'))}"} == before.keys() - objects(
        run_uri
    ).keys()


# --- what is said ------------------------------------------------------------------------------------------------------


def test_the_plan_counts_members_and_what_they_write(small, run_uri, monkeypatch, capsys):
    """So many times the forward passes; as many objects as lie in the folder afterwards, less the one with rejects."""
    _, plan = survey(spec_of(small, run_uri))
    files = [path for path in Path(run_uri).rglob("*") if path.is_file() and path.parent.name != "rejects"]
    pictures = 4
    assert (3, 3 * 13 * 3, len(files) + pictures) == (plan.members, plan.forward_passes, plan.objects)
    path = Path(run_uri, "run.yaml")
    assert 0 == exit_code(monkeypatch, "plan", str(path))
    assert "3, each a run of its own that tunes and scores: 3 times the work" in capsys.readouterr().out


def test_status_show_and_report_speak_of_the_members(small, run_uri, monkeypatch, capsys):
    """How far each is; where they are; how many the page's scores are the mean of, and their shares."""
    assert 0 == exit_code(monkeypatch, "status", run_uri)
    assert re.search(r"members/02 +│ done +│ 2 of 2 counterparts, 4 of 4 shards, sealed", capsys.readouterr().out)
    assert 0 == exit_code(monkeypatch, "show", run_uri)
    assert f"members        {run_uri}/members: 3 runs" in capsys.readouterr().out
    page = Path(run_uri, "report", "index.html").read_text()
    assert "mean of 3 models" in page
    assert "shares 0.286 0.571 0.143" in page


@pytest.mark.parametrize(
    ("override", "error", "match"),
    [
        ("ensemble=[{weights_uri: none.safetensors}]", InputError, r"ensemble\.0\.weights_uri: .*none\.safetensors"),
        ("ensemble=[{weights_uri: HERE/linear-2.safetensors}, {weights_uri: HERE/linear.safetensors}]", SpecError,
         r"ensemble\.1\.weights_uri: .*linear\.safetensors holds the same weights as model\.weights_uri"),
        ("ensemble=[{weights_uri: HERE/linear-2.safetensors, wieght: 2}]", SpecError,
         r"ensemble\.0\.wieght: 'wieght' is not known; did you mean 'weight'"),
        ("ensemble=[{weights_uri: HERE/linear-2.safetensors, weight: 0}]", SpecError, r"ensemble\.0\.weight: .*greater than 0"),
        ("ensemble=[{weight: 2}]", SpecError, r"ensemble\.0\.weights_uri: missing"),
    ],
)  # fmt: skip
def test_wrong_members_are_refused(small, tmp_path, override, error, match):
    """Weights that are not there, or the same twice, typos and weights of nothing: which member it is is said."""
    with pytest.raises(error, match=match):
        freeze(small.spec(tmp_path / "run", override.replace("HERE", str(small.folder))))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("model.weights_uri=null", r"ensemble: members have weights of their own, and model\.weights_uri"),
        (
            "producer={name: reference, weights_uri: x}",
            "ensemble: producer reference compares one model with one other",
        ),
        ("model={loader: hf_transformers, weights_uri: x, adapter_uri: y}", r"ensemble: .* not model\.adapter_uri"),
    ],
)
def test_what_cannot_be_an_ensemble_is_refused(small, tmp_path, override, match):
    """A model without weights, a pair of checkpoints, adapters."""
    with pytest.raises(SpecError, match=match):
        small.spec(tmp_path / "run", small.ensemble(), override)


def test_a_member_may_be_its_weights_alone(small, tmp_path):
    """A bare URI is a member of weight 1."""
    spelled, bare = (
        small.spec(tmp_path / "run", f"ensemble=[{member}]")
        for member in ("{weights_uri: x.safetensors}", "x.safetensors")
    )
    assert spelled == bare


def test_what_goes_wrong_in_a_member_carries_its_name(small, run_uri):
    """A file of its manifest was cut: the error says whose, by its path."""
    Path(run_uri, "members", "01", "queries.parquet").write_bytes(b"")
    with pytest.raises(PipelineError, match=r"members/01/queries\.parquet is not what its commit says"):
        work_off(freeze(spec_of(small, run_uri)))


def test_a_scale_is_a_number_above_0(small, tmp_path):
    """A producer that says another is told so, with the query."""
    run = freeze(small.spec(tmp_path / "run", sloped([-0.1, 1, 1])))
    with pytest.raises(ContractError, match=r"query 'red': the producer's scale is -0\.1, expected a number above 0"):
        Tuner(run, "cpu").tune("red")


def test_a_folder_of_another_run_is_no_member(small, tmp_path):
    """It is named, and left as it is."""
    uri = tmp_path / "run"
    work_off(freeze(small.spec(uri / "members" / "01", "seed=5")))
    before = objects(str(uri / "members" / "01"))
    with pytest.raises(ArtifactError, match=r"member 2 of 3 \(members/01\): .*members/01 holds another run"):
        gathered(freeze(spec_of(small, uri)))
    assert before == objects(str(uri / "members" / "01"))


def test_an_ensemble_has_no_token_losses_of_its_own(small, run_uri):
    """An ensemble has no counterpart whose token losses could be shown; the error says where there are some."""
    with pytest.raises(SpecError, match="is an ensemble: it has no counterpart of its own"):
        open_run(run_uri).counterpart_tensors("red")


# --- on Ray ------------------------------------------------------------------------------------------------------------


def two_of(small):
    """Override: one further model."""
    return f"ensemble=[{{weights_uri: {small.folder / 'linear-2.safetensors'}}}]"


@pytest.mark.ray
def test_the_command_makes_an_ensemble_on_ray_and_stages_apart_what_is_lost_of_it(
    small, tmp_path, ray_cluster, monkeypatch, capsys
):
    """One connection, and it says which member is worked on; each stage does its part of the members, then of the mean.

    The bytes are those of a run without Ray, both times. When nothing is missing nothing is said.
    """
    uri, path = str(tmp_path / "run"), tmp_path / "spec.yaml"
    spec = small.spec(uri, two_of(small))
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    assert 0 == exit_code(monkeypatch, "run", str(path)), capsys.readouterr().err
    printed = capsys.readouterr()
    said = [f"member {n} of 2 (members/0{n - 1}): tune, score, finish" for n in (1, 2)]
    assert said == [line for line in printed.err.splitlines() if line.startswith("member ")]
    assert "members: 2 runs" in printed.out
    other = products(objects(work_off(freeze(small.spec(tmp_path / "other", two_of(small)))).uri()))
    assert other == products(objects(uri))
    assert 0 == exit_code(monkeypatch, "run", str(path))
    assert "member " not in capsys.readouterr().err

    shutil.rmtree(f"{uri}/members/01")
    for name in ("_SUCCESS", *(f"commits/{each}" for each in storage.names(f"{uri}/commits"))):
        storage.remove(f"{uri}/{name}")
    run = run_stage(spec, "tune")
    assert {"red", "green"} == run.members[1].committed_queries()
    assert (set(), set()) == (run.committed(), run.members[1].committed())
    run = run_stage(spec, "score")
    assert (4, True, False) == (len(run.committed()), run.members[1].is_sealed(), run.is_sealed())
    run_stage(spec, "rank")
    assert other == products(objects(uri))
