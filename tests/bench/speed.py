"""`python -m tests.bench.speed`: the score stage beside bare loops, and the engine beside gradient peers; by turns, one table.

Every figure is a ratio of medians of pairs: the sides of a pair run one after the other in the same minute.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline import cluster
from pipeline.batches import Arrays, Inputs, Ragged, Sequences
from pipeline.changes import Change, LowRank
from pipeline.engine import LossEngine
from pipeline.tasks.classification import Classification
from pipeline.tasks.language import CausalLM
from pipeline.tasks.tokens import IGNORED
from tests.bench import speed_peers
from tests.bench.peers.world import Rows
from tests.bench.peers.world import World as PeersWorld
from tests.bench.speed_peers import Bare, Peers
from tests.bench.speed_worlds import QUERIES, WORLDS, Stage, World, on_ray
from tests.bench.table import Row, at_least, at_most, figure, machine, publish

DIGITS = Classification("features", "label", [1, 8, 8])
MANY_PEERS = {"kronfluence-lowrank": 1.2, "dattri_llm-trunk": 1.2, "bergson-projected": None}
"""And bars. bergson's projected scores are other scores; unprojected, it holds 64 queries' gradients: more than 20 GiB."""
MANY_ROWS, MANY_ROUNDS = 8, 5
FOLDER, ROUNDS, SMALL_RUNS = Path("build/speed/worlds"), 5, 4
MANY_QUERIES, RANK = 64, 8
COMPILED = ("resnet", "smollm2")
BESIDE_LOOPS, SIZES = ("digits", "digits-many", "resnet", "smollm2"), ("digits-100k", "digits-5m")
BARS = {("all", 1): 0.95, ("quarter", 1): 1.5, ("all", QUERIES): 1.65, ("quarter", QUERIES): 3.0}
QUARTER_OF_TEXTS = 1.35


def by_turns(*sides: Callable[[], float], rounds: int = ROUNDS) -> list[list[float]]:
    """So many measurements of each side by turns, after one of each to warm up."""
    for side in sides:
        side()
    measured = [[side() for side in sides] for _ in range(rounds)]
    return [list(values) for values in zip(*measured, strict=True)]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median of pairs: how many times as fast ours is."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def stage(world: World, rounds: int = ROUNDS) -> list[Row]:
    """Stage score against bare two-pass loops, one for each query."""
    rows = []
    for tuned, queries in BARS:
        if queries not in world.queries:
            continue
        run = world.run(queries, world.quarter if tuned == "quarter" else 0)
        timed = partial(on_ray, run) if world.actors else Stage(run)
        with cluster.connected(run.spec.resources) if world.actors else nullcontext():
            ours, bare = by_turns(timed, world.two_passes, rounds=rounds)
        what = "all parameters tuned" if tuned == "all" else f"the last {world.quarter} blocks tuned"
        bar = (
            QUARTER_OF_TEXTS if "SmolLM2" in world.name and (tuned, queries) == ("quarter", 1) else BARS[tuned, queries]
        )
        by = f"{world.actors} actors of 1 thread on Ray, first start to last commit" if world.actors else "one worker"
        conditions = (
            f"{world.rows:,} rows, Parquet in and out, {by}: {statistics.median(ours):.2f} s; bare two passes "
            f"{statistics.median(bare):.2f} s, by {world.loop_threads} of 1 or all threads, whichever is faster; "
            f"medians of {rounds} by turns; {machine()}"
        )
        loops = "a bare two-pass loop" if queries == 1 else f"{queries} bare two-pass loops"
        rows.append(
            at_least(
                f"{world.name}: stage score, {what}, against {loops}", ratio(bare, ours) * queries, bar, conditions
            )
        )
    return rows


def compiled(world: World, rounds: int = ROUNDS) -> list[Row]:
    """Stage score by one worker in this process, with `score.compile` and without; the first batch is not counted."""
    rows = []
    for tuned, last_blocks in (("all parameters", 0), (f"the last {world.quarter} blocks", world.quarter)):
        fast, plain = (Stage(world.run(1, last_blocks, compile)) for compile in (True, False))
        first_s = fast()
        fast_s, plain_s = by_turns(fast, plain, rounds=rounds)
        conditions = (
            f"{world.rows:,} rows, one worker, 1 query: {statistics.median(fast_s):.2f}, not {statistics.median(plain_s):.2f} s; "
            f"the first time, with compiling, {first_s:.1f} s; medians of {rounds} by turns; {machine()}"
        )
        rows.append(figure(f"{world.name}: stage score compiled, {tuned} tuned", ratio(plain_s, fast_s), conditions))
    return rows


def growth() -> list[Row]:
    """What a row costs stage score in a large corpus, beside small ones."""
    small, large = (WORLDS[name](FOLDER).run(1, 0) for name in SIZES)

    def of_small() -> float:
        return statistics.mean(on_ray(small) for _ in range(SMALL_RUNS))

    with cluster.connected(large.spec.resources):
        small_s, large_s = by_turns(of_small, partial(on_ray, large))
    small_us, large_us = ([1e6 * s / run.rows for s in each] for run, each in ((small, small_s), (large, large_s)))
    conditions = (
        f"{statistics.median(large_us):.2f} us a row, {statistics.median(small_us):.2f} in the small one (mean of {SMALL_RUNS} "
        f"runs), by actors of 1 thread on Ray, first start to last commit; medians of {ROUNDS} by turns; {machine()}"
    )
    measure = f"digits CNN: stage score, cost per row, {large.rows:,} / {small.rows:,} rows"
    return [at_most(measure, ratio(large_us, small_us), 1.03, conditions)]


class Engine:
    """The loss engine over the rows that peers have, in memory.

    Args:
        folder: As peers read it.
        rows: So many of its examples, over and over.
        batch_rows: Examples of a batch.
        changes: Of the model, its counterparts.
    """

    def __init__(
        self, folder: Path, rows: int, batch_rows: int, changes: Callable[[nn.Module], Sequence[Mapping[str, Change]]]
    ) -> None:
        world = PeersWorld.read(folder)
        model, examples = world.model().model, world.repeated(rows).train
        self._batches = list(_inputs(examples).batches(batch_rows, batch_rows * examples.inputs.shape[1]))
        task = DIGITS if world.kind == "classification" else _causal()
        self._engine = LossEngine(model, task, changes(model))
        self._base_S = self._engine.losses(self._batches, []).base_N

    def losses(self) -> float:
        """Seconds for losses under base and counterparts."""
        return _seconds(lambda: self._engine.losses(self._batches))

    def with_base_kept(self) -> float:
        """The same where the base's are known."""
        return _seconds(lambda: self._engine.losses(self._batches, base_S=self._base_S))

    def derivatives(self) -> float:
        """Seconds for one backward pass for all counterparts."""
        return _seconds(lambda: self._engine.derivatives(self._batches, None, "gradient"))


