"""`finetune` with held-out rows: which step it ends at, what becomes of the model, and what it refuses."""

import copy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pipeline.choices import ClassificationTask
from pipeline.errors import ContractError, InputError, NumericsError
from pipeline.extend import extend
from pipeline.extensions import load_producer, load_task
from pipeline.freeze import freeze
from pipeline.producer_choices import Finetune
from pipeline.producers.early_stopping import split
from tests.small import Small, work_off

FEATURES, CLASSES, SEED = 6, 4, 5
TASK = load_task(ClassificationTask(shape=[FEATURES]))
RECIPES = {
    "momentum": {"lr": 0.1},
    "adam": {"optimizer": "adam", "lr": 0.05},
    "train mode": {"lr": 0.1, "mode": "train"},
    "last block": {"lr": 0.5, "last_blocks": 1},
    "adapters": {"lr": 0.1, "lora_rank": 2},
    "few rows held out": {"lr": 0.1, "validation_fraction": 0.15},
    "bounded": {"lr": 0.1, "max_loss_change": 0.4},
}


def model():
    """It has statistics that train mode moves."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(FEATURES, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, CLASSES),
    ]
    return nn.Sequential(*layers).eval()


def query(rows=60):
    """Rows whose labels can be learned in part: more steps than some fit noise."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn((rows, FEATURES), generator=generator)
    label = (features[:, :CLASSES] + 0.6 * torch.randn((rows, CLASSES), generator=generator)).argmax(dim=1)
    return {"features": features, "label": label}


def finetune(batch, seed=SEED, **fields):
    return load_producer(Finetune(**{"steps": 60, **fields})).produce(model(), TASK, batch, seed)


def loss(of, batch):
    with torch.no_grad():
        return TASK.loss_B(copy.deepcopy(of).eval(), batch).mean().item()


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_the_counterpart_is_the_model_of_the_step_with_the_least_held_out_loss(fields):
    """As if so many steps had been taken on the other rows alone: weights, statistics and all."""
    fields = {"validation_fraction": 0.4, **fields}
    stopped = finetune(query(), **fields)
    tuned, held_out = split(query(), fields["validation_fraction"], SEED)
    tried = int(stopped.details["steps_tried"])
    fields = {**fields, "validation_fraction": 0}
    trajectory = [finetune(tuned, **fields, steps=steps).model for steps in range(1, tried + 1)]
    losses = [loss(each, held_out) for each in trajectory]
    assert 1 + losses.index(min(losses)) == stopped.steps
    expected = trajectory[stopped.steps - 1].state_dict()
    for name, tensor in stopped.model.state_dict().items():
        assert torch.equal(expected[name], tensor), name
    assert len(held_out["label"]) == stopped.details["held_out_rows"]
    assert loss(model(), held_out) == pytest.approx(stopped.details["held_out_loss_before_nats"])
    assert min(losses) == pytest.approx(stopped.details["held_out_loss_after_nats"])


@pytest.mark.parametrize("patience", [1, 4])
def test_patience_ends_it(patience):
    """So many steps after the best one; where the loss falls to the end, all steps are taken."""
    found = finetune(query(), lr=0.1, validation_fraction=0.4, patience=patience)
    assert found.steps + patience == found.details["steps_tried"]
    short = finetune(query(), lr=1e-3, steps=3, validation_fraction=0.4, patience=patience)
    assert (3, 3) == (short.steps, short.details["steps_tried"])


def test_the_query_and_its_seed_decide_which_rows_are_held_out():
    """Equal for equal seeds, others for another; no row is in both parts and none is lost."""
    batch = {"row": torch.arange(40)}
    first, second, other = (split(batch, 0.25, seed) for seed in (1, 1, 2))
    assert first[1]["row"].tolist() == second[1]["row"].tolist()
    assert first[1]["row"].tolist() != other[1]["row"].tolist()
    assert list(range(40)) == sorted(torch.cat([part["row"] for part in first]).tolist())


@pytest.mark.parametrize(
    ("rows", "fraction", "held_out"),
    [(2, 0.01, 1), (2, 0.99, 1), (3, 0.5, 2), (10, 0.25, 2), (400, 0.25, 100), (7, 0.99, 6)],
)
def test_both_parts_have_rows(rows, fraction, held_out):
    """The share is rounded; of two rows one is left to either side, whatever the share."""
    tuned, kept = split({"row": torch.arange(rows)}, fraction, 0)
    assert (rows - held_out, held_out) == (len(tuned["row"]), len(kept["row"]))


def test_a_query_of_one_row_has_none_to_hold_out():
    """Said with what to do."""
    with pytest.raises(ContractError, match=r"the query has 1 row; with producer\.validation_fraction it needs 2"):
        finetune(query(1), validation_fraction=0.5)


def test_steps_that_only_do_harm_are_an_error():
    """A rate at which the first step is too long: no counterpart is better than the base, and the losses are named."""
    with pytest.raises(
        NumericsError, match=r"(?s)no step lowers the loss of the held-out rows.*nats before.*lower producer\.lr"
    ):
        finetune(query(), lr=500.0, steps=2, validation_fraction=0.4)


def test_a_held_out_row_without_a_loss_is_named():
    """A label that the model does not have, in a held-out row."""
    batch = query()
    batch["label"][:] = CLASSES
    with pytest.raises(NumericsError, match="the loss of held-out rows is nan"):
        finetune(batch, validation_fraction=0.4)


# --- in a run ---------------------------------------------------------------------------------------------------------

HELD_OUT = "producer={name: finetune, validation_fraction: 0.5, lr: 0.01}"


@pytest.fixture
def small(tmp_path):
    """The small world, with a query of five copies of one row, so that steps on some of them help the others."""
    made = Small(tmp_path)
    one = pq.read_table(tmp_path / "queries.parquet").slice(1, 1)
    pq.write_table(pa.concat_tables([one] * 5), tmp_path / "clean.parquet")
    return made


def test_a_run_refuses_queries_of_one_row_before_it_begins(small, tmp_path):
    """At freezing, by name, and so does extending it; nothing was written."""
    with pytest.raises(InputError, match=r"query 'red': got 1 row, expected 2 or more: producer\.validation_fraction"):
        freeze(small.spec(tmp_path / "run", HELD_OUT))
    assert not (tmp_path / "run").exists()
    run = work_off(freeze(small.spec(tmp_path / "run", HELD_OUT, f"queries.uri={tmp_path}/clean.parquet")))
    table = pq.read_table(tmp_path / "queries.parquet").slice(0, 1)
    pq.write_table(table, tmp_path / "more.parquet")
    with pytest.raises(InputError, match="query 'red': got 1 row"):
        extend(run.uri(), str(tmp_path / "more.parquet"), None)


def test_a_counterpart_says_where_it_ended(small, tmp_path):
    """meta.json has the step taken, the held-out rows and their loss before and after."""
    run = work_off(freeze(small.spec(tmp_path / "run", HELD_OUT, f"queries.uri={tmp_path}/clean.parquet")))
    meta = run.counterpart_meta("green")
    details = meta["details"]
    assert 1 <= meta["steps"] <= details["steps_tried"] <= 30
    assert (2, 5) == (details["held_out_rows"], meta["query_rows"])
    assert details["held_out_loss_after_nats"] < details["held_out_loss_before_nats"]
