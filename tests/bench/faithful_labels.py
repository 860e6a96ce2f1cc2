"""A tenth of 1,000 labels wrong: found by the recipe of jobs/specs/mislabelled.yaml, and by the base loss alone.

`python -m tests.bench.faithful --labels [--images FILE]`; needs no peers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from pipeline.truths import BASE_LOSS
from tests.bench.faithful_digits import CLEAN, Digits
from tests.bench.faithful_images import TRAININGS, Handwritten
from tests.bench.faithful_world import Asked, Sections, World, judge, run, with_wrong_labels
from tests.bench.table import Row, at_least, figure, machine, publish

RECIPE = "finetune (mislabelled.yaml)"
SEEDS = range(3)
EPOCHS = (30, 100)
"""Trainings, and how long those on digits are."""
LEAST, LEAD = 0.98, 0.01
"""AUC on digits; and lead over the base loss, whose own AUC leaves room for one where it is not over `LEAST`."""


def recipe() -> Sections:
    """Sections of the spec as it is delivered."""
    tree = yaml.safe_load(Path("jobs/specs/mislabelled.yaml").read_text())
    return {
        "producer": tree["producer"],
        "task": {"temperature": tree["task"]["temperature"]},
        "rank": {"transform": tree["rank"]["transform"]},
    }


@dataclass(frozen=True)
class Found:
    """What one training told.

    Args:
        recipe: AUC of wrong labels by the recipe.
        base_loss: By what needs no counterpart: the base loss at the recipe's temperature or at 1, whichever finds more.
    """

    recipe: float
    base_loss: float

    @property
    def lead(self) -> float:
        """Of the recipe."""
        return self.recipe - self.base_loss


class Flipped(Handwritten):
    """Handwritten digits, a tenth of their labels wrong; 400 clean ones are a query as well. See Handwritten."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path, kind, f"{kind}-flipped")
        for seed in SEEDS:
            self.weights(f"model-{seed}", seed)

    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """See Classes."""
        number_NF, label_N = super().examples()
        return number_NF, np.concatenate([with_wrong_labels(label_N[: self.rows])[0], label_N[self.rows :]])

    def _write(self) -> None:
        number_NF, label_N = self.examples()
        clean = slice(self.rows, self.rows + CLEAN)
        self._table("clean", number_NF[clean], label_N[clean], query_id=["clean"] * CLEAN)
        _, wrong = with_wrong_labels(label_N[: self.rows])  # which rows does not depend on the labels
        pq.write_table(pa.table({"example_id": [str(i) for i in wrong]}), self.folder / "flipped-ids.parquet")
        super()._write()


def found(world: World, asked: Asked) -> Found:
    """AUCs of one training."""
    methods = {RECIPE: recipe(), "temperature 1": {"producer": {"name": "finetune", "steps": 1}}}
    timed = {name: run(world, name, sections, asked) for name, sections in methods.items()}
    rows = judge(
        world, f"labels-{asked.model}", timed, {}, mislabelled={"uri": str(world.folder / "flipped-ids.parquet")}
    )
    auc = {name: float(row["auc"]) for name, row in rows.items()}
    return Found(
        next(value for name, value in auc.items() if name.startswith(RECIPE)),
        max(value for name, value in auc.items() if name.startswith(BASE_LOSS)),
    )


def labels(images: Path | None) -> None:
    """The table of wrong labels, and bars; those of 28 x 28 only where there is a file of them."""
    told: dict[str, list[Found]] = {}
    for world in (Digits("mlp"), Digits("cnn")):
        for epochs in EPOCHS:
            asked = [world.flip(epochs, seed) for seed in SEEDS]
            told[f"{world.kind}, {epochs} epochs"] = [found(world, each) for each in asked]
    for kind in TRAININGS if images else ():
        flipped = Flipped(cast(Path, images), kind)
        told[f"28 x 28, {kind}"] = [found(flipped, Asked("clean", f"model-{seed}")) for seed in SEEDS]
    _show(told)
    publish("faithful", [row for name, each in told.items() for row in _bars(name, each)])


def _show(told: Mapping[str, Sequence[Found]]) -> None:
    table = Table(title=f"wrong labels, AUC of {len(SEEDS)} trainings: {machine()}", title_justify="left")
    for column in ("trained", "recipe", "base loss", "lead"):
        table.add_column(column, no_wrap=True)
    for name, each in told.items():
        columns = ([getattr(one, field) for one in each] for field in ("recipe", "base_loss", "lead"))
        table.add_row(name, *("  ".join(f"{value:.3f}" for value in values) for values in columns))
    Console(width=150).print(table)


def _bars(name: str, trained: Sequence[Found]) -> list[Row]:
    """The least of the trainings: its AUC, and its lead over the base loss where that leaves room."""
    conditions = f"{len(SEEDS)} trainings, {machine()}"
    measure, least = f"{name}: AUC of wrong labels, least training", min(one.recipe for one in trained)
    asked = at_least(measure, least, LEAST, conditions) if "epochs" in name else figure(measure, least, conditions)
    measure, roomy = f"{name}: lead over the base loss", [one.lead for one in trained if one.base_loss <= LEAST]
    if not roomy:
        return [asked, figure(measure, min(one.lead for one in trained), conditions)]
    return [asked, at_least(f"{measure}, {len(roomy)} trainings with room", min(roomy), LEAD, conditions)]
