"""Two worlds in which the mirrored influence hypothesis is looked at by retraining: Ko et al.'s notebooks, on digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from jobs.digits import cnn, load_digits
from pipeline.case import Judgement
from pipeline.judge import Judge
from pipeline.run import freeze
from pipeline.specfile import parse_spec, parse_tree
from pipeline.verdict import judged
from tests.small import one_thread, work_off

WEIGHT_DECAY = 0.01
CONVEX_ROWS, CONVEX_QUERIES = 400, 10
ROWS, WRONG, CLEAN = 1050, 315, 500


def logistic() -> nn.Module:
    """Logistic regression: [B, 1, 8, 8] -> logits [B, 10]."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def convex(folder: Path, groups: int) -> Judgement:
    """Logistic regression on 400 digits, some left out one by one, against the 10 test images of highest loss."""
    pixels, labels = load_digits()
    seen, asked = slice(CONVEX_ROWS), slice(1000, None)
    fitted = LogisticRegression(C=1 / (CONVEX_ROWS * WEIGHT_DECAY)).fit(pixels[seen], labels[seen])
    certainty = fitted.predict_log_proba(pixels[asked])[np.arange(len(labels[asked])), labels[asked]]
    rows = 1000 + np.argsort(certainty)[:CONVEX_QUERIES]
    sections = {
        "training": {"optimizer": "lbfgs", "weight_decay": WEIGHT_DECAY},
        "mirror": {"groups": groups},
    }
    return _mirror(folder, logistic, labels[seen], rows, rows.astype(str).tolist(), sections)


def by_wrong_labels(folder: Path, groups: int, retrainings: int) -> Judgement:
    """The demo's CNN on 1,050 digits, 30 % with wrong labels; groups of 315, from none wrong to all, against 500 clean ones."""
    _, labels = load_digits()
    wrong = np.random.default_rng(0).permutation(ROWS)[:WRONG]
    label = labels[:ROWS].copy()
    label[wrong] = (label[wrong] + 1 + np.arange(WRONG) % 9) % 10
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"example_id": wrong.astype(str)}), folder / "wrong.parquet")
    sections = {
        "training": {"lr": 0.05, "weight_decay": 1e-3, "epochs": 10},
        "mirror": {"groups": groups, "rows": WRONG, "by_wrong_labels": True, "retrainings": retrainings},
        "mislabelled": {"uri": str(folder / "wrong.parquet")},
    }
    return _mirror(folder, cnn, label, np.arange(ROWS, ROWS + CLEAN), ["clean"] * CLEAN, sections)


def _mirror(
    folder: Path,
    factory: Callable[[], nn.Module],
    label_N: np.ndarray,
    row_M: np.ndarray,
    query_ids: Sequence[str],
    sections: dict[str, Any],
) -> Judgement:
    """The mirror over the first digits with these labels, and rows as queries; the run's own model need not be trained."""
    pixels, labels = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    examples = {"id": np.arange(len(label_N)).astype(str), "pixels": list(pixels[: len(label_N)]), "label": label_N}
    asked = {"query_id": query_ids, "pixels": list(pixels[row_M]), "label": labels[row_M]}
    for name, columns in (("train", examples), ("queries", asked)):
        if not (folder / f"{name}.parquet").exists():  # a file that is written again is another one to the run over it
            pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    if not (folder / "model.safetensors").exists():
        safetensors.torch.save_file(factory().state_dict(), folder / "model.safetensors")
    tree = {
        "run": {"uri": str(folder / "run")},
        "model": {
            "factory": f"{factory.__module__}:{factory.__name__}",
            "weights_uri": str(folder / "model.safetensors"),
        },
        "task": {"features": "pixels", "label": "label", "shape": [1, 8, 8]},
        "corpus": {"uri": str(folder / "train.parquet"), "example_id": "id"},
        "queries": {"uri": str(folder / "queries.parquet")},
        "producer": {"name": "finetune"},
    }
    with one_thread():
        run = work_off(freeze(parse_spec(tree)))
    asks = {"judge": {"uri": str(folder / "judged")}, "runs": {"descent": run.uri()}, **sections}
    return judged(parse_tree(Judge, asks))[0]
