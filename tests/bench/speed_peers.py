"""Models and rows that gradient peers and ours both read, and the peers in a process that waits for its turn.

    folder = neox()
    with Peers(folder / "peers", threads=1) as theirs:
        spent = theirs("bergson-graddot", queries=64, batch_rows=32, rows=512)
        print(512 / spent.rows_s, theirs.checks)

The folder of a language model holds corpus.parquet (id, tokens) and queries.parquet (query_id, tokens) for a run with the task
causal_lm and `tokens: tokens`, and in peers/ the same rows for the others; `model_of` says where the model is, in Hugging Face
format. Digits are those of `make bench-faithful`.

`python -m tests.bench.speed_peers` prints examples/s of every peer beside those of bare forward passes, by turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.bench.faithful_digits import Digits
from tests.bench.faithful_world import PEERS_PYTHON, Asked
from tests.bench.peers.world import World
from tests.bench.table import machine

FOLDER, SMOLLM2 = Path("build/speed"), Path("build/smollm2")
NEOX = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
NEOX_ROWS, NEOX_TOKENS = 2048, 32
SMOLLM2_ROWS, SMOLLM2_TOKENS, QUERY_TOKENS = 64, 256, 16
QUERIES = 64
WORDS = "the a of to in and is was born lived wrote house river city year model example loss shard query"
DIGIT_PEERS = (
    "kronfluence-identity", "dattri_llm-graddot", "dattri_llm-trunk", "dattri-graddot", "dattri-hooks", "captum-tracincp",
)  # fmt: skip
TEXT_PEERS = (
    "bergson-graddot", "bergson-projected", "kronfluence-identity", "kronfluence-trunk", "kronfluence-lowrank",
    "dattri_llm-graddot", "dattri_llm-trunk",
)  # fmt: skip
"""Exact but for the projected and the low-rank one; trunk: without gradients of the output layer, as bergson always does."""


@dataclass(frozen=True)
class Spent:
    """Seconds of one turn.

    Args:
        once_s: For any queries, by the clock.
        score_s: For these queries, by the clock.
        cpu_s: Both, of all threads.
        query_s: Those of score_s that went into the queries' own gradients, where a peer tells them apart.
        query_cpu_s: The same, of the CPU.
    """

    once_s: float
    score_s: float
    cpu_s: float
    query_s: float = 0.0
    query_cpu_s: float = 0.0

    @property
    def whole_s(self) -> float:
        """All, by the clock."""
        return self.once_s + self.score_s

    @property
    def rows_s(self) -> float:
        """Without the queries' own gradients, by the clock: what grows with the corpus, where nothing else is done once."""
        return self.whole_s - self.query_s

    @property
    def rows_cpu_s(self) -> float:
        """The same, of the CPU."""
        return self.cpu_s - self.query_cpu_s


