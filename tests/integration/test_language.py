"""Texts through a whole run without Ray: columns that say what a loss is, rejects, and the same scores by either loader."""

import json
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from pipeline.artifacts import CHOICE
from pipeline.errors import InputError, SpecError
from pipeline.freeze import freeze
from pipeline.report import of
from pipeline.run import finish, run_stage
from pipeline.scorer import ShardScorer
from pipeline.shading import _shaded
from pipeline.specfile import parse_spec
from pipeline.tasks.language import CausalLM
from pipeline.tuner import Tuner
from tests.conftest import exit_code, run_without_ray, tuned
from tests.language import gpt, saved, sentences, spec_tree, tokenizer

pytestmark = pytest.mark.slow  # by its number of runs

TEXTS = sentences(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model, corpus and queries; the second query is the text of row 3."""
    made = tmp_path_factory.mktemp("language")
    saved(gpt(), made / "model")
    table = {"id": [f"text-{i:02d}" for i in range(len(TEXTS))], "text": TEXTS}
    table["tokens"] = [tokenizer()(text)["input_ids"] for text in TEXTS]
    table["talk"] = [
        [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": "Yes."}] for text in TEXTS
    ]
    pq.write_table(pa.table(table), made / "corpus.parquet")
    rows = [7, 3]
    queries = {name: [values[i] for i in rows] for name, values in table.items() if name != "id"}
    pq.write_table(pa.table({"query_id": ["seven", "three"], **queries}), made / "queries.parquet")
    return made


@pytest.fixture
def make(folder, tmp_path):
    """`make("task.reduction=sum", ...)`: a spec over that world."""

    def spec(*overrides, name="run"):
        made = spec_tree(folder, tmp_path / name) | {"producer": {"name": "unlearn", "steps": 3}, "rank": {"k": 3}}
        return parse_spec(made, overrides)

    return spec


def scores(run):
    """Score rows, by query and id, as a lake reads them."""
    return asked(f"FROM '{run.uri('scores')}/*/*.parquet' ORDER BY query_id, example_id")


def asked(sql):
    with duckdb.connect() as connection:
        return connection.sql(sql).to_arrow_table()


def test_a_mean_says_so_in_its_columns_name_and_unit(make):
    """base_loss_per_token in scores and ranking, with its unit; base_loss for a sum; the tokens beside both."""
    mean, total = run_without_ray(make()), run_without_ray(make("task.reduction=sum", name="sum"))
    file = next(path for path in sorted(mean.receipt(0, 0).files) if path.startswith("scores/"))
    schema = pq.read_schema(mean.uri(file))
    assert b"nats per token" == schema.field("base_loss_per_token").metadata[b"unit"]
    assert b"nats" == pq.read_schema(total.uri(file)).field("base_loss").metadata[b"unit"]
    means, totals = scores(mean), scores(total)
    assert means["num_tokens"].to_pylist() == totals["num_tokens"].to_pylist()
    expected = [
        a * n for a, n in zip(means["base_loss_per_token"].to_pylist(), means["num_tokens"].to_pylist(), strict=True)
    ]
    assert expected == pytest.approx(totals["base_loss"].to_pylist(), rel=1e-5)
    finish(mean)
    assert "base_loss_per_token" in pq.read_schema(mean.uri("topk/ranked.parquet")).names


def test_the_querys_own_text_is_found(make):
    """The text that was asked about stands first; the ranking carries texts to read, the page too."""
    run = run_without_ray(make())
    finish(run)
    ranked, _ = run.read_ranked()
    first = {row["query_id"]: row for row in ranked.to_pylist() if row["side"] == "proponent" and row["rank"] == 1}
    assert {"seven": TEXTS[7], "three": TEXTS[3]} == {query_id: row["text"] for query_id, row in first.items()}
    with open(run.uri("report", "index.html")) as page:
        assert TEXTS[3][:40] in page.read()


def test_both_loaders_give_the_same_scores(make, folder):
    """A GPT made by a factory and the same one out of a folder: to the bit."""
    weights = folder / "gpt.safetensors"
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in gpt().state_dict().items()}, weights)
    factory = f"{{loader: torch_module, factory: 'tests.language:gpt', weights_uri: {weights}}}"
    one = run_without_ray(make(name="folder"))
    other = run_without_ray(make(f"model={factory}", f"task.tokenizer_uri={folder}/model", name="factory"))
    assert scores(one).equals(scores(other))


def test_text_and_its_tokens_score_alike(make):
    """A corpus of token ids needs no tokenizer, and its losses are those of the text."""
    text, ids = run_without_ray(make(name="text")), run_without_ray(make("task.tokens=tokens", name="ids"))
    assert scores(text)["score"].to_pylist() == pytest.approx(scores(ids)["score"].to_pylist(), abs=1e-6)


def test_conversations_score(make):
    """A column of messages, by the tokenizer's template; one answer counts."""
    run = run_without_ray(make("task={name: causal_lm, messages: talk, answer_only: true}"))
    assert {len(tokenizer()("Yes.\n")["input_ids"])} == set(scores(run)["num_tokens"].to_pylist())


def test_other_shards_and_batches_give_the_same_scores(make):
    """1e-5: other neighbours, other padding, another order (truth 3)."""
    one = run_without_ray(make(name="one"))
    other = run_without_ray(make("score.shard_rows=30", "score.batch_tokens=1000", name="other"))
    for name in ("base_loss_per_token", "counterpart_loss_per_token", "score"):
        assert scores(one)[name].to_pylist() == pytest.approx(scores(other)[name].to_pylist(), abs=1e-5)


def test_a_curvature_is_of_documents_however_they_are_cut_and_batched(make):
    """Texts of one to four windows: the mean is over texts, and other batches and shards give the same scores, to rounding."""
    fields = ("task.overlong=windows", "task.max_tokens=24", "score.way=gradient")
    fields += ("producer={name: natural, curvature: ekfac, damping_share: 0.1, sample_rows: 30}",)
    short = "queries.uri=" + str(_short_queries(make))
    one = run_without_ray(make(*fields, short, name="one"))
    other = run_without_ray(make(*fields, short, "score.shard_rows=30", "score.batch_tokens=1000", name="other"))
    setting = Tuner(other, "cpu")._corpus.setting(0, 30)
    assert len(TEXTS) == setting.sample.rows < sum(len(rows.weight_B) for rows in setting.sample.batches)
    assert len(TEXTS) == pytest.approx(sum(rows.weight_B.sum() for rows in setting.sample.batches))
    found, again = (np.array(scores(run)["score"].to_pylist()) for run in (one, other))
    np.testing.assert_allclose(found, again, atol=1e-3 * np.abs(found).max())  # eigenvectors are in single precision


def _short_queries(make):
    """Queries that are not split."""
    path = Path(make().run.uri).parent / "short.parquet"
    pq.write_table(pa.table({"query_id": ["a", "b"], "text": ["Ada was born in Oslo.", "Emil lives in Quito."]}), path)
    return path


def test_base_losses_of_windows_are_found_again(make, folder, tmp_path):
    """Losses are kept by window, before they are put together; a copy of the model elsewhere is the same model."""
    longest = max(len(tokenizer()(TEXTS[row])["input_ids"]) for row in (7, 3))  # the queries, which are not split
    fields = ("task.overlong=windows", f"task.max_tokens={longest}", f"score.base_losses={tmp_path / 'base'}")
    first = run_without_ray(make(*fields))
    assert 0 < sum(receipt.overlong for receipt in first.receipts())
    copied = f"model.weights_uri={shutil.copytree(folder / 'model', tmp_path / 'copied')}"
    ours = run_without_ray(make(*fields, copied, name="again"))
    assert len(TEXTS) == sum(receipt.base_kept for receipt in ours.receipts())
    assert scores(first).equals(scores(ours))


def test_the_next_shard_becomes_tokens_while_one_is_scored(make, monkeypatch):
    """The first forward pass does not go on before the other shard is tokenised: were it one after the other, it never would."""
    run = freeze(tuned(make("score.shard_rows=15")))
    scorer, tokenised, encode, loss_B = (
        ShardScorer(run, "cpu"),
        threading.Semaphore(0),
        CausalLM.encode,
        CausalLM.loss_B,
    )
    waited = []

    def encoding(task, columns):
        inputs = encode(task, columns)
        tokenised.release()
        return inputs

    def waiting(task, model, batch):
        if not waited:
            waited.extend(tokenised.acquire(timeout=30) for _ in range(2))
        return loss_B(task, model, batch)

    monkeypatch.setattr(CausalLM, "encode", encoding)
    monkeypatch.setattr(CausalLM, "loss_B", waiting)
    with ThreadPoolExecutor(2) as threads:
        receipts = list(threads.map(scorer.score, run.works()))
    assert [True, True] == waited
    assert [15, 15] == [receipt.rows for receipt in receipts]


def test_another_ranking_of_means_reads_the_score_files(make):
    """Deeper, and relative, from columns whose names say what they are."""
    run = run_without_ray(make("rank.k=2"))
    finish(run)
    spec = make("rank.k=5", "rank.transform=relative")
    again = freeze(spec)
    finish(again)
    ranked, _ = again.read_ranked()
    row = ranked.to_pylist()[0]
    assert row["score"] / (row["base_loss_per_token"] + 1e-3) == pytest.approx(row["value"], rel=1e-5)
    assert 2 * 2 * 5 == len(ranked)


def test_texts_that_have_no_loss_are_rejects(make, tmp_path):
    """Empty, null, of one token, too long: each in rejects/ with its reason; all others are scored; the overlong are counted."""
    rows = [*TEXTS[:3], "", None, "a", " ".join(TEXTS[:9])]
    table = pa.table({"id": [f"row-{i}" for i in range(len(rows))], "text": rows})
    pq.write_table(table, tmp_path / "mixed.parquet")
    corpus = (f"corpus.uri={tmp_path}/mixed.parquet", "score.max_reject_fraction=0.9")
    run = run_without_ray(make(*corpus, "task.overlong=reject"))
    receipt = run.receipt(0, 0)
    rejects = run.read_shard(receipt, "rejects/shard-000000.parquet").to_pylist()
    reasons = {row["example_id"]: row["got"] for row in rejects}
    assert (3, 4) == (receipt.rows, receipt.rejects)
    assert ["an empty text ''", "null"] == [reasons["row-3"], reasons["row-4"]]
    assert "1 tokens, none with a loss" in reasons["row-5"]
    assert "more than 48" in reasons["row-6"]
    cut = run_without_ray(make(*corpus, name="cut"))
    assert (4, 3, 1) == (cut.receipt(0, 0).rows, cut.receipt(0, 0).rejects, cut.receipt(0, 0).overlong)


def test_a_query_that_cannot_be_read_is_an_error_before_any_work(make, tmp_path):
    """A query is never silently smaller."""
    pq.write_table(pa.table({"query_id": ["q"], "text": ["a"]}), tmp_path / "queries.parquet")
    with pytest.raises(InputError, match=r"query 'q', row 0: got 1 tokens, none with a loss"):
        freeze(make(f"queries.uri={tmp_path}/queries.parquet"))


def test_a_query_longer_than_the_context_is_cut_aloud_or_refused(make, tmp_path, capsys):
    """Never split: a window of one token would weigh as much in it as a full one."""
    rows = {"query_id": ["q", "q"], "text": [TEXTS[0], " ".join(TEXTS[:9])]}
    pq.write_table(pa.table(rows), tmp_path / "queries.parquet")
    uri = f"queries.uri={tmp_path}/queries.parquet"
    with pytest.raises(InputError, match=r"query 'q': a row is longer than task\.max_tokens(.|\n)*several rows"):
        freeze(make(uri, "task.overlong=windows"))
    assert freeze(make(uri)).query_ids
    assert "query 'q': 1 of its rows are longer than task.max_tokens and were cut" in capsys.readouterr().err


def test_text_from_json_lines(make, tmp_path):
    """One record per line, as text corpora come."""
    lines = "".join(json.dumps({"id": f"text-{i:02d}", "text": text}) + "\n" for i, text in enumerate(TEXTS))
    (tmp_path / "corpus.jsonl").write_text(lines)
    one = run_without_ray(make(name="parquet"))
    other = run_without_ray(make(f"corpus.uri={tmp_path}/corpus.jsonl", name="lines"))
    assert scores(one)["score"].to_pylist() == scores(other)["score"].to_pylist()


def test_a_folder_of_numbers_is_no_text(make, tmp_path):
    """The column's type is said at once."""
    pq.write_table(pa.table({"id": ["a"], "text": [1.5]}), tmp_path / "numbers.parquet")
    with pytest.raises(InputError, match="got double, expected a text"):
        freeze(make(f"corpus.uri={tmp_path}/numbers.parquet"))


def test_a_changed_model_is_another_run(make, folder, tmp_path):
    """The digest is of config, tokenizer and weights together."""
    saved(gpt(), tmp_path / "model")
    spec = make(f"model.weights_uri={tmp_path}/model")
    first = freeze(spec)
    assert first.resolved.digests["weights"]
    saved(gpt(seed=1), tmp_path / "model")
    assert first.resolved.digests["weights"] != freeze(spec).resolved.digests["weights"]


# --- producers that tune on nothing ------------------------------------------------------------------------------------


def test_a_pair_of_checkpoints_is_compared_without_queries(make, tmp_path):
    """No `queries`: one counterpart, named after its producer; easier under the counterpart is a higher score."""
    saved(gpt(seed=1), tmp_path / "other")
    spec = make("queries=null", f"producer={{name: reference, weights_uri: {tmp_path}/other}}", "corpus.source=id")
    run = run_without_ray(spec)
    finish(run)
    rows = scores(run).to_pylist()
    assert {"reference"} == {row["query_id"] for row in rows}
    for row in rows:
        assert row["base_loss_per_token"] - row["counterpart_loss_per_token"] == pytest.approx(row["score"], abs=1e-5)
    assert run.resolved.digests["producer weights_uri"]
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "reference" in page


def test_nothing_is_selected_where_nothing_is_scored(make, tmp_path):
    """All rows are rejects, as the spec allows: an empty ranking, no selection."""
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["", None]}), tmp_path / "empty.parquet")
    run = run_without_ray(
        make(
            f"corpus.uri={tmp_path}/empty.parquet",
            "score.max_reject_fraction=1",
            "corpus.source=id",
            "rank.fraction=0.5",
        )
    )
    finish(run)
    assert 0 == len(run.read_ranked()[0])
    assert not list((tmp_path / "run" / "topk").rglob("part-*"))


