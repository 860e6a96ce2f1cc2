"""`make bench-faithful`: whose scores are right? Every producer and every peer on the same models and data, by the judge.

An MLP and a CNN on 1,000 digits, MLPs on two tables, and a small language model on 500 sentences: LDS over half subsets, with 60
held-out queries; copies of 100 training examples, which should find themselves; 100 flipped labels, which 400 clean digits as one
query should find; sentences that state a fact, which its question should find; models without a digit's strongest proponents. And
whether the hypothesis itself holds; and what is lost where only the last blocks are tuned.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.producer_choices import Retain
from pipeline.truths import BASE_LOSS
from tests.bench import faithful_blocks
from tests.bench.faithful_digits import Digits
from tests.bench.faithful_images import TRAININGS, Handwritten
from tests.bench.faithful_labels import EPOCHS, RECIPE, labels, recipe
from tests.bench.faithful_mirror import mirrors
from tests.bench.faithful_tabular import Tabular
from tests.bench.faithful_text import Questions, Text
from tests.bench.faithful_world import Asked, Other, Sections, Timed, World, judge, peers, run
from tests.bench.table import FOLDER, Row, at_least, figure, machine, publish

PAPER = {"producer": {"preset": "paper"}, "rank": {"transform": "absolute"}}
FACTORED = {
    f"natural, {name}": {"producer": {"name": "natural", "curvature": name}} for name in ("ekfac", "gfim", "diagonal")
}
DRIFTING = {"producer": {"name": "tests.bench.drifting:Drifting", "options": Retain().keywords}}
DIGITS: dict[str, Sections] = {
    "preset: paper": PAPER,
    "ascent": {"producer": {"name": "unlearn"}},
    "retain": {"producer": {"name": "retain"}},
    "retain, temperature 1": {"producer": {"name": "retain"}, "task": {"temperature": 1}},
    "retain by the training loss": DRIFTING,
    "descent": {"producer": {"name": "finetune"}},
    "natural, temperature 1": {"producer": {"name": "natural"}, "task": {"temperature": 1}},
    "natural (default)": {},
    **FACTORED,
}
"""Method -> sections of its spec, for single digits."""
CLASSES = {name: DIGITS[name] for name in ("ascent", "natural, temperature 1", "natural (default)", "natural, ekfac")}
"""The same for other classifiers."""
FIVE = "natural, five models"
CHECKPOINTS = "natural, four checkpoints"
TEXT: dict[str, Sections] = {
    "preset: paper": PAPER,
    "ascent": {"producer": {"name": "unlearn"}},
    "natural (default)": {},
    "descent": {"producer": {"name": "finetune"}},
    "natural, 128 rows": {"producer": {"name": "natural", "sample_rows": 128}},
    "natural, ekfac, 128 rows": {"producer": {"name": "natural", "curvature": "ekfac", "sample_rows": 128}},
    "natural, ekfac, damping 1e-4": {"producer": {"name": "natural", "curvature": "ekfac", "damping": 1e-4}},
}
"""Method -> sections of its spec, for single texts. Choosing a damping on all 500 rows takes a quarter of an hour of a core."""
GROUP: dict[str, Sections] = {
    **DIGITS,
    "preset: paper": {"producer": {"preset": "paper"}, "rank": {}},
    RECIPE: recipe(),
}
"""Method -> sections of its spec, for a query of many clean digits."""
EKFAC = ("kronfluence-ekfac", "kronfluence-ekfac-heuristic")
TEMPERED = ("kronfluence-identity", *EKFAC, "dattri-ekfac-mended")
"""Peers that are asked at our temperature as well."""
LEAD = 0.03
"""Of LDS that the default should have over kronfluence, on texts and on classifiers other than digits."""
COLUMNS = {
    "lds": "LDS", "se": "s.e.", "leave_out": "rise without top 50", "tail_patch": "fall by a step", "top1": "copy first",
    "top5": "among five", "mrr": "facts, MRR", **{f"auc_{epochs}": f"wrong labels, AUC, {epochs} epochs" for epochs in EPOCHS},
    "s_per_query": "s per query", "us_per_pair": "us per query and example",
}  # fmt: skip
DIGITS_SHOWN = {"top1": 2, "top5": 2, "mrr": 2, "tail_patch": 4, "us_per_pair": 2}

Rows = dict[str, dict[str, Any]]


def singles(world: World, methods: Mapping[str, Sections]) -> Rows:
    """Method -> its row: what single queries tell, ours and theirs."""
    timed, others = _everybody(world, methods, "queries")
    lds = judge(world, "lds", timed, others, training=world.training, lds=world.lds)
    rows: Rows = {}
    for name, found in lds.items():
        tune_s, score_s = (
            (timed[name].tune_s, timed[name].score_s) if name in timed else (others[name].fit_s, others[name].score_s)
        )
        rows[name] = {
            "lds": found["lds"], "se": found["standard_error"], "ceiling": found["ceiling"],
            "s_per_query": tune_s / world.queries, "us_per_pair": 1e6 * score_s / (world.rows * world.queries),
        }  # fmt: skip
    for section, asked in world.trials.items():
        contrasts = judge(world, "lds", timed, others, training=world.training, **{section: asked})
        for name in rows:
            rows[name][section] = _of(contrasts, name)["difference"]
    for name, found in _truth(world, "copies", *_everybody(world, methods, "copies")).items():
        rows[name] |= {key: value for key, value in found.items() if key.startswith("top")}
    if (world.folder / "queries-truth.parquet").exists():
        for name, found in _truth(world, "queries", timed, others).items():
            rows[name] |= {key: value for key, value in found.items() if key.startswith(("mrr", "recall"))}
    return rows


def _everybody(
    world: World, methods: Mapping[str, Sections], queries: str
) -> tuple[dict[str, Timed], dict[str, Other]]:
    """Runs of ours and scores of theirs, for a file of queries."""
    asked = Asked(queries)
    timed = {name: run(world, name, sections, asked) for name, sections in methods.items()}
    others = peers(world, world.folder / f"peers-{queries}", asked)
    if isinstance(world, Digits):
        tempered = peers(world, world.folder / f"peers-{queries}-temperature-2", asked, TEMPERED, temperature=2.0)
        others |= {f"{name}, temperature 2": found for name, found in tempered.items()}
    return timed, others


def _truth(world: World, queries: str, timed: Mapping[str, Timed], others: Mapping[str, Other]) -> Rows:
    truth = {"uri": str(world.folder / f"{queries}-truth.parquet")}
    return judge(world, f"{queries}-truth", timed, others, truth=truth)


def groups(world: Digits) -> Rows:
    """Method -> AUC of wrong labels found, by epochs of training; the base loss alone among them."""
    found: Rows = {}
    for epochs in EPOCHS:
        asked = world.flip(epochs)
        timed = {name: run(world, name, sections, asked) for name, sections in GROUP.items()}
        truth = {"uri": str(world.folder / "flipped-ids.parquet")}
        judged = judge(world, asked.model, timed, {}, mislabelled=truth)
        auc = {name: float(_of(judged, name)["auc"]) for name in GROUP}
        auc["base loss alone"] = next(float(row["auc"]) for name, row in judged.items() if _is_at_temperature_1(name))
        for name, value in auc.items():
            found.setdefault(name, {})[f"auc_{epochs}"] = value
    return found


def _of(judged: Rows, name: str) -> Mapping[str, Any]:
    """A method's row, which says how values were made of scores if they were."""
    return next(row for label, row in judged.items() if label == name or label.startswith(f"{name} ("))


