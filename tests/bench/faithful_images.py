"""1,000 handwritten digits of 28 x 28 and a CNN trained on them, stopped early or until nothing is left to learn, as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.bench.faithful_classes import Classes
from tests.bench.faithful_world import Sections

TRAININGS: Mapping[str, Sections] = {
    "early": {"lr": 0.01, "momentum": 0.9, "batch_rows": 32, "weight_decay": 0.0, "epochs": 5},
    "gentle": {"lr": 0.003, "momentum": 0.9, "batch_rows": 64, "weight_decay": 0.0, "epochs": 20},
    "converged": {"lr": 0.01, "momentum": 0.9, "batch_rows": 32, "weight_decay": 3e-3, "epochs": 40},
}
"""Kind -> how it is trained. `early` depends on chance more than on which half is trained on: losses of two trainings on the same
halves correlate by .1. `gentle` is stopped as early, but begins with the same weights each time and takes short steps: by .6."""


class Handwritten(Classes):
    """See Classes.

    Args:
        path: File of `images` uint8 [N, 28, 28] and `labels` [N].
        kind: `early`, `gentle` or `converged`.
        name: Of the world; the kind if empty.
    """

    def __init__(self, path: Path, kind: str, name: str = "") -> None:
        self._path = path
        factory = f"tests.bench.image_model:{'begun' if kind == 'gentle' else 'cnn'}"
        super().__init__(name or kind, factory, [1, 28, 28], 1000, TRAININGS[kind])

    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """See Classes."""
        with np.load(self._path) as file:
            pixels_NF = file["images"].reshape(-1, 28 * 28) / np.float32(255)
            return pixels_NF, file["labels"].astype(np.int64)
