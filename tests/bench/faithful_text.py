"""500 sentences that state 250 facts, and a small language model trained on them, as files.

Facts and patterns are those of `jobs/data`, put into sentences as `python -m jobs.facts` does. Queries are 60 of the facts in a
pattern that no sentence has; the loss of the answer counts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
from transformers import AutoTokenizer

from jobs import facts
from pipeline.choices import CausalLMTask
from pipeline.extensions import load_model, load_task, prepared
from pipeline.freeze import freeze
from pipeline.judge import Training
from pipeline.lessons import Whole
from pipeline.retraining import Retrainer
from pipeline.specfile import parse_spec
from tests.bench import text_model
from tests.bench.faithful_world import FOLDER, Asked
from tests.language import tokenizer

FACTS, QUERIES, COPIES = 250, 60, 100
EPOCHS = 10
CHECKPOINTS = (3, 5, 8)
"""Epochs after which checkpoints are kept: about a quarter, a half and three quarters."""


class Text:
    """See World. Of every query two sentences state the fact; 100 sentences are queries as well, to find themselves."""

    kind, rows, queries, prompt = "text", FACTS * facts.SENTENCES_PER_FACT, QUERIES, "prompt"
    lds = {"subsets": 100, "retrainings": 5}
    trials: Mapping[str, Any] = {}
    ranked = {"queries": {"transform": "relative"}, "copies": {"transform": "relative"}}

    def __init__(self) -> None:
        self.folder = FOLDER / self.kind
        self.folder.mkdir(parents=True, exist_ok=True)
        before = str(self.folder / "before")
        self.training = {
            "start": {"loader": "hf_transformers", "weights_uri": before},
            "optimizer": "adam", "lr": 3e-3, "epochs": EPOCHS, "batch_rows": 16,
        }  # fmt: skip
        if not (self.folder / "model" / "config.json").exists():
            self._write()

    def _write(self) -> None:
        tables = self._tables()
        for name, rows in tables.items():
            pq.write_table(pa.Table.from_pylist(rows), self.folder / f"{name}.parquet")
        words = tokenizer(None, [row["text"] for row in tables["train"]], text_model.VOCABULARY)
        self._save("before", text_model.untrained(), words)
        self._save("model", self._trained(), words)

    def _tables(self) -> dict[str, list[dict[str, Any]]]:
        """Its files, by name."""
        patterns, told = facts.load_patterns(), facts.chosen(facts.load_facts(), FACTS)
        sentences = facts.sentences(told, patterns)
        asked = random.Random(0).sample(told, QUERIES)
        copied = random.Random(1).sample(sentences, COPIES)
        stating = [
            {"query_id": fact.id, "example_id": row["id"]}
            for fact in asked
            for row in sentences
            if row["fact"] == fact.id
        ]
        copies = [{"query_id": f"copy-{row['id']}", "prompt": "", "text": row["text"]} for row in copied]
        own = [{"query_id": f"copy-{row['id']}", "example_id": row["id"]} for row in copied]
        tables = {"train": sentences, "queries": facts.queries(asked, patterns), "copies": copies}
        return {**tables, "queries-truth": stating, "copies-truth": own}

    def _save(self, name: str, model: Any, words: Any) -> None:
        words.save_pretrained(self.folder / name)
        model.save_pretrained(self.folder / name)

    def checkpoints(self) -> list[str]:
        """A glob of checkpoints after a quarter, a half and three quarters of the training; they are made if missing."""
        for epochs in CHECKPOINTS:
            name = f"checkpoints/epoch-{epochs}"
            if not (self.folder / name / "config.json").exists():
                words = AutoTokenizer.from_pretrained(self.folder / "model", trust_remote_code=False)
                self._save(name, self._trained(epochs), words)
        return [str(self.folder / "checkpoints" / "epoch-*")]

    def _trained(self, epochs: int = EPOCHS) -> Any:
        """The model, trained on all sentences as the judge trains on some; fewer epochs are the beginning of more."""
        tree = self.sections(Asked("queries", "before"))
        run = freeze(parse_spec({"run": {"uri": str(self.folder / "runs" / "before")}, **tree}))
        training = Training.model_validate({**self.training, "epochs": epochs})
        return Retrainer(run, training, "cpu").learned(Whole(None, 0), seed=0)

    def sections(self, asked: Asked) -> dict[str, Any]:
        """See World."""
        return {
            "model": {"loader": "hf_transformers", "weights_uri": str(self.folder / asked.model)},
            "corpus": {"uri": str(self.folder / f"{asked.corpus}.parquet"), "example_id": "id"},
            "queries": {"uri": str(self.folder / f"{asked.queries}.parquet")},
            "task": {"name": "causal_lm", "text": "text", **({"prompt": self.prompt} if self.prompt else {})},
        }

    def for_peers(self, folder: Path, asked: Asked) -> None:
        """See World."""
        for name, file in (("train", asked.corpus), ("queries", asked.queries)):
            np.savez(folder / f"{name}.npz", **self._tokens(file))
        spec = parse_spec({"run": {"uri": "unused"}, **self.sections(asked)})
        weights = load_model(spec.model, "cpu", 0).state_dict()
        safetensors.torch.save_file(
            {name: each.clone() for name, each in weights.items()}, folder / "model.safetensors"
        )
        setup = {"factory": "tests.bench.text_model:untrained", "kind": "causal_lm", "reduction": "mean"}
        (folder / "setup.json").write_text(json.dumps(setup))

    def _tokens(self, file: str) -> dict[str, np.ndarray]:
        """Token ids and labels of a file's rows, padded."""
        columns = ["text", *([self.prompt] if self.prompt else [])]
        table = pq.read_table(self.folder / f"{file}.parquet", columns=columns)
        task = load_task(CausalLMTask(prompt=self.prompt, tokenizer_uri=str(self.folder / "model")))
        return dict(prepared(task, {name: _objects(table[name].to_pylist()) for name in columns}).whole())


class Questions(Text):
    """500 questions that people asked (TREC; Li and Roth 2002), and the model trained on them; 60 others are the queries.

    Args:
        path: JSON lines with a `text`.
    """

    kind, rows, prompt = "questions", 500, None

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__()

    def _tables(self) -> dict[str, list[dict[str, Any]]]:
        texts = [json.loads(line)["text"] for line in self._path.read_text().splitlines()]
        chosen = random.Random(0).sample(sorted(set(texts)), self.rows + self.queries)
        train = [{"id": f"question-{i:03d}", "text": text} for i, text in enumerate(chosen[: self.rows])]
        asked = [{"query_id": f"asked-{i:02d}", "text": text} for i, text in enumerate(chosen[self.rows :])]
        copied = random.Random(1).sample(train, COPIES)
        copies = [{"query_id": f"copy-{row['id']}", "text": row["text"]} for row in copied]
        own = [{"query_id": f"copy-{row['id']}", "example_id": row["id"]} for row in copied]
        return {"train": train, "queries": asked, "copies": copies, "copies-truth": own}


def _objects(texts: Sequence[str]) -> np.ndarray:
    return np.array(texts, object)
