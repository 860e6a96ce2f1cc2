"""`make bench-faithful`'s look at the hypothesis itself: P1 against P2 by retraining, on digits, as in Ko et al.'s notebooks."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipeline.case import Judgement
from tests.bench.faithful_world import FOLDER
from tests.bench.table import Row, at_least, machine
from tests.truth import mirror

COLUMNS = ("pearson", "pearson_low", "pearson_high", "spearman", "spearman_low", "spearman_high")


def mirrors() -> list[Row]:
    """Show both worlds' tables; what should be reached in them."""
    convex = _shown("logistic regression", mirror.convex(FOLDER / "mirror-convex", groups=mirror.CONVEX_ROWS))
    groups = _shown("CNN, groups", mirror.by_wrong_labels(FOLDER / "mirror-groups", groups=30, retrainings=5))
    return [
        at_least("mirror, logistic regression: Pearson of P1 and P2", convex["pearson"], 0.99, machine()),
        at_least("mirror, logistic regression: Spearman of P1 and P2", convex["spearman"], 0.98, machine()),
        at_least("mirror, groups of a CNN: Pearson of P1 and P2", groups["pearson"], 0.95, machine()),
    ]


def _shown(name: str, judgement: Judgement) -> dict[str, float]:
    table = Table(title=f"{name}: {judgement.title}", title_justify="left")
    for column in ("method", *COLUMNS):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in judgement.rows:
        table.add_row(str(row["method"]), *(f"{row[column]:.3f}" for column in COLUMNS))
    Console(width=150).print(table)
    mirrored = next(row for row in judgement.rows if row["method"] == "trained with the query (P2)")
    return {column: float(mirrored[column] or 0) for column in COLUMNS}