def test_a_budget_is_measured_where_few_rows_can_be_scored(make, tmp_path):
    """The first rows that are looked at may be rejects all."""
    texts = ["", None] * 40 + ["Dora was born in Lisbon.", "Emil lives in Quito.", "Emil was born in Tunis."]
    ids = [str(number) for number in range(len(texts))]
    pq.write_table(pa.table({"id": ids, "text": texts}), tmp_path / "holes.parquet")
    budget = "producer={name: natural, budget_s: 1.0e+9}"
    run = freeze(
        make(f"corpus.uri={tmp_path}/holes.parquet", "score.max_reject_fraction=1", budget, "corpus.source=id")
    )
    assert [] == Tuner(run, "cpu").tune_all(run.query_ids)
    assert {"sample_rows": 4096} == run.measured(CHOICE)["fields"]


def test_a_payload_named_as_a_column_of_the_ranking_is_refused(make, folder, tmp_path):
    """Also as it is called where losses are means."""
    table = pq.read_table(folder / "corpus.parquet")
    pq.write_table(table.append_column("base_loss_per_token", table["id"]), tmp_path / "corpus.parquet")
    with pytest.raises(SpecError, match="base_loss_per_token: the ranked table has columns of that name"):
        freeze(make(f"corpus.uri={tmp_path}/corpus.parquet", "corpus.payload=[base_loss_per_token]"))


