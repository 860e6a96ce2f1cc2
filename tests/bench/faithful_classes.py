"""A classifier, trained just as the judge trains it on halves, and its examples and queries, as files.

Shapes: N rows there are, F numbers of each.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
from torch import nn

from pipeline.freeze import freeze
from pipeline.judge import Training
from pipeline.lessons import Whole
from pipeline.retraining import Retrainer
from pipeline.specfile import parse_spec
from tests.bench.faithful_world import FOLDER, Asked, Sections

QUERIES, COPIES = 60, 100


class Classes(ABC):
    """See World. 100 training examples are queries as well, to find themselves.

    Args:
        kind: Its name.
        factory: `package.module:function` that makes the model.
        shape: Of an example's numbers as the model takes them.
        rows: Training examples: the first of the rows there are. Queries are among the others.
        training: How the model is trained.
    """

    queries = QUERIES
    lds: Mapping[str, int] = {"subsets": 60, "retrainings": 3}
    trials: Mapping[str, Sections] = {"tail_patch": {"k": 10}}
    ranked: Mapping[str, Sections] = {"copies": {"transform": "relative"}}

    def __init__(self, kind: str, factory: str, shape: Sequence[int], rows: int, training: Sections) -> None:
        self.kind, self.folder, self.rows, self.training = kind, FOLDER / kind, rows, training
        self._factory, self._shape = factory, list(shape)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "model.safetensors").exists():  # the last of its files
            self._write()

    @abstractmethod
    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers [N, F] as float32 and labels [N] as int64 of all rows there are."""

    def _write(self) -> None:
        number_NF, label_N = self.examples()
        chance = np.random.default_rng(0)
        asked = self.rows + chance.permutation(len(label_N) - self.rows)[:QUERIES]
        copied = chance.permutation(self.rows)[:COPIES]
        self._table("train", number_NF[: self.rows], label_N[: self.rows], id=[str(i) for i in range(self.rows)])
        self._table("queries", number_NF[asked], label_N[asked], query_id=[str(i) for i in range(QUERIES)])
        self._table("copies", number_NF[copied], label_N[copied], query_id=[f"copy-{i}" for i in copied])
        pairs = {"query_id": [f"copy-{i}" for i in copied], "example_id": [str(i) for i in copied]}
        pq.write_table(pa.table(pairs), self.folder / "copies-truth.parquet")
        self.weights("model", 0)

    def _table(self, name: str, number_NF: np.ndarray, label_N: np.ndarray, **ids: list[str]) -> None:
        columns = {**ids, "numbers": list(number_NF), "label": label_N}
        pq.write_table(pa.table(columns), self.folder / f"{name}.parquet")

    def weights(self, name: str, again: int) -> None:
        """A file of weights of one of several trainings, by number; it is made if missing."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            safetensors.torch.save_file(self._trained(again).state_dict(), path)

    def _trained(self, again: int) -> nn.Module:
        """The model, trained on all examples as the judge trains on some."""
        model = {"factory": self._factory}
        tree = {**self.sections(Asked("queries")), "model": model}
        run = freeze(parse_spec({"run": {"uri": str(self.folder / "runs" / "before")}, **tree}))
        training = Training.model_validate({**self.training, "start": model})
        return Retrainer(run, training, "cpu").learned(Whole(None, again), seed=0)

    def sections(self, asked: Asked) -> dict[str, Any]:
        """See World."""
        return {
            "model": {"factory": self._factory, "weights_uri": str(self.folder / f"{asked.model}.safetensors")},
            "corpus": {"uri": str(self.folder / f"{asked.corpus}.parquet"), "example_id": "id"},
            "queries": {"uri": str(self.folder / f"{asked.queries}.parquet")},
            "task": {"features": "numbers", "label": "label", "shape": self._shape},
        }

    def for_peers(self, folder: Path, asked: Asked) -> None:
        """See World."""
        for name, file in (("train", asked.corpus), ("queries", asked.queries)):
            table = pq.read_table(self.folder / f"{file}.parquet")
            numbers = np.array(table["numbers"].to_pylist(), np.float32).reshape(-1, *self._shape)
            np.savez(folder / f"{name}.npz", features=numbers, label=table["label"].to_numpy())
        weights = safetensors.torch.load_file(self.folder / f"{asked.model}.safetensors")
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        setup = {"factory": self._factory, "kind": "classification"}
        (folder / "setup.json").write_text(json.dumps(setup))