def _is_at_temperature_1(method: str) -> bool:
    """Whether a row is that of the base losses which `preset: paper` has."""
    return method.startswith(BASE_LOSS) and "preset: paper" in method


def show(title: str, rows: Rows) -> None:
    """The table of a setup."""
    table = Table(title=f"{title}: {machine()}", title_justify="left")
    table.add_column("method", no_wrap=True)
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    for name in columns:
        table.add_column(COLUMNS[name], justify="right")
    for method, row in rows.items():
        shown = (f"{row[name]:.{DIGITS_SHOWN.get(name, 3)}f}" if name in row else "" for name in columns)
        table.add_row(method, *shown)
    Console(width=200).print(table)


def bars(world: World, rows: Rows) -> list[Row]:
    """What should be reached, that the table tells."""
    times = f"{world.lds['subsets']} x {world.lds['retrainings']} retrainings"
    conditions = f"{world.kind}, {world.rows} rows, {world.queries} queries, {times}, {machine()}"
    best = max((rows[name]["lds"] for name in EKFAC if name in rows), default=float("nan"))
    ours, kind = rows["natural (default)"], world.kind
    return [
        figure(f"{kind}: LDS of the default over four checkpoints", rows[CHECKPOINTS]["lds"], conditions),
        at_least(f"{kind}: LDS of the default", ours["lds"], 0.48, conditions),
        at_least(f"{kind}: LDS of the default over five models", rows[FIVE]["lds"], 0.53, conditions),
        at_least(f"{kind}: LDS of the default, less kronfluence EK-FAC's better", ours["lds"] - best, 0.05, conditions),
        at_least(f"{kind}: copies ranked first", ours["top1"], 0.75, conditions),
        at_least(f"{kind}: copies among five", ours["top5"], 0.95, conditions),
        *(
            at_least(f"{kind}: AUC of wrong labels, {epochs} epochs", rows[RECIPE][f"auc_{epochs}"], 0.98, conditions)
            for epochs in EPOCHS
        ),
    ]