class Peers:
    """The other libraries in a process of their own, which waits while it is not its turn.

    Attributes:
        checks: What a peer's first turn found of its scores beside plain dot products of gradients: relative_error, spearman.

    Args:
        folder: As `Digits.for_peers`, `neox` and `smollm2` write it.
        threads: Of torch.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        command = [str(PEERS_PYTHON), "-m", "tests.bench.peers.run", str(folder), "--serve", "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.checks: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, queries: int, batch_rows: int, rows: int, query_rows: int | None = None) -> Spent:
        """One turn; the first of a peer and batch comes after one that does not count.

        Args:
            name: Of `tests.bench.peers.run`.
            queries: The first so many.
            batch_rows: Examples of a batch.
            rows: Examples; those of the folder over and over.
            query_rows: Queries held at a time, with a pass over the examples for each time; null for all, or what suits the peer.
        """
        asked = {"name": name, "rows": rows, "queries": queries, "batch_rows": batch_rows, "query_rows": query_rows}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = next((line for line in self._process.stdout if line.startswith("answer: ")), None)
        if answer is None:
            raise RuntimeError(
                f"{name}: the peers' process ended with {self._process.wait()}; -9 is out of memory, perhaps"
            )
        found = json.loads(answer.removeprefix("answer: "))
        if found["check"] is not None:
            self.checks[name] = found["check"]
        return Spent(*(found[name] for name in ("fit_s", "score_s", "cpu_s", "query_s", "query_cpu_s")))

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def digits() -> Path:
    """The digits CNN and 1,000 digits; 100 of them are queries."""
    world, folder = Digits("cnn"), FOLDER / "digits"
    (folder / "peers").mkdir(parents=True, exist_ok=True)
    world.for_peers(folder / "peers", Asked("copies"))
    return folder


def neox() -> Path:
    """GPT-NeoX of 6 layers, width 128, random weights, float32; 2,048 texts and 64 queries of 32 random tokens."""
    folder, chance = FOLDER / "neox", np.random.default_rng(0)
    if not (folder / "peers" / "setup.json").exists():
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(0)
            GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)).save_pretrained(folder / "model")
        train, queries = (chance.integers(0, NEOX["vocab_size"], (n, NEOX_TOKENS)) for n in (NEOX_ROWS, QUERIES))
        _write(folder, train, queries, folder / "model", "float32")
    return folder


def smollm2() -> Path:
    """SmolLM2-135M in bfloat16; 64 texts of 256 tokens and 64 queries of 16.

    Queries are short so that a turn is scoring: their length does not matter to it, except that a gradient of 16 tokens is of
    rank 16, so that kronfluence's low rank loses nothing, and is fewer factors to dattri-llm.
    """
    folder, chance = FOLDER / "smollm2", np.random.default_rng(0)
    if not (folder / "peers" / "setup.json").exists():
        from transformers import AutoTokenizer

        words = [" ".join(chance.choice(WORDS.split(), SMOLLM2_TOKENS)) for _ in range(SMOLLM2_ROWS + QUERIES)]
        rows = np.array(
            [
                ids[:SMOLLM2_TOKENS]
                for ids in AutoTokenizer.from_pretrained(SMOLLM2, trust_remote_code=False)(words)["input_ids"]
            ]
        )
        _write(folder, rows[:SMOLLM2_ROWS], rows[SMOLLM2_ROWS:, :QUERY_TOKENS], SMOLLM2, "bfloat16")
    return folder


def model_of(folder: Path) -> tuple[str, str]:
    """Folder and dtype of the model."""
    setup = json.loads((folder / "peers" / "setup.json").read_text())
    return setup["folder"], setup["dtype"]


def _write(folder: Path, train: np.ndarray, queries: np.ndarray, model: Path, dtype: str) -> None:
    theirs = folder / "peers"
    theirs.mkdir(parents=True, exist_ok=True)
    for name, ids in (("train", train), ("queries", queries)):
        np.savez(theirs / f"{name}.npz", input_ids=ids, labels=ids)
    for name, column, ids in (("corpus", "id", train), ("queries", "query_id", queries)):
        table = {column: [str(row) for row in range(len(ids))], "tokens": list(ids)}
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    setup = {"folder": str(model), "dtype": dtype, "kind": "causal_lm", "reduction": "mean"}
    (theirs / "setup.json").write_text(json.dumps(setup))


class Bare:
    """Forward passes and losses over tensors in memory, without gradients.

    Args:
        folder: As peers read it.
    """

    def __init__(self, folder: Path) -> None:
        self._world = World.read(folder)
        self._model = self._world.model()

    def __call__(self, passes: int, batch_rows: int, rows: int) -> Spent:
        """One turn."""
        batches = list(self._world.repeated(rows).train.loader(batch_rows))
        cpu_s, started_s = time.process_time(), time.perf_counter()
        with torch.inference_mode():
            for inputs, targets in batches:
                for _ in range(passes):
                    self._world.loss_B(self._model(inputs), targets)
        return Spent(0.0, time.perf_counter() - started_s, time.process_time() - cpu_s)


@dataclass(frozen=True)
class Setting:
    """What is measured unless the command line says otherwise.

    Args:
        folder: Makes the files.
        names: Peers.
        rows: Examples of a turn.
        batch_rows: Tried; the fastest counts.
    """

    folder: Callable[[], Path]
    names: tuple[str, ...]
    rows: int
    batch_rows: tuple[int, ...]


SETTINGS = {
    "digits": Setting(digits, DIGIT_PEERS, 16384, (64, 256, 1024)),
    "neox": Setting(neox, TEXT_PEERS, 512, (8, 32, 128)),
    "smollm2": Setting(smollm2, TEXT_PEERS[1:], 16, (4, 16)),
}


def fastest(turns: Mapping[int, Callable[[], Spent]]) -> int:
    """Of some batch sizes, by CPU time, which other people's work disturbs least."""
    if len(turns) == 1:
        return next(iter(turns))
    return min(turns, key=lambda batch_rows: turns[batch_rows]().rows_cpu_s)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=SETTINGS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join((*DIGIT_PEERS, *TEXT_PEERS)))
    parser.add_argument("--queries", type=int, nargs="+", default=(1, 64))
    parser.add_argument("--rows", type=int, help="examples of a turn")
    parser.add_argument("--batch-rows", type=int, nargs="+", help="tried; the fastest counts")
    parser.add_argument("--query-rows", type=int, help="queries held at a time (all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all")
    given = parser.parse_args()
    setting = SETTINGS[given.world]
    given.only, given.rows = given.only or setting.names, given.rows or setting.rows
    given.batch_rows = given.batch_rows or setting.batch_rows
    torch.set_num_threads(given.threads)
    folder = setting.folder() / "peers"
    with Peers(folder, given.threads) as theirs:
        for queries in given.queries:
            _print(_by_turns(Bare(folder), theirs, queries, given), queries, given, theirs.checks)