def test_queries_are_missed_where_they_are_needed(make):
    """A producer that tunes on them says so before any work."""
    with pytest.raises(SpecError, match="queries: missing; producer unlearn tunes on them"):
        freeze(make("queries=null"))


def test_queries_are_refused_where_none_are_needed(make, folder):
    """Each would have the same counterpart, and cost a pass over the corpus."""
    with pytest.raises(SpecError, match="queries: producer reference tunes on none"):
        freeze(make(f"producer={{name: reference, weights_uri: {folder}/model}}"))


def test_masked_heads_select_the_top_share_of_every_source(make, tmp_path, folder):
    """`rank.fraction`: of each source its own top share, by relative score, all of it exact; another share replaces it."""
    table = pq.read_table(folder / "corpus.parquet")
    table = table.append_column("site", pa.array([f"site-{i % 3}" for i in range(len(table))]))
    pq.write_table(table, tmp_path / "sites.parquet")
    heads = "producer={name: mask_heads, share: 0.25, samples: 2, sample_tokens: 64}"
    overrides = (f"corpus.uri={tmp_path}/sites.parquet", "corpus.source=site", "queries=null", heads)
    run = run_without_ray(make(*overrides, "rank.transform=relative", "rank.fraction=0.34"))
    finish(run)
    rows = scores(run).to_pylist()
    expected = []
    for site in ("site-0", "site-1", "site-2"):
        values = sorted(
            (-row["score"] / (row["base_loss_per_token"] + 1e-3), row["example_id"])
            for row in rows
            if row["source"] == site
        )
        expected += [example_id for _, example_id in values[: math.ceil(0.34 * len(values))]]
    selected = asked(f"FROM '{run.uri('topk')}/selected/*/*.parquet' ORDER BY source, place")
    assert expected == selected["example_id"].to_pylist()
    assert [1, 2, 3, 4] * 3 == selected["place"].to_pylist()
    finish(freeze(make(*overrides, "rank.transform=relative", "rank.fraction=0.1")))
    assert 3 == len(asked(f"FROM '{run.uri('topk')}/selected/*/*.parquet'"))
    finish(freeze(make(*overrides, "rank.transform=relative")))
    assert not list((tmp_path / "run" / "topk" / "selected").rglob("*.parquet"))


