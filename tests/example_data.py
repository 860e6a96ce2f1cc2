"""Small data of the shape that each example spec in jobs/specs names, so that every one of them can be planned."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from PIL import Image

from jobs import facts
from jobs.digits import write_demo
from tests.language import gpt, saved, sentences, t5

MODELS = """
from torch import nn


def build(width=4, classes=2):
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, classes))
"""


def prepare(spec: str, folder: Path) -> None:
    """Lay out the data of the example spec with this name under a folder."""
    MAKERS[spec](folder)


def _demo(folder: Path) -> None:
    (folder / "build" / "demo").mkdir(parents=True)
    for name, data in _demo_files().items():
        (folder / "build" / "demo" / name).write_bytes(data)


@cache
def _demo_files() -> dict[str, bytes]:
    """What `python -m jobs.digits` writes, trained once."""
    with TemporaryDirectory() as folder:
        write_demo(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _ensemble(folder: Path) -> None:
    """What `python -m jobs.digits build/demo --models 3` writes, with weights that nobody trained."""
    _demo(folder)
    for other in (1, 2):
        safetensors.torch.save_file(
            {"weight": torch.full((1,), float(other))}, folder / f"build/demo/cnn-{other}.safetensors"
        )


def _models(folder: Path, weights: str) -> None:
    (folder / "my_project").mkdir()
    (folder / "my_project" / "models.py").write_text(MODELS)
    (folder / "models").mkdir()
    if weights.endswith(".pt"):
        torch.save({"weight": torch.zeros(1)}, folder / weights)
    else:
        safetensors.torch.save_file({"weight": torch.zeros(1)}, folder / weights)


def _mislabelled(folder: Path) -> None:
    _models(folder, "models/classifier.pt")
    (folder / "data" / "train").mkdir(parents=True)
    for part in range(2):
        table = {
            "id": [f"{part}-{i}" for i in range(40)],
            "embedding": list(np.zeros((40, 32), np.float32)),
            "label": [0] * 40,
            "annotator": ["ann"] * 40,
        }
        pq.write_table(pa.table(table), folder / "data" / "train" / f"part-{part}.parquet")
    row = json.dumps({"query_id": "clean", "embedding": [0.0] * 32, "label": 1})
    (folder / "data" / "clean.jsonl").write_text((row + "\n") * 5)


def _image_folder(folder: Path) -> None:
    _models(folder, "models/photos.safetensors")
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "#336699").save(buffer, "PNG")
    for place in ("train/cat/1", "train/cat/2", "train/dog/1", "queries/dog/why"):
        path = folder / "photos" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())


def _tabular_csv(folder: Path) -> None:
    _models(folder, "models/tabular.safetensors")
    (folder / "data").mkdir()
    (folder / "data" / "customers.csv").write_text("age,income,visits,churned\n" + "41,52000.5,3,0\n" * 30)
    (folder / "data" / "surprises.csv").write_text("query_id,age,income,visits,churned\nmax,29,18000,0,1\n")


def _model(folder: Path, *names: str) -> None:
    for name in names:
        saved(gpt(), folder / "models" / name)


def _table(folder: Path, path: str, **columns: list) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if path.endswith(".jsonl"):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.table(columns), folder / path)


def _text(folder: Path) -> None:
    _model(folder, "my-llm")
    _table(folder, "data/texts/part-0.parquet", id=["a", "b"], text=sentences(2), site=["x", "y"])
    _table(folder, "data/questions.jsonl", query_id=["q"], text=sentences(1))


def _answers(folder: Path) -> None:
    _model(folder, "my-instruct-model")
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Oslo."}]
    _table(folder, "data/conversations.parquet", id=["a", "b"], conversation=[talk, talk])
    _table(folder, "data/odd-answers.parquet", query_id=["q"], conversation=[talk])


def _translation(folder: Path) -> None:
    saved(t5(), folder / "models" / "my-translator")
    _table(folder, "data/pairs/part-0.parquet", english=sentences(2), german=sentences(2, seed=1))
    _table(folder, "data/odd-translations.parquet", id=["q"], english=sentences(1), german=sentences(1, seed=1))


def _trace_facts(folder: Path) -> None:
    """What `python -m jobs.facts build/facts` writes, of two facts and a model that learned nothing."""
    saved(gpt(), folder / "build" / "facts" / "model")
    some, patterns = facts.load_facts()[:2], facts.load_patterns()
    for name, rows in (
        ("sentences", facts.sentences(some, patterns)),
        ("questions", facts.queries(some[:1], patterns)),
    ):
        pq.write_table(pa.Table.from_pylist(rows), folder / "build" / "facts" / f"{name}.parquet")


def _web(*models: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _model(folder, *models)
        columns = {"site": ["x", "y"], "domain": ["x", "y"]}
        _table(folder, "data/web/part-0.parquet", id=["a", "b"], text=sentences(2), **columns)

    return make


MAKERS: dict[str, Callable[[Path], None]] = {
    "digits": _demo,
    "paper": _demo,
    "ensemble": _ensemble,
    "mislabelled": _mislabelled,
    "image_folder": _image_folder,
    "tabular_csv": _tabular_csv,
    "text": _text,
    "trace_facts": _trace_facts,
    "answers": _answers,
    "translation": _translation,
    "compare_checkpoints": _web("prior", "conditional"),
    "quality_filter": _web("small-llm"),
}