def _by_turns(bare: Bare, theirs: Peers, queries: int, given: Any) -> dict[str, list[Spent]]:
    """Every peer at its fastest batch, and two bare passes."""

    def turn(name: str, batch_rows: int) -> Callable[[], Spent]:
        if name == "bare":
            return lambda: bare(2, batch_rows, given.rows)
        return lambda: theirs(name, queries, batch_rows, given.rows, given.query_rows or queries)

    names = ("bare", *given.only)
    sizes = {name: fastest({rows: turn(name, rows) for rows in given.batch_rows}) for name in names}
    print(f"{queries} queries, batches: {sizes}", flush=True)
    rounds = [{name: turn(name, sizes[name])() for name in names} for _ in range(given.rounds)]
    return {name: [each[name] for each in rounds] for name in names}


def _print(
    spent: Mapping[str, Sequence[Spent]], queries: int, given: Any, checks: Mapping[str, Mapping[str, float]]
) -> None:
    print(f"{given.world}, {queries} queries, {given.rows} rows a turn, {given.rounds} rounds, {machine()}")
    for name, turns in spent.items():
        clock = statistics.median(given.rows / each.rows_s for each in turns)
        cpu = statistics.median(given.rows / each.rows_cpu_s for each in turns)
        pairs = list(zip(spent["bare"], turns, strict=True))
        ratio = statistics.median(b.rows_s / each.rows_s for b, each in pairs)
        cpu_ratio = statistics.median(b.rows_cpu_s / each.rows_cpu_s for b, each in pairs)
        query_s = statistics.median(each.query_s for each in turns)
        check = {key: float(f"{value:.2g}") for key, value in checks.get(name, {}).items()}
        print(
            f"{name:22} {clock:8.2f} examples/s, {ratio:.3f} of two bare passes; {cpu:8.2f} per s of CPU, {cpu_ratio:.3f};"
            f" queries {query_s:.2f} s before; {check}",
            flush=True,
        )


if __name__ == "__main__":
    main()
