"""The ledger of faults sees what it is there to see: a row that is lost, one that is there twice, one with another score."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.run import finish
from tests.conftest import run_without_ray
from tests.faults.ledger import Ledger

pytestmark = pytest.mark.slow

ROWS = 64


def lose(path):
    path.unlink()


def double(path):
    shutil.copy(path, path.with_name("shard-000009.parquet"))


def change(path):
    table = pq.read_table(path, partitioning=None)
    index = table.schema.get_field_index("score")
    pq.write_table(table.set_column(index, "score", pc.add(table["score"], pa.scalar(1e-6, pa.float32()))), path)


def leave(path):
    pass


@pytest.mark.parametrize(
    ("harm", "lost", "twice", "other"),
    [(leave, 0, 0, 0), (lose, ROWS, 0, 0), (double, 0, ROWS, 0), (change, 0, 0, ROWS)],
)
def test_the_ledger_counts_what_is_lost_twice_and_other(make_spec, undisturbed, tmp_path, harm, lost, twice, other):
    """Of one score file of 64 rows that is gone, copied or changed; the entry is written down before it fails."""
    run = run_without_ray(make_spec())
    finish(run)
    harm(Path(run.uri("scores"), "query_id=copy-of-3", "shard-000001.parquet"))
    ledger = Ledger()
    if lost or twice or other:
        with pytest.raises(AssertionError, match="rows_lost="):
            ledger.enter("harm", 1, 0.5, run, undisturbed)
    else:
        ledger.enter("harm", 1, 0.5, run, undisturbed)
    (entry,) = ledger.entries
    assert (300, lost, twice, other, 0) == (
        entry.rows, entry.rows_lost, entry.rows_twice, entry.rows_other, entry.rows_rejected,
    )  # fmt: skip
