"""Facts, traced: a small GPT learns them here from sentences, and the sentences that taught one are found again."""

import numpy as np
import pytest
import torch

from jobs import facts as benchmark
from pipeline.evaluate import retrieval
from tests.bench import baselines
from tests.bench import facts as bench
from tests.language import tokenizer

VOCABULARY, WIDTH = 1000, 64
RECIPE = ["producer.lr=1e-3"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> bench.Facts:
    """60 facts of the slice in 120 sentences, as `python -m jobs.facts` makes the benchmark, by a model that knows nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("facts")
    patterns = benchmark.load_patterns()
    some = benchmark.chosen(benchmark.load_facts(), 60)
    texts = [row["text"] for row in benchmark.sentences(some, patterns)]
    texts += [row["prompt"] for row in benchmark.queries(some, patterns)]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "before")
    tokenizer(texts=texts, vocabulary=VOCABULARY).save_pretrained(folder / "before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "FACTS", 60)
        patch.setattr(benchmark, "EPOCHS", 40)
        patch.setattr(benchmark, "LR", 3e-3)
        patch.setattr(benchmark, "QUERIES", {"questions": 2, "evaluated": 16})
        benchmark.write_benchmark(folder, folder / "before")
    return bench.Facts(folder, "evaluated.parquet", RECIPE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp, of itself
def test_the_sentences_that_taught_a_fact_are_found(facts, capsys):
    """16 questions, 120 sentences: MRR above .5 (chance under .1) and above that of gradient dot products; all is told."""
    *_, rows = bench.measured(facts)
    mrr = {(row["method"], row["over"]): row["mrr"][0] for row in rows}
    often_QN = np.tile(facts.truth_QN, (100, 1))
    assert retrieval(baselines.chance(len(facts.texts), len(often_QN)), often_QN).reciprocal_rank_Q.mean() < 0.1
    assert mrr[("gradients (TracIn)", "all")] < mrr[(bench.OURS, "all")] <= mrr[(bench.OURS, "pool")]
    assert mrr[(bench.OURS, "all")] > 0.5
    assert all(low <= value <= high for row in rows for value, low, high in [row["mrr"], row["recall"]])
    bench.show(rows, facts)
    told = capsys.readouterr().out
    assert "16 queries, over all 120 sentences" in told
    assert all(method in told for method, _ in mrr)