def _inputs(examples: Rows) -> Inputs:
    inputs, targets = examples.inputs.numpy(), examples.targets.numpy()
    if inputs.dtype.kind == "f":
        return Arrays({"features": inputs, "label": targets})
    ids, labels = Ragged.of(list(inputs), 0), Ragged.of(list(targets), IGNORED)
    return Sequences({"input_ids": ids, "labels": labels}, np.arange(len(inputs)), labels.length_S - 1, True)


def _causal() -> CausalLM:
    task = CausalLM.__new__(CausalLM)  # without a tokenizer: ids are given
    task.per_token = True
    return task


def _seconds(work: Callable[[], Any]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def moved(model: nn.Module) -> list[Mapping[str, Change]]:
    """One counterpart that differs in all parameters; by how much does not matter to time."""
    return [{name: 1.001 * p.detach() for name, p in model.named_parameters()}]


def moved_behind(*names: str) -> Callable[[nn.Module], list[Mapping[str, Change]]]:
    """One that differs in parameters whose names begin so."""
    return lambda model: [{name: each for name, each in moved(model)[0].items() if name.startswith(names)}]


def adapters(model: nn.Module) -> list[Mapping[str, Change]]:
    """Many counterparts that differ by products in all matrices of the blocks, as adapters do."""
    draw = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}
    return [
        {
            name: LowRank(1e-3 * torch.randn(o, RANK, generator=draw), 1e-3 * torch.randn(RANK, i, generator=draw))
            for name, (o, i) in shapes.items()
        }
        for _ in range(MANY_QUERIES)
    ]


@dataclass(frozen=True)
class Match:
    """Us and the peers on one model.

    Args:
        name: For people.
        folder: Makes the files.
        peers: Those that score by gradients as they are; bergson leaves the output layer out.
        quarter: Names of parameters of the last quarter, and behind it, begin so.
        rows: Examples of a turn.
        batches: Sizes that are tried.
        bars: With all parameters tuned; with base losses kept; with the last quarter tuned.
    """

    name: str
    folder: Callable[[], Path]
    peers: tuple[str, ...]
    quarter: tuple[str, ...]
    rows: int
    batches: tuple[int, ...]
    bars: tuple[float, float | None, float]


MATCHES = {
    "digits": Match(
        "digits CNN, float32", speed_peers.digits, speed_peers.DIGIT_PEERS, ("9",), 16_384, (64, 256, 1024), (2.2, None, 3.5)
    ),
    "neox": Match(
        "GPT-NeoX, 32 tokens, float32", speed_peers.neox, ("bergson-graddot", "kronfluence-identity", "dattri_llm-graddot"),
        ("gpt_neox.layers.5", "gpt_neox.final", "embed_out"), 512, (8, 32, 128), (1.15, 2.3, 1.5),
    ),
}  # fmt: skip