# --- on Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.parametrize(
    "producer",
    ["{name: unlearn, steps: 3}", "{name: unlearn, steps: 3, last_blocks: 1, lora_rank: 4, lr: 0.1}"],
    ids=["weights", "adapters of the last block"],
)
def test_workers_that_tune_together_make_the_same_counterpart(make, ray_cluster, producer):
    """FSDP2 over two workers, each with half of the counterpart: that of one worker to 1e-5."""
    alone = freeze(make(f"producer={producer}", name="alone"))
    tuner = Tuner(alone, "cpu")
    for query_id in alone.query_ids:
        tuner.tune(query_id)
    together = run_stage(make(f"producer={producer}", "resources.tune={workers: 2, shard: true}"), "tune")
    for query_id in alone.query_ids:
        expected, got = (tensors(run, query_id) for run in (alone, together))
        assert sorted(expected) == sorted(got)
        assert all(torch.allclose(tensor, got[name], atol=1e-5) for name, tensor in expected.items())


@pytest.mark.ray
def test_workers_that_tune_together_end_at_the_same_step(make, ray_cluster, tmp_path):
    """FSDP2 with held-out rows, the best step neither the first nor the last that is tried: weights and losses of one worker."""
    pq.write_table(pa.table({"query_id": ["many"] * 8, "text": TEXTS[:8]}), tmp_path / "many.parquet")
    producer = "producer={name: finetune, lr: 0.1, steps: 40, validation_fraction: 0.25, patience: 4}"
    overrides = [producer, f"queries.uri={tmp_path / 'many.parquet'}"]
    alone = freeze(make(*overrides, name="alone"))
    Tuner(alone, "cpu").tune("many")
    together = run_stage(make(*overrides, "resources.tune={workers: 2, shard: true}"), "tune")
    one, two = (run.counterpart_meta("many") for run in (alone, together))
    assert 1 < one["steps"] < one["details"]["steps_tried"] < 40
    assert one["steps"] == two["steps"]
    assert one["details"] == pytest.approx(two["details"], abs=1e-4)
    expected, got = (tensors(run, "many") for run in (alone, together))
    assert all(torch.allclose(tensor, got[name], atol=1e-4) for name, tensor in expected.items())


