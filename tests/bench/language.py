"""`make bench` for language models: one worker's scoring of texts against a bare loop without waste, and the usual way.

SmolLM2-135M, bfloat16, texts of 10 to 1,024 tokens, one query. The bare loop runs the same tokens packed into full rows, two
forward passes and two losses, so that nothing is padding; the usual way pads batches of 8 in the order of the corpus and takes
the losses of Hugging Face's own `labels=`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from pipeline.artifacts import Run
from pipeline.extensions import load_model
from pipeline.freeze import freeze
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from pipeline.tuner import Tuner
from tests.bench.speed_worlds import forget_scores
from tests.bench.table import Row, at_least, machine, publish

MODEL = Path("build/smollm2")
TEXTS, SHORTEST, LONGEST = 24, 10, 1024
ROWS_PACKED, ROWS_PADDED = 4, 8
PAIRS = 3
_WORDS = "the a of to in and is was born lived wrote house river city year model example loss shard query"


class World:
    """Texts of mixed lengths on disk, and a run over them whose counterpart is made.

    Args:
        folder: Where they go.
        model: Folder of the model.
        texts: How many.
        dtype: Compute dtype.
    """

    def __init__(self, folder: Path, model: Path, texts: int, dtype: str = "bfloat16") -> None:
        from transformers import AutoTokenizer

        draw = random.Random(0)
        self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(texts)]
        self.texts = [" ".join(draw.choices(_WORDS.split(), k=length)) for length in lengths]
        self.ids = [torch.tensor(ids) for ids in self.tokenizer(self.texts)["input_ids"]]
        self.tokens = sum(map(len, self.ids))
        pq.write_table(pa.table({"text": self.texts}), folder / "corpus.parquet")
        pq.write_table(pa.table({"query_id": ["q"], "text": ["the model was born in the city"]}), folder / "q.parquet")
        spec: Any = {
            "run": {"uri": str(folder / "run")},
            "model": {"loader": "hf_transformers", "weights_uri": str(model), "dtype": dtype},
            "task": {"name": "causal_lm"},
            "corpus": {"uri": str(folder / "corpus.parquet")},
            "queries": {"uri": str(folder / "q.parquet")},
            "producer": {"name": "unlearn", "steps": 1, "lr": 1.0},
            "score": {"shard_rows": texts, "noise_rows": 0},  # of so few rows it is a large part
        }
        self.run: Run = freeze(parse_spec(spec))
        Tuner(self.run, "cpu").tune("q")
        self.scorer = ShardScorer(self.run, "cpu")
        self.models = [load_model(self.run.spec.model, "cpu", 0) for _ in range(2)]

    def ours(self) -> float:
        """Tokens/s of one worker's work, Parquet in and Parquet out."""
        forget_scores(self.run)
        started_s = time.perf_counter()
        for work in self.run.works():
            self.scorer.score(work)
        return self.tokens / (time.perf_counter() - started_s)

    def packed(self) -> float:
        """Tokens/s of two forward passes and losses over the same tokens in full rows, in memory already."""
        whole = torch.cat(self.ids)
        rows = whole[: len(whole) // LONGEST * LONGEST].view(-1, LONGEST)
        with torch.inference_mode():
            started_s = time.perf_counter()
            for ids in rows.split(ROWS_PACKED):
                for model in self.models:
                    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                    F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
            return rows.numel() / (time.perf_counter() - started_s)

    def padded(self) -> float:
        """Tokens/s, padding not counted, of batches in order, padded to their longest, with the models' own losses."""
        with torch.inference_mode():
            started_s = time.perf_counter()
            for start in range(0, len(self.ids), ROWS_PADDED):
                some = self.ids[start : start + ROWS_PADDED]
                ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
                there = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in some], batch_first=True)
                for model in self.models:
                    model(
                        input_ids=ids, attention_mask=there, labels=ids.masked_fill(there == 0, -100), use_cache=False
                    )
            return self.tokens / (time.perf_counter() - started_s)


def alternating(*sides: Callable[[], float], pairs: int) -> list[list[float]]:
    """So many measurements of each side by turns, after one of each to warm up."""
    for side in sides:
        side()
    rounds = [[side() for side in sides] for _ in range(pairs)]
    return [list(values) for values in zip(*rounds, strict=True)]


def measure(world: World, pairs: int = PAIRS) -> list[Row]:
    """Our tokens/s over those of either loop."""
    ours, packed, padded = alternating(world.ours, world.packed, world.padded, pairs=pairs)
    texts = f"{len(world.texts)} texts of {SHORTEST} to {LONGEST:,} words, {world.tokens:,} tokens, 1 query"
    same = f"{texts}, {world.run.spec.model.dtype}, one process, medians of {pairs} by turns; {machine()}"
    rows = []
    for name, theirs, bar in (("packed bare", packed, 0.9), ("padded usual", padded, 2.0)):
        ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
        rates = f"Parquet in, Parquet out: {statistics.median(ours):,.0f} tokens/s; {name}: {statistics.median(theirs):,.0f}"
        rows.append(at_least(f"texts: score stage / {name} loop (tokens/s)", ratio, bar, f"{rates}; {same}"))
    return rows


def main() -> None:
    """With SmolLM2, which `make bench` puts in its place."""
    with TemporaryDirectory() as folder:
        publish("bench", measure(World(Path(folder), MODEL, TEXTS)))


if __name__ == "__main__":
    main()
