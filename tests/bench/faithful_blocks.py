"""What tuning only the last blocks costs in truth: ours on the digits and sentences of `make bench-faithful`, wholly and in part.

`python -m tests.bench.faithful --only blocks`; needs no peers.

Shapes: Q queries, S subsets, R retrainings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline import judgements
from pipeline.artifacts import Run
from pipeline.case import open_case
from pipeline.judge import Judge, LdsSection
from pipeline.judgements import LDS
from pipeline.lessons import Subset
from pipeline.retrain import Retrainings, fingerprint, retrain
from pipeline.specfile import parse_tree
from tests.bench.faithful_digits import Digits
from tests.bench.faithful_text import Text
from tests.bench.faithful_world import Asked, Sections, World, judge, run
from tests.bench.table import Row, figure, machine

PRODUCERS: Mapping[str, Sections] = {
    "natural": {"name": "natural"},
    "natural, ekfac": {"name": "natural", "curvature": "ekfac"},
    "ascent": {"name": "unlearn"},
}
"""Method -> its producer, for digits."""
TEXT_PRODUCERS: Mapping[str, Sections] = {
    "natural, ekfac, damping 1e-4": {"name": "natural", "curvature": "ekfac", "damping": 1e-4},
    "ascent": {"name": "unlearn"},
}
"""The same for texts."""
SETUPS: Mapping[str, tuple[Mapping[str, Sections], int]] = {
    "mlp": (PRODUCERS, 3), "cnn": (PRODUCERS, 4), "text": (TEXT_PRODUCERS, 2),
}  # fmt: skip
"""World -> methods, and how many blocks its model has."""


@dataclass(frozen=True)
class Part:
    """A method that tunes the last blocks.

    Args:
        method: Which.
        blocks: How many; 0 for all parameters.
    """

    method: str
    blocks: int

    @property
    def name(self) -> str:
        """Of its runs."""
        return f"{self.method}, last {self.blocks}" if self.blocks else self.method

    def tuned(self, blocks: int) -> str:
        """Of so many, for people."""
        return f"{self.blocks} of {blocks}" if self.blocks else "all"


def costs(kind: str) -> list[Row]:
    """Show a world's table; its figures."""
    world: World = Text() if kind == "text" else Digits(kind)
    producers, blocks = SETUPS[kind]
    sections = {
        Part(method, last): {"producer": {**producer, "last_blocks": last}}
        for method, producer in producers.items()
        for last in (0, *range(blocks - 1, 0, -1))
    }
    timed = {
        queries: {part.name: run(world, part.name, each, Asked(queries)) for part, each in sections.items()}
        for queries in ("queries", "copies")
    }
    lds = _lds(world, {name: each.run for name, each in timed["queries"].items()})
    truth = {"uri": str(world.folder / "copies-truth.parquet")}
    copies = judge(world, "copies-truth", timed["copies"], {}, truth=truth)
    first = {part: next(float(copies[label]["top1"]) for label in copies if _is(label, part)) for part in sections}
    _show(world, blocks, lds, first)
    times = f"{world.lds['subsets']} x {world.lds['retrainings']} retrainings"
    conditions = f"{kind}, {world.rows} rows, {world.queries} queries, {times}, {machine()}"
    return [
        figure(f"{kind}: LDS, {part.method}, {part.tuned(blocks)} blocks tuned", lds[part.name].mean.value, conditions)
        for part in sections
    ]


def _is(label: str, part: Part) -> bool:
    """Whether a judgement's row is of a part; it may say how scores were ranked."""
    return label == part.name or label.startswith(f"{part.name} (")


def _lds(world: World, runs: Mapping[str, Run]) -> dict[str, LDS]:
    """Run's name -> LDS with the correlation of every query, over the retrainings that the world's other judgements have."""
    uri = str((world.folder / "judged" / "lds").absolute())
    uris = {name: each.uri() for name, each in runs.items()}
    tree = {"judge": {"uri": uri}, "runs": uris, "training": world.training, "lds": world.lds}
    asked = parse_tree(Judge, tree)
    case = open_case(asked, runs)
    retrainings = Retrainings(asked, case.run, fingerprint(asked, case.run, case.examples))
    section = LdsSection.model_validate(world.lds)
    parts_SR = [[Subset(section.share, s, r) for r in range(section.retrainings)] for s in range(section.subsets)]
    lessons = [lesson for some in parts_SR for lesson in some]
    retrain(retrainings, lessons)
    loss_SRQ = retrainings.query_losses(lessons).reshape(section.subsets, section.retrainings, -1)
    inside_SN = np.stack([some[0].inside_N(asked.seed, len(case.id_N)) for some in parts_SR])
    return {each.name: judgements.linear_datamodelling(each.score_QN, inside_SN, loss_SRQ) for each in case.methods}


def _show(world: World, blocks: int, lds: Mapping[str, LDS], first: Mapping[Part, float]) -> None:
    """The table; differences are paired over queries, retrainings taken as given."""
    ceiling = next(iter(lds.values())).ceiling
    perfect = "" if ceiling is None else f"; perfect scores would get {ceiling:.2f}"
    table = Table(title=f"{world.kind}: {machine()}{perfect}", title_justify="left")
    for name in ("method", "blocks tuned", "LDS", "s.e.", "less that of all", "s.e.", "copy first"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for part, copies in first.items():
        whole_Q, here_Q = lds[part.method].correlation_Q, lds[part.name].correlation_Q
        less_Q = here_Q - whole_Q
        shown = (here_Q.mean(), _error(here_Q), less_Q.mean(), _error(less_Q))
        table.add_row(part.method, part.tuned(blocks), *(f"{each:.3f}" for each in shown), f"{copies:.2f}")
    Console(width=150).print(table)


def _error(value_Q: np.ndarray) -> float:
    """Standard error of a mean over queries."""
    return float(value_Q.std(ddof=1)) / math.sqrt(len(value_Q))