def tensors(run, query_id):
    """What is in a counterpart's file."""
    return safetensors.torch.load(run.counterpart_tensors(query_id))


# --- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens_are_shaded_by_their_change(make, monkeypatch, capsys):
    """`show --tokens`: every token of the texts found, with figures; those of one text add up to its scores."""
    run = run_without_ray(make("task.reduction=sum"))
    finish(run)
    assert 0 == exit_code(monkeypatch, "show", run.uri(), "--query", "three", "--tokens", "--top", "2")
    assert f"tokens         {run.uri('report', 'tokens-three.html')}" in capsys.readouterr().out
    with open(run.uri("report", "tokens-three.html")) as page:
        text = page.read()
    ranked, _ = run.read_ranked()
    row = of(ranked, "three", "proponent")[0]
    (shaded,) = _shaded(run, "three", [row])
    assert tokenizer()(TEXTS[3])["input_ids"][1:] == tokenizer()("".join(shaded.tokens))["input_ids"]
    assert row["score"] == pytest.approx(shaded.score_T.sum(), abs=1e-4)
    assert row["base_loss"] == pytest.approx(shaded.base_T.sum(), rel=1e-5)
    assert len(shaded.tokens) <= text.count("<span style='background") - 2


def test_tokens_of_what_is_no_text_are_a_clear_error(make_spec, monkeypatch, capsys):
    """A classifier has none; a query must be named."""
    run = run_without_ray(make_spec())
    finish(run)
    assert 2 == exit_code(monkeypatch, "show", run.uri(), "--query", "copy-of-3", "--tokens")
    assert "task classification has no tokens" in capsys.readouterr().err
    assert 2 == exit_code(monkeypatch, "show", run.uri(), "--tokens")
    assert "of which query?" in capsys.readouterr().err