def beside_peers(match: Match) -> list[Row]:
    """One query: our engine against the fastest peer, and the bare loop."""
    folder = match.folder() / "peers"
    threads, rows = torch.get_num_threads(), match.rows
    with Peers(folder, threads) as theirs:
        name, size = fastest(theirs, match.peers, 1, rows, match.batches)
        whole, quarter = (
            {n: Engine(folder, rows, n, made) for n in match.batches} for made in (moved, moved_behind(*match.quarter))
        )
        best = min(match.batches, key=lambda n: min(whole[n].losses() for _ in range(2)))
        ours = whole[best]
        sides = (ours.losses, ours.with_base_kept, quarter[best].losses, lambda: theirs(name, 1, size, rows).rows_s)
        *mine, peer = by_turns(*sides)
        check = theirs.checks[name]
    conditions = (
        f"{rows:,} rows in memory, 1 query, batches of {best} and {size}, medians of {ROUNDS} by turns: "
        f"{rows / statistics.median(peer):,.0f} rows/s of {name}, whose scores are {check['relative_error']:.1g} off from plain "
        f"gradient products; {machine()}"
    )
    ways = ("all parameters tuned", "all parameters tuned, base losses kept", "the last quarter tuned")
    found = []
    for what, seconds, bar in zip(ways, mine, match.bars, strict=True):
        measure = f"{match.name}: engine, {what}, against the fastest gradient peer ({name})"
        value, said = ratio(peer, seconds), f"{rows / statistics.median(seconds):,.0f} rows/s; {conditions}"
        found.append(figure(measure, value, said) if bar is None else at_least(measure, value, bar, said))
    return found


def many_queries() -> list[Row]:
    """64 queries on SmolLM2: one backward pass of ours against bare loops, and against peers."""
    folder = speed_peers.smollm2() / "peers"
    bare, ours = Bare(folder), Engine(folder, MANY_ROWS, MANY_ROWS, adapters)
    with Peers(folder, torch.get_num_threads()) as theirs:

        def peer(name: str) -> Callable[[], float]:
            return lambda: theirs(name, MANY_QUERIES, MANY_ROWS // 2, MANY_ROWS, MANY_QUERIES).rows_s

        mine, loops, *others = by_turns(
            ours.derivatives, lambda: bare(2, MANY_ROWS, MANY_ROWS).rows_s, *map(peer, MANY_PEERS), rounds=MANY_ROUNDS
        )
        checks = {
            name: f"Spearman {theirs.checks[name]['spearman']:.2f} with plain gradient products" for name in MANY_PEERS
        }
    same = f"medians of {MANY_ROUNDS} by turns; {machine()}"
    said = f"{MANY_ROWS} rows, {MANY_QUERIES} adapters of rank {RANK} in all blocks: {statistics.median(mine):.1f} s"
    about = f"SmolLM2-135M bfloat16, 256 tokens, {MANY_QUERIES} queries: engine by gradient"
    looped = f"{said}; bare two passes {statistics.median(loops):.1f} s; {same}"
    rows = [
        at_least(f"{about} against {MANY_QUERIES} bare two-pass loops", MANY_QUERIES * ratio(loops, mine), 15.0, looped)
    ]
    for (name, bar), seconds in zip(MANY_PEERS.items(), others, strict=True):
        conditions = f"{said}; theirs {statistics.median(seconds):.1f} s after the queries' own gradients, {checks[name]}; {same}"
        measure, value = f"{about} against {name}", ratio(seconds, mine)
        rows.append(figure(measure, value, conditions) if bar is None else at_least(measure, value, bar, conditions))
    return rows


def fastest(theirs: Peers, names: Sequence[str], queries: int, rows: int, batches: Sequence[int]) -> tuple[str, int]:
    """Name and batch of the peer that takes the least CPU time, which other people's work disturbs least."""
    tried = {(name, size): theirs(name, queries, size, rows).rows_cpu_s for name in names for size in batches}
    return min(tried, key=lambda one: tried[one])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", nargs="*", choices=BESIDE_LOOPS, help="stage score beside bare loops, on these models"
    )
    parser.add_argument("--compiled", nargs="*", choices=COMPILED, help="stage score compiled and not, on these models")
    parser.add_argument("--peers", nargs="*", choices=MATCHES, help="the engine beside gradient peers")
    parser.add_argument("--growth", action="store_true", help="stage score over 5 M rows beside 100 k")
    parser.add_argument("--many", action="store_true", help="64 queries on SmolLM2")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, for all")
    given = parser.parse_args()
    every = given.stage is given.compiled is given.peers is None and not (given.growth or given.many)
    torch.set_num_threads(given.threads)
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in BESIDE_LOOPS if every or given.stage == [] else given.stage or ():
        publish("bench", stage(WORLDS[name](FOLDER)))
    for name in COMPILED if every or given.compiled == [] else given.compiled or ():
        publish("bench", compiled(WORLDS[name](FOLDER / "compiled")))
    if every or given.growth:
        publish("bench", growth())
    for name in MATCHES if every or given.peers == [] else given.peers or ():
        publish("bench", beside_peers(MATCHES[name]))
    if every or given.many:
        publish("bench", many_queries())


if __name__ == "__main__":
    main()
