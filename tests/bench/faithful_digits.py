"""1,000 digits and an MLP or a CNN trained on them, as files; and the same with a tenth of the labels wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch

from jobs.digits import load_digits
from tests.bench.faithful_world import FOLDER, Asked, with_wrong_labels
from tests.truth.setup import fit

ROWS, QUERIES, COPIES, CLEAN = 1000, 60, 100, 400
MODELS = 5
EPOCHS = 30
CHECKPOINTS = (8, 15, 23)
"""Epochs after which checkpoints are kept: about a quarter, a half and three quarters."""


class Digits:
    """See World. 100 training images are queries as well, to find themselves; and 400 clean ones as one query.

    Args:
        kind: `mlp` or `cnn`.
    """

    rows, queries = ROWS, QUERIES
    training = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "epochs": EPOCHS, "batch_rows": 64}
    lds = {"subsets": 100, "retrainings": 5}
    trials = {"leave_out": {"k": 50, "draws": 10, "retrainings": 1}, "tail_patch": {"k": 10}}
    ranked = {"copies": {"transform": "relative"}, "clean": {"transform": "relative"}}

    def __init__(self, kind: str) -> None:
        self.kind, self.folder = kind, FOLDER / kind
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
        for seed in range(MODELS):
            self._weights(f"model-{seed}" if seed else "model", EPOCHS, None, seed)
        self._pixels, self._labels = pixels, labels

    def _write(self, name: str, labels: np.ndarray, pixels: np.ndarray, **ids: list[str]) -> None:
        path = self.folder / f"{name}.parquet"
        if not path.exists():  # a file that is written again is another one to the runs over it
            pq.write_table(pa.table({**ids, "pixels": list(pixels), "label": labels}), path)

    def _weights(self, name: str, epochs: int, labels: np.ndarray | None, seed: int = 0) -> None:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            model = fit(self.kind, epochs=epochs, weight_decay=1e-3, labels=labels, seed=seed).model
            weights = {name: each.contiguous() for name, each in model.state_dict().items()}
            safetensors.torch.save_file(weights, path)

    def others(self) -> list[str]:
        """Weights of further trainings, from other seeds."""
        return [str(self.folder / f"model-{seed}.safetensors") for seed in range(1, MODELS)]

    def checkpoints(self) -> list[str]:
        """A glob of checkpoints after a quarter, a half and three quarters of the training; they are made if missing."""
        for epochs in CHECKPOINTS:
            self._weights(f"epoch-{epochs}", epochs, None)
        return [str(self.folder / "epoch-*.safetensors")]

    def flip(self, epochs: int, seed: int = 0) -> Asked:
        """Give a tenth of the corpus wrong labels, and train on them; what is then asked."""
        wrong, flipped = with_wrong_labels(self._labels[:ROWS])
        model = f"flipped-{epochs}-{seed}" if seed else f"flipped-{epochs}"
        self._write("flipped", wrong, self._pixels[:ROWS], id=[str(i) for i in range(ROWS)])
        self._weights(model, epochs, wrong, seed)
        pq.write_table(pa.table({"example_id": [str(i) for i in flipped]}), self.folder / "flipped-ids.parquet")
        return Asked("clean", model, "flipped")

    def sections(self, asked: Asked) -> dict[str, Any]:
        """See World."""
        return {
            "model": {
                "factory": f"jobs.digits:{self.kind}",
                "weights_uri": str(self.folder / f"{asked.model}.safetensors"),
            },
            "corpus": {"uri": str(self.folder / f"{asked.corpus}.parquet"), "example_id": "id"},
            "queries": {"uri": str(self.folder / f"{asked.queries}.parquet")},
            "task": {"features": "pixels", "label": "label", "shape": [1, 8, 8]},
        }

    def for_peers(self, folder: Path, asked: Asked) -> None:
        """See World."""
        for name, file in (("train", asked.corpus), ("queries", asked.queries)):
            table = pq.read_table(self.folder / f"{file}.parquet")
            pixels = np.array(table["pixels"].to_pylist(), np.float32).reshape(-1, 1, 8, 8)
            np.savez(folder / f"{name}.npz", features=pixels, label=table["label"].to_numpy())
        weights = safetensors.torch.load_file(self.folder / f"{asked.model}.safetensors")
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        setup = {"factory": f"jobs.digits:{self.kind}", "kind": "classification"}
        (folder / "setup.json").write_text(json.dumps(setup))
