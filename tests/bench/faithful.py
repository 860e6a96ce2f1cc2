"""`make bench-faithful`: whose scores are right? Every producer and every peer on the same models and data, by the judge.

Digits (1,000 training examples), an MLP and a CNN: LDS over 100 half subsets x 5 retrainings, 60 test images as queries; copies
of 100 training images, which should find themselves; 100 flipped labels, which 400 clean digits as one query should find.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from jobs.digits import load_digits
from pipeline.artifacts import Run
from pipeline.freeze import freeze
from pipeline.judge import Judge
from pipeline.run import finish
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec, parse_tree
from pipeline.tuner import Tuner
from pipeline.verdict import judged
from tests.bench.table import FOLDER, Row, at_least, machine, publish
from tests.truth.setup import fit

WORLD = Path("build/faithful")
ROWS, QUERIES, COPIES, CLEAN = 1000, 60, 100, 400
TRAINING = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "epochs": 30, "batch_rows": 64}
SUBSETS, RETRAININGS = 100, 5
PEERS_PYTHON = Path("build/peers/bin/python")
EKFAC = ("kronfluence-ekfac", "kronfluence-ekfac-heuristic")

SINGLE: dict[str, dict[str, Any]] = {
    "preset: paper": {"producer": {"preset": "paper"}, "rank": {"transform": "absolute"}},
    "ascent": {"producer": {"name": "unlearn"}, "rank": {"transform": "relative"}},
    "descent": {"producer": {"name": "finetune"}, "rank": {"transform": "relative"}},
    "natural, temperature 1": {
        "producer": {"name": "natural"},
        "task": {"temperature": 1},
        "rank": {"transform": "relative"},
    },
    "natural (default)": {"rank": {"transform": "relative"}},
}
"""Method -> sections of its spec, for single queries."""
GROUP: dict[str, dict[str, Any]] = {
    "preset: paper": {"producer": {"preset": "paper"}},
    "natural (default)": {"rank": {"transform": "relative"}},
    "finetune (mislabelled.yaml)": {
        "producer": {"name": "finetune", "steps": 100}, "task": {"temperature": 3}, "rank": {"transform": "relative"}
    },
}  # fmt: skip
"""Method -> sections of its spec, for a query of many clean rows."""


@dataclass(frozen=True)
class Timed:
    """A finished run, with seconds of its stages in one process.

    Args:
        run: The run.
        tune_s: All counterparts.
        score_s: All scores.
    """

    run: Run
    tune_s: float
    score_s: float


class Digits:
    """1,000 digits and a model trained on them, as files.

    Args:
        kind: `mlp` or `cnn`.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.folder = kind, WORLD / kind
        self.folder.mkdir(parents=True, exist_ok=True)
        pixels, labels = load_digits()
        chance = np.random.default_rng(0)
        asked = ROWS + chance.permutation(len(labels) - ROWS)[:QUERIES]
        copies = chance.permutation(ROWS)[:COPIES]
        self._write("train", labels[:ROWS], pixels[:ROWS], id=[str(i) for i in range(ROWS)])
        self._write("queries", labels[asked], pixels[asked], query_id=[str(i) for i in range(QUERIES)])
        self._write("copies", labels[copies], pixels[copies], query_id=[f"copy-{i}" for i in copies])
        clean = slice(ROWS, ROWS + CLEAN)
        self._write("clean", labels[clean], pixels[clean], query_id=["clean"] * CLEAN)
        pairs = {"query_id": [f"copy-{i}" for i in copies], "example_id": [str(i) for i in copies]}
        pq.write_table(pa.table(pairs), self.folder / "copies-truth.parquet")
        self._weights("model", fit(kind, epochs=30, weight_decay=1e-3).model)
        self.pixels, self.labels, self.asked = pixels, labels, asked

    def _write(self, name: str, labels: np.ndarray, pixels: np.ndarray, **ids: list[str]) -> None:
        path = self.folder / f"{name}.parquet"
        if not path.exists():  # a file that is written again is another one to the runs over it
            pq.write_table(pa.table({**ids, "pixels": list(pixels), "label": labels}), path)

    def _weights(self, name: str, model: torch.nn.Module) -> None:
        safetensors.torch.save_file(model.state_dict(), self.folder / f"{name}.safetensors")

    def flip(self, epochs: int) -> np.ndarray:
        """Give a tenth of the corpus wrong labels, and train on them; which ones."""
        chance = np.random.default_rng(0)
        flipped = chance.permutation(ROWS)[: ROWS // 10]
        wrong = self.labels[:ROWS].copy()
        wrong[flipped] = (wrong[flipped] + chance.integers(1, 10, len(flipped))) % 10
        self._write("flipped", wrong, self.pixels[:ROWS], id=[str(i) for i in range(ROWS)])
        self._weights("flipped", fit(self.kind, epochs=epochs, weight_decay=1e-3, labels=wrong).model)
        pq.write_table(pa.table({"example_id": [str(i) for i in flipped]}), self.folder / "flipped-ids.parquet")
        return flipped

    def run(
        self, name: str, sections: Mapping[str, Any], queries: str, model: str = "model", corpus: str = "train"
    ) -> Timed:
        """A run, in this process; finished runs are taken as they are."""
        folder = "".join(letter if letter.isalnum() else "-" for letter in name)
        tree: dict[str, Any] = {
            "run": {"uri": str(self.folder / "runs" / queries / model / folder)},
            "model": {"factory": f"jobs.digits:{self.kind}", "weights_uri": str(self.folder / f"{model}.safetensors")},
            "corpus": {"uri": str(self.folder / f"{corpus}.parquet"), "example_id": "id"},
            "queries": {"uri": str(self.folder / f"{queries}.parquet")},
            **sections,
        }
        task = {"features": "pixels", "label": "label", "shape": [1, 8, 8]}
        tree["task"] = {**task, **sections.get("task", {})}
        return work(freeze(parse_spec(tree)))

    def for_peers(self) -> None:
        """What `tests.bench.peers.run` reads."""
        image = (-1, 1, 8, 8)
        for name, rows in (("train", slice(0, ROWS)), ("queries", self.asked)):
            np.savez(self.folder / f"{name}.npz", features=self.pixels[rows].reshape(image), label=self.labels[rows])
        setup = {"factory": f"jobs.digits:{self.kind}", "kind": "classification"}
        (self.folder / "setup.json").write_text(json.dumps(setup))


def work(run: Run) -> Timed:
    """Do what is missing of a run in this process; its seconds, as they were when it was done."""
    place = Path(run.uri("seconds.json"))
    if run.is_sealed():
        return Timed(run, **json.loads(place.read_text()))
    started_s = time.monotonic()
    failures = Tuner(run, "cpu").tune_all(run.query_ids)
    if failures:
        raise failures[0]
    tuned_s = time.monotonic()
    scorer = ShardScorer(run, "cpu")
    for one in run.works():
        scorer.score(one)
    seconds = {"tune_s": tuned_s - started_s, "score_s": time.monotonic() - tuned_s}
    finish(run)
    place.write_text(json.dumps(seconds))
    return Timed(run, **seconds)


def peers(world: Digits) -> dict[str, dict[str, Any]]:
    """Scores and timings of the other libraries, if their environment is there; what it says of each."""
    world.for_peers()
    if not (world.folder / "peers.json").exists():
        subprocess.run([PEERS_PYTHON, "-m", "tests.bench.peers.run", world.folder], check=True)
    found: dict[str, dict[str, Any]] = json.loads((world.folder / "peers.json").read_text())
    return {name: facts for name, facts in found.items() if "unsupported" not in facts}


def single(world: Digits) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of the table for single queries, and LDS by method."""
    timed = {name: world.run(name, sections, "queries") for name, sections in SINGLE.items()}
    copies = {name: world.run(name, sections, "copies") for name, sections in SINGLE.items()}
    others = peers(world)
    lds = _judge(
        world, "lds", timed, scores={name: str(world.folder / f"scores-{name}.parquet") for name in others},
        training=TRAINING, lds={"subsets": SUBSETS, "retrainings": RETRAININGS},
    )  # fmt: skip
    truth = _judge(world, "copies", copies, truth={"uri": str(world.folder / "copies-truth.parquet")})
    rows = []
    for name, found in lds.items():
        row = {"method": name, "lds": found["lds"], "se": found["standard_error"]}
        if name in timed:
            seconds = {"tune": timed[name].tune_s / QUERIES, "score": timed[name].score_s / (ROWS * QUERIES)}
            row |= {"top1": truth[name]["top1"], "top5": truth[name]["top5"]}
        else:
            seconds = {"tune": others[name]["fit_s"] / QUERIES, "score": others[name]["score_s"] / (ROWS * QUERIES)}
        rows.append({**row, "s_per_query": seconds["tune"], "us_per_pair": 1e6 * seconds["score"]})
    return rows, {name: float(found["lds"]) for name, found in lds.items()}


def group(world: Digits) -> dict[str, dict[int, float]]:
    """Method -> epochs of training -> AUC of wrong labels found, the base loss alone among them."""
    found: dict[str, dict[int, float]] = {}
    for epochs in (30, 100):
        flipped = world.flip(epochs)
        model = f"flipped-{epochs}"
        (world.folder / "flipped.safetensors").replace(world.folder / f"{model}.safetensors")
        timed = {name: world.run(name, sections, "clean", model, "flipped") for name, sections in GROUP.items()}
        auc = _judge(
            world, model, timed, mislabelled={"uri": str(world.folder / "flipped-ids.parquet")}, key="auc"
        )  # fmt: skip
        for name in GROUP:
            transformed = next(row for label, row in auc.items() if label.startswith(name))
            found.setdefault(name, {})[epochs] = float(transformed["auc"])
        found.setdefault("base loss alone", {})[epochs] = _auc_of_base_loss(timed["preset: paper"].run, flipped)
    return found


def _auc_of_base_loss(run: Run, flipped: np.ndarray) -> float:
    table = pq.read_table(run.uri("scores"), columns=["example_id", "base_loss"], partitioning=None)
    is_flipped = np.isin(np.array(table["example_id"].to_pylist(), int), flipped)
    return float(roc_auc_score(is_flipped, table["base_loss"].to_numpy()))


def _judge(
    world: Digits, name: str, timed: Mapping[str, Timed], key: str = "", **sections: Any
) -> dict[str, dict[str, Any]]:
    tree = {
        "judge": {"uri": str(world.folder / "judged" / name)},
        "runs": {method: each.run.uri() for method, each in timed.items()},
        **sections,
    }
    (judgement,) = judged(parse_tree(Judge, tree))
    return {str(row["method"]): dict(row) for row in judgement.rows}


def show(kind: str, rows: Sequence[Mapping[str, Any]], aucs: Mapping[str, Mapping[int, float]]) -> None:
    """The two tables of a model."""
    table = Table(title=f"digits, {kind}: {machine()}", title_justify="left")
    for name in ("method", "LDS", "s.e.", "top-1", "top-5", "s per query", "us per query and example"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        shares = [f"{row[name]:.2f}" if name in row else "" for name in ("top1", "top5")]
        table.add_row(
            row["method"], f"{row['lds']:.3f}", f"{row['se']:.3f}", *shares, f"{row['s_per_query']:.3f}",
            f"{row['us_per_pair']:.2f}",
        )  # fmt: skip
    Console(width=150).print(table)
    table = Table(title=f"wrong labels, {kind}: AUC", title_justify="left")
    for name in ("method", "30 epochs", "100 epochs"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, found in aucs.items():
        table.add_row(name, *(f"{found[epochs]:.3f}" for epochs in (30, 100)))
    Console(width=150).print(table)


def bars(kind: str, rows: Sequence[Mapping[str, Any]], lds: Mapping[str, float], aucs: Mapping[str, Any]) -> list[Row]:
    """What should be reached, that these tables tell."""
    conditions = f"digits {kind}, {ROWS} rows, {QUERIES} queries, {SUBSETS} x {RETRAININGS} retrainings, {machine()}"
    ours = next(row for row in rows if row["method"] == "natural (default)")
    best = max((lds[name] for name in EKFAC if name in lds), default=float("nan"))
    return [
        at_least(f"{kind}: LDS of the default", ours["lds"], 0.48, conditions),
        at_least(f"{kind}: LDS of the default, less kronfluence EK-FAC's better", ours["lds"] - best, 0.05, conditions),
        at_least(f"{kind}: copies ranked first", ours["top1"], 0.75, conditions),
        at_least(f"{kind}: copies among five", ours["top5"], 0.95, conditions),
        *(
            at_least(f"{kind}: AUC of wrong labels, {epochs} epochs", auc, 0.98, conditions)
            for epochs, auc in aucs["finetune (mislabelled.yaml)"].items()
        ),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("mlp", "cnn"), help="one of the models")
    only = parser.parse_args().only
    for kind in ("mlp", "cnn") if only is None else (only,):
        world = Digits(kind)
        rows, lds = single(world)
        aucs = group(world)
        show(kind, rows, aucs)
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"faithful-{kind}.json").write_text(json.dumps({"rows": rows, "auc": aucs}, indent=1) + "\n")
        publish("faithful", bars(kind, rows, lds, aucs))


if __name__ == "__main__":
    main()