def _done(world: World, rows: Rows, found: Sequence[Row]) -> None:
    show(world.kind, rows)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"faithful-{world.kind}.json").write_text(json.dumps(rows, indent=1) + "\n")
    publish("faithful", list(found))


def digits(kind: str) -> None:
    """The table of digits."""
    world = Digits(kind)
    means = {FIVE: {"ensemble": world.others()}, CHECKPOINTS: {"ensemble": world.checkpoints()}}
    rows = singles(world, {**DIGITS, **means})
    for name, found in groups(world).items():
        rows.setdefault(name, {}).update(found)
    _done(world, rows, bars(world, rows))


def others(world: World, methods: Mapping[str, Sections], lead: float) -> None:
    """The table of texts, or of another classifier: how far the default should be ahead of kronfluence."""
    rows = singles(world, methods)
    theirs, ours = max(rows[name]["lds"] for name in EKFAC), rows["natural (default)"]["lds"]
    conditions = f"{world.rows} rows, {world.queries} queries, {machine()}"
    found = [
        figure(f"{world.kind}: LDS of the default", ours, conditions),
        at_least(
            f"{world.kind}: LDS of the default, less kronfluence EK-FAC's better", ours - theirs, lead, conditions
        ),
    ]
    if CHECKPOINTS in rows:
        over = rows[CHECKPOINTS]["lds"]
        found.append(figure(f"{world.kind}: LDS of the default over four checkpoints", over, conditions))
    _done(world, rows, found)


def texts(world: Text) -> None:
    """The table of a small language model."""
    others(world, {**TEXT, CHECKPOINTS: {"ensemble": world.checkpoints()}}, LEAD)


def mirror() -> None:
    """The hypothesis itself."""
    publish("faithful", mirrors())


def blocks() -> None:
    """What tuning only the last blocks costs."""
    for kind in faithful_blocks.SETUPS:
        publish("faithful", faithful_blocks.costs(kind))


SETUPS = {
    "mlp": lambda: digits("mlp"),
    "cnn": lambda: digits("cnn"),
    "cancer": lambda: others(Tabular("cancer"), CLASSES, LEAD),
    "made": lambda: others(Tabular("made"), CLASSES, LEAD),
    "text": lambda: texts(Text()),
    "mirror": mirror,
    "blocks": blocks,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SETUPS, help="one of the setups")
    parser.add_argument(
        "--images", type=Path, help="also handwritten digits: `images` [N, 28, 28] and `labels`, as of MNIST"
    )
    parser.add_argument(
        "--labels", action="store_true", help="only wrong labels, three trainings each; with --images on those, too"
    )
    parser.add_argument("--questions", type=Path, help="also questions: JSON lines with a text, as of TREC")
    given = parser.parse_args()
    if given.labels:
        labels(given.images)
        return
    for name in SETUPS if given.only is None else (given.only,):
        SETUPS[name]()
    for kind in TRAININGS if given.images else ():
        others(Handwritten(given.images, kind), CLASSES, LEAD)
    if given.questions:
        texts(Questions(given.questions))


if __name__ == "__main__":
    main()
