"""How tables are written: what lets engines skip, and what shows damage."""

import io
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.folder import parquet_bytes
from pipeline.records import SCORES

ROWS = 40_000


@pytest.fixture(scope="module")
def written():
    """A score file of one shard and query, as it is put into its order."""
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "example_id": [f"{number:032x}" for number in rng.permutation(ROWS)],
            "source": [f"site-{i // 100 % 7}" for i in range(ROWS)],
            "query_id": ["q"] * ROWS,
            "base_loss": rng.random(ROWS, np.float32),
            "counterpart_loss": rng.random(ROWS, np.float32),
            "score": np.sort(rng.standard_normal(ROWS).astype(np.float32))[::-1],
            "num_tokens": pa.nulls(ROWS, pa.int32()),
            "shard_id": np.zeros(ROWS, np.int32),
            "row": np.arange(ROWS),
        }
    )
    return parquet_bytes(table.cast(SCORES))


def test_row_groups_hold_narrow_ranges_of_scores(written):
    """16,384 rows each, with bounds that do not overlap: a threshold leaves whole groups unread."""
    metadata = pq.read_metadata(io.BytesIO(written))
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    assert [16_384, 16_384, 7_232] == [group.num_rows for group in groups]
    bounds = [group.column(SCORES.get_field_index("score")).statistics for group in groups]
    assert all(above.min >= below.max for above, below in pairwise(bounds))


def test_dictionaries_only_where_values_repeat(written):
    """Ids and losses are written plain: a dictionary of values that do not repeat makes them larger."""
    group = pq.read_metadata(io.BytesIO(written)).row_group(0)
    with_dictionary = {
        group.column(i).path_in_schema for i in range(group.num_columns) if group.column(i).has_dictionary_page
    }
    assert {"source", "query_id", "shard_id"} == with_dictionary


def test_filters_say_which_row_groups_cannot_hold_an_id(written, tmp_path):
    """DuckDB asks the Bloom filters: an id that is there is in one group or a false one more, one that is not hardly in any."""
    path = tmp_path / "scores.parquet"
    path.write_bytes(written)

    def possible(example_id):
        probe = "SELECT count(*) FROM parquet_bloom_probe(?, 'example_id', ?) WHERE NOT bloom_filter_excludes"
        (found,) = duckdb.execute(probe, [str(path), example_id]).fetchall()
        return found[0]

    assert all(1 <= possible(f"{number:032x}") <= 3 for number in range(50))
    assert sum(possible(f"{number:032x}") for number in range(50)) < 65
    assert sum(possible(f"{number:032x}") for number in range(ROWS, ROWS + 50)) < 25


def test_a_flipped_bit_is_told_by_the_pages_checksum(written):
    """In the middle of the file, which is data: whoever verifies pages is told."""
    damaged = bytearray(written)
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(OSError, match=r"(?i)checksum|crc"):
        pq.ParquetFile(io.BytesIO(bytes(damaged)), page_checksum_verification=True).read()
    assert ROWS == len(pq.ParquetFile(io.BytesIO(written), page_checksum_verification=True).read())
