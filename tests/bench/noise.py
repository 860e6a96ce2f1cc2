"""How far rounding moves scores: of SmolLM2-135M and of the digits CNN, by precision, way of scoring and length of step.

`python -m tests.bench.noise [MODEL]` prints a table. Beside the noise that a run measures of itself stands what another layout of
the same batches shows of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
from rich.console import Console
from rich.table import Table

from jobs import digits
from pipeline import noise
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from pipeline.tuner import Tuner

MODEL = Path("build/smollm2")
TEXTS, DIGITS = 12, 256
FACTS = Path(__file__).parents[2] / "jobs" / "data" / "trex_facts.jsonl"
ADAPTERS = {
    f"adapters, Adam {lr} x {steps}": {"lora_rank": 8, "lr": lr, "steps": steps}
    for lr, steps in ((1e-5, 1), (1e-3, 3), (1e-2, 3))
}
WEIGHTS = {f"weights, Adam {lr} x {steps}": {"lr": lr, "steps": steps} for lr, steps in ((1e-6, 1), (1e-5, 3))}
ADAM = {"name": "unlearn", "optimizer": "adam", "normalize": False, "max_loss_change": 0}


def texts(folder: Path, model: Path) -> dict[str, Any]:
    """A spec over a dozen texts; the first is the query."""
    rows = [json.loads(line) for line in FACTS.read_text().splitlines()[: 3 * TEXTS]]
    said = [f"{row['subject']} {row['relation']} {row['object']}." for row in rows]
    table = pa.table({"text": [" ".join(said[i : i + 1 + i % 3]) for i in range(TEXTS)]})
    pq.write_table(table, folder / "texts.parquet")
    pq.write_table(table.slice(0, 1).add_column(0, "query_id", [["q"]]), folder / "question.parquet")
    return {
        "model": {"loader": "hf_transformers", "weights_uri": str(model)},
        "task": {"name": "causal_lm"},
        "corpus": {"uri": str(folder / "texts.parquet")},
        "queries": {"uri": str(folder / "question.parquet")},
        "score": {"batch_tokens": 256},
    }


def pictures(folder: Path) -> dict[str, Any]:
    """A spec over digits and the demo's CNN."""
    pixels, labels = (array[:DIGITS] for array in digits.load_digits())
    safetensors.torch.save_file(digits.train(pixels, labels, epochs=8).state_dict(), folder / "cnn.safetensors")
    table = pa.table({"pixels": list(pixels), "label": labels})
    pq.write_table(table, folder / "digits.parquet")
    pq.write_table(table.slice(0, 1).add_column(0, "query_id", [["q"]]), folder / "query.parquet")
    return {
        "model": {"factory": "jobs.digits:cnn", "weights_uri": str(folder / "cnn.safetensors")},
        "task": {"features": "pixels", "label": "label", "shape": [1, 8, 8]},
        "corpus": {"uri": str(folder / "digits.parquet")},
        "queries": {"uri": str(folder / "query.parquet")},
    }


def measured(tree: dict[str, Any], folder: Path, dtype: str, way: str, producer: dict[str, Any]) -> list[str]:
    """Score's root mean square, its noise, what half batches show of it, and the measurement's time over that of its rows."""
    tree = tree | {"run": {"uri": str(folder / f"run-{time.monotonic_ns()}")}, "producer": producer}
    tree = tree | {"model": tree["model"] | {"dtype": dtype}, "score": tree.get("score", {}) | {"way": way}}
    run = freeze(parse_spec(tree))
    Tuner(run, "cpu").tune("q")
    run = open_run(run.uri())
    scorer = ShardScorer(run, "cpu")
    work = next(iter(run.works()))
    examples = scorer._corpus.read(work.shard, run.columns)
    _, inputs = scorer._prepared(work, examples)
    scorer._losses(work, inputs, None)  # the first time layouts are tried
    started_s = time.perf_counter()
    losses = scorer._losses(work, inputs, None)
    plain_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    found = scorer._noise(work, inputs, losses)["q"]
    times = (time.perf_counter() - started_s) / plain_s * work.shard.rows / found["examples"]
    halves = [batch.item_B[half::2] for batch in scorer._batches(inputs) for half in (0, 1) if len(batch.item_B) > half]
    layout = list(_renumbered(inputs, halves))
    order = np.concatenate(halves)
    other = scorer._through(scorer._engine, layout, [0])
    shown = inputs.of_examples(other.difference_QN) - inputs.of_examples(losses.difference_QN)[:, order]
    score = float(np.sqrt(np.square(inputs.of_examples(losses.difference_QN)).mean()))
    size = float(np.sqrt(found["squares"] / found["examples"]))
    return [
        f"{score:.1e}",
        f"{size:.1e}",
        f"{score / size:,.1f}",
        f"{np.sqrt(np.square(shown).mean() / 2):.1e}",
        f"{times:.1f}",
    ]


def _renumbered(inputs: Any, halves: list[np.ndarray]) -> Iterator[Any]:
    from pipeline.batches import Batch

    start = 0
    for items in halves:
        yield Batch(np.arange(start, start + len(items)), inputs.rows(items))
        start += len(items)


def main() -> None:
    """Print the table."""
    noise.LARGEST_SHARE = 1.0
    out = Console(width=150)
    table = Table()
    for name in (
        "model",
        "dtype",
        "step",
        "way",
        "score",
        "noise",
        "score / noise",
        "half batches",
        "time, x its rows",
    ):
        table.add_column(name)
    with TemporaryDirectory() as name:
        folder = Path(name)
        cnn, llm = pictures(folder), texts(folder, Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL)
        natural: dict[str, Any] = {"natural": {"name": "natural", "sample_rows": 64, "damping": 0.1}}
        natural["unlearn"] = {"name": "unlearn"}
        for kind, tree, steps in (("digits CNN", cnn, natural), ("SmolLM2-135M", llm, ADAPTERS | WEIGHTS)):
            for step, producer in steps.items():
                for dtype in ("float32", "bfloat16"):
                    for way in ("difference", "gradient"):
                        made = producer if "name" in producer else ADAM | producer
                        try:
                            found = measured(tree, folder, dtype, way, made)
                        except Exception as error:  # noqa: BLE001 - a row of the table, too
                            found = [str(error).splitlines()[0][:60]]
                        out.print(kind, dtype, step, way, *found)
                        table.add_row(kind, dtype, step, way, *found)
    out.print(table)


if __name__ == "__main__":
    main()
