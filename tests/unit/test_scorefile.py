"""Score files read in part: what is read is what was written, and damage does not go unseen."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ArtifactError, InputError
from pipeline.records import SCORES
from pipeline.scorefile import ScoreFile

ROWS = 1000


def table(shard_id=3, query_id="q"):
    score_N = np.arange(ROWS, dtype=np.float32)
    columns = {
        "example_id": [f"e{i:04d}" for i in range(ROWS)], "source": pa.nulls(ROWS, pa.string()), "query_id": [query_id] * ROWS,
        "base_loss": score_N * 0, "counterpart_loss": score_N, "score": score_N,
        "num_tokens": pa.nulls(ROWS, pa.int32()), "shard_id": [shard_id] * ROWS, "row": np.arange(ROWS),
    }  # fmt: skip
    return pa.table(columns).cast(SCORES)


@pytest.fixture
def path(tmp_path):
    """A score file of four row groups."""
    path = tmp_path / "shard-000003.parquet"
    pq.write_table(table(), path, row_group_size=ROWS // 4, write_page_checksum=True, compression="zstd")
    return path


def opened(path, rows=ROWS, size_bytes=None, **constants):
    size_bytes = path.stat().st_size if size_bytes is None else size_bytes
    return ScoreFile(str(path), rows, size_bytes, {"query_id": "q", "shard_id": 3, **constants})


def test_rows_are_taken_by_position_in_the_groups_asked_for(path):
    """Groups know their ranges; positions count through the groups that are named, and come back whole and in order."""
    with opened(path) as file:
        assert [0, 1, 2, 3] == file.groups
        assert (250.0, 499.0) == file.range(1, "score")
        assert list(range(500, 750)) == file.read([2], ["score"])["score"].to_pylist()
        taken = file.take([1, 3], np.array([0, 249, 251]))
    assert table().take(pa.array([250, 499, 751])).equals(taken)


def test_a_flipped_bit_in_what_is_read_is_found(path):
    """The checksum of a page tells; pages that are not read are not looked at."""
    column = pq.ParquetFile(path).metadata.row_group(3).column(SCORES.get_field_index("score"))
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    with opened(path) as file:
        assert ROWS // 4 == len(file.read([0], ["score"]))
        with pytest.raises(ArtifactError, match=r"shard-000003\.parquet is damaged"):
            file.read([3], ["score"])


def test_another_file_than_the_committed_one_is_found(path):
    """Cut short, of another size, with other rows, or another shard's or query's."""
    for promise, found in (
        ({"rows": 999}, "got rows 1000, expected 999"), ({"size_bytes": 5}, r"got bytes \d+, expected 5"),
        ({"shard_id": 4}, "got shard_id 3, expected 4"), ({"query_id": "r"}, "got query_id q, expected r"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=rf"shard-000003\.parquet is not what its commit says: {found}"):
            opened(path, **promise)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"shard-000003\.parquet is damaged"):
        opened(path)
    path.unlink()
    with pytest.raises(InputError, match="does not exist"):
        opened(path, size_bytes=0)
