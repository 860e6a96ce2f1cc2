"""Other libraries' scores and timings on the same model and data as ours, in an environment of their own.

    python3 -m venv build/peers && build/peers/bin/pip install -r tests/bench/peers/requirements.txt
    build/peers/bin/python -m tests.bench.peers.run FOLDER [--only NAME ...] [--threads 2] [--timing-rows 20000 | --serve]

FOLDER holds setup.json ({"factory": "package.module:function", "kind": "classification" or "causal_lm", "reduction": "sum" or
"mean", "temperature": what logits are divided by}), model.safetensors, train.npz and queries.npz (features and label, or
input_ids and labels with -100 where a token does not count). Examples and queries are called by their row numbers.

Writes FOLDER/scores-NAME.parquet (query_id, example_id, score; higher = training on the example lowers the query's loss more)
and FOLDER/peers.json. With --timing-rows, FOLDER/peers-speed.json instead: one query against the training examples repeated up
to so many rows, median of three runs after one that does not count, in the batches that suit each peer best.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from tests.bench.peers.check import COVERED, agreement
from tests.bench.peers.world import Kind, Scored, UnsupportedError, World

Peer = Callable[[World], Scored]

RUNS = 3
WARM_UP_ROWS = 64
BATCHES: dict[Kind, tuple[int, ...]] = {"classification": (64, 256, 1024, 4096), "causal_lm": (8, 32, 128)}
"""What speed is measured in; the fastest counts."""
ANSWER = "answer: "
"""Before what --serve says; libraries print, too."""
PLAIN = ("kronfluence-identity", "dattri-graddot", "dattri-hooks", "captum-tracincp", "captum-tracincp-fast")
"""Peers without curvature or projections, whose speed is measured."""
ASKED = ("bergson-projected", "kronfluence-trunk", "kronfluence-lowrank", "dattri_llm-trunk")
"""Ways to be fast, which are left out unless they are asked for by name."""


def peers() -> dict[str, Peer]:
    """Every peer by name: library-method."""
    from tests.bench.peers import with_bergson, with_captum, with_dattri, with_dattri_llm, with_kronfluence

    return {
        "bergson-graddot": with_bergson.graddot,
        "bergson-projected": with_bergson.projected,
        "kronfluence-identity": with_kronfluence.identity,
        "kronfluence-trunk": with_kronfluence.trunk,
        "kronfluence-lowrank": with_kronfluence.low_rank,
        "kronfluence-ekfac": with_kronfluence.ekfac,
        "kronfluence-ekfac-heuristic": with_kronfluence.ekfac_heuristic,
        "dattri_llm-graddot": with_dattri_llm.graddot,
        "dattri_llm-trunk": with_dattri_llm.trunk,
        "dattri-graddot": with_dattri.graddot,
        "dattri-hooks": with_dattri.hooks,
        "dattri-tracin": with_dattri.tracin,
        "dattri-trak": with_dattri.trak,
        "dattri-trak-regularized": with_dattri.trak_regularized,
        "dattri-ekfac": with_dattri.ekfac,
        "dattri-ekfac-mended": with_dattri.ekfac_mended,
        "captum-tracincp": with_captum.tracincp,
        "captum-tracincp-fast": with_captum.tracincp_fast,
    }


def score(folder: Path, world: World, chosen: dict[str, Peer]) -> None:
    """Scores and timings of the chosen peers; what other peers left there stays."""
    for name, peer in chosen.items():
        try:
            _warm_up(peer, world.first(WARM_UP_ROWS))
            scored = peer(world)
        except UnsupportedError as error:
            _note(folder / "peers.json", name, {"version": _version(name), "unsupported": str(error)})
            continue
        _write(folder / f"scores-{name}.parquet", scored.score_QN)
        _note(
            folder / "peers.json",
            name,
            {"fit_s": scored.fit_s, "score_s": scored.score_s, **_facts(name, world, scored.settings)},
        )


def measure(folder: Path, world: World, chosen: dict[str, Peer]) -> None:
    """Rows per second of the chosen peers in the batches that suit each best, everything included that one query needs."""
    for name, peer in chosen.items():
        try:
            _note(folder / "peers-speed.json", name, _fastest(name, peer, world))
        except UnsupportedError as error:
            _note(folder / "peers-speed.json", name, {"version": _version(name), "unsupported": str(error)})


def serve(world: World, table: dict[str, Peer]) -> None:
    """Run a peer once for each line on standard input; seconds of what is done once, and for these queries, and of the CPU.

    Before a peer's first turn its scores are checked, and it runs over two batches and one query.
    """
    checks: dict[str, dict[str, float]] = {}
    warm: set[tuple[str, int]] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        name = asked["name"]
        sized = replace(
            world.repeated(asked["rows"], asked["queries"]),
            batch_rows=asked["batch_rows"],
            query_rows=asked.get("query_rows"),
        )
        if name in COVERED and name not in checks:
            checks[name] = agreement(world, name, table[name])
            print("check:", name, checks[name], flush=True)
        if (name, asked["batch_rows"]) not in warm:
            _warm_up(table[name], sized.first(min(asked["rows"], 2 * asked["batch_rows"])))
            warm.add((name, asked["batch_rows"]))
        started_s = time.process_time()
        scored = table[name](sized)
        cpu_s = time.process_time() - started_s
        seconds = {"fit_s": scored.fit_s, "score_s": scored.score_s, "cpu_s": cpu_s}
        seconds |= {"query_s": scored.query_s, "query_cpu_s": scored.query_cpu_s}
        print(ANSWER + json.dumps({**seconds, "check": checks.get(name)}), flush=True)


def _fastest(name: str, peer: Peer, world: World) -> dict[str, Any]:
    seconds: dict[int, list[float]] = {}
    settings: dict[int, str] = {}
    for batch_rows in BATCHES[world.kind]:
        sized = replace(world, batch_rows=batch_rows)
        _warm_up(peer, sized)
        runs = [peer(sized) for _ in range(RUNS)]
        seconds[batch_rows] = [run.fit_s + run.score_s for run in runs]
        settings[batch_rows] = runs[0].settings
    best = min(seconds, key=lambda batch_rows: statistics.median(seconds[batch_rows]))
    return {
        "rows_per_s": len(world.train) / statistics.median(seconds[best]),
        "seconds": seconds[best],
        "rows_per_s_by_batch": {rows: len(world.train) / statistics.median(found) for rows, found in seconds.items()},
        **_facts(name, world, settings[best]),
    }


def _warm_up(peer: Peer, world: World) -> None:
    """One run that does not count; then what it left is kept out of garbage collection.

    kronfluence collects garbage ten times a run, .4 s over what torch and transformers leave lying about, against .03 s for
    20,000 digits.
    """
    peer(world)
    gc.collect()
    gc.freeze()


def _facts(name: str, world: World, settings: str) -> dict[str, Any]:
    return {
        "version": _version(name),
        "rows": len(world.train),
        "queries": len(world.queries),
        "threads": torch.get_num_threads(),
        "settings": settings,
    }


def _version(name: str) -> str:
    return version(name.partition("-")[0])


def _write(path: Path, score_QN: np.ndarray) -> None:
    queries, examples = score_QN.shape
    query_ids, example_ids = np.arange(queries).astype(str), np.arange(examples).astype(str)
    table = {
        "query_id": np.repeat(query_ids, examples),
        "example_id": np.tile(example_ids, queries),
        "score": score_QN.ravel(),
    }
    pq.write_table(pa.table(table), path)


def _note(path: Path, name: str, facts: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: facts}, indent=2) + "\n")
    print(name, json.dumps(facts), flush=True)


def main() -> None:
    """Command line."""
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    # Asked for by kronfluence and bergson and not used; their usual builds break beside a CPU torch when transformers loads them.
    sys.modules["torchvision"] = sys.modules["torchaudio"] = None  # type: ignore[assignment]
    table = peers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="inputs and results")
    parser.add_argument("--only", nargs="+", choices=table, metavar="NAME", help=", ".join(table))
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--timing-rows", type=int, help="measure speed over so many rows instead of writing scores")
    parser.add_argument("--serve", action="store_true", help="measure what standard input asks for")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    world = World.read(given.folder)
    if given.serve:
        serve(world, table)
    elif given.timing_rows:
        measure(given.folder, world.repeated(given.timing_rows), {name: table[name] for name in given.only or PLAIN})
    else:
        score(
            given.folder,
            world,
            {name: table[name] for name in given.only or [each for each in table if each not in ASKED]},
        )


if __name__ == "__main__":
    main()
