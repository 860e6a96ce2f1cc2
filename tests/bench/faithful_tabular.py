"""Rows of numbers and an MLP trained on them, as files: tumours that were measured, and five classes that were made up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import sklearn.datasets

from tests.bench.faithful_classes import Classes
from tests.bench.faithful_world import Sections


@dataclass(frozen=True)
class Recipe:
    """A kind of table.

    Args:
        shape: Numbers of a row.
        rows: Training examples.
        training: How the model is trained.
    """

    shape: tuple[int]
    rows: int
    training: Sections


RECIPES: Mapping[str, Recipe] = {
    "cancer": Recipe((30,), 400, {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-3, "epochs": 20, "batch_rows": 32}),
    "made": Recipe((20,), 1000, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "epochs": 20, "batch_rows": 64}),
}


class Tabular(Classes):
    """See Classes.

    Args:
        kind: `cancer`: scikit-learn's breast cancer data; `made`: clusters in 20 dimensions, a tenth of the labels drawn anew.
    """

    def __init__(self, kind: str) -> None:
        recipe = RECIPES[kind]
        super().__init__(kind, f"tests.bench.tabular_model:{kind}", recipe.shape, recipe.rows, recipe.training)

    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """See Classes. Standardised as the training examples are."""
        number_NF, label_N = _measured() if self.kind == "cancer" else _made()
        known_NF = number_NF[: self.rows]
        number_NF = (number_NF - known_NF.mean(axis=0)) / known_NF.std(axis=0)
        return number_NF.astype(np.float32), label_N.astype(np.int64)


def _measured() -> tuple[np.ndarray, np.ndarray]:
    """Shuffled: the file begins with malignant ones."""
    data = sklearn.datasets.load_breast_cancer()
    order_N = np.random.default_rng(0).permutation(len(data.target))
    return data.data[order_N], data.target[order_N]


def _made() -> tuple[np.ndarray, np.ndarray]:
    number_NF, label_N = sklearn.datasets.make_classification(
        1500, 20, n_informative=6, n_redundant=4, n_classes=5, flip_y=0.1, class_sep=1.5, random_state=0
    )
    return number_NF, label_N
