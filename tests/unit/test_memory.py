"""Memory for counterparts: what a worker may take, and files that wait for their turn."""

import os

import numpy as np
import psutil
import pytest
import torch

from pipeline import memory
from pipeline.changes import LowRank, from_bytes, to_bytes

CPU = torch.device("cpu")


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    """Where a limit is set; `max` and no file at all are none."""
    none, limit = tmp_path / "max", tmp_path / "limit"
    none.write_text("max\n")
    limit.write_text(f"{2**30}\n")
    monkeypatch.setattr(memory, "_LIMITS", (str(none), str(tmp_path / "nothing")))
    assert psutil.virtual_memory().total == memory.host_bytes()
    monkeypatch.setattr(memory, "_LIMITS", (str(none), str(limit)))
    assert 2**30 == memory.host_bytes()


def test_workers_share_the_hosts_memory_by_their_cpus(monkeypatch):
    """Half of it is for counterparts, unless the spec says how much."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    whole = memory.SHARE * memory.host_bytes()
    assert int(whole / 4) == memory.room_bytes(CPU, cpus=2, gpus=0)
    assert int(whole) == memory.room_bytes(CPU, cpus=16, gpus=0)
    assert 3 * 2**29 == memory.room_bytes(CPU, cpus=2, gpus=0, given_gib=1.5)


def test_what_waits_lies_in_a_file_without_a_name(tmp_path):
    """Mapped, not read: memory that the system may take back. The same tensors, and nothing to clean up after a kill."""
    generator = torch.Generator().manual_seed(0)
    product = LowRank(torch.randn(300, 2, generator=generator), torch.randn(2, 200, generator=generator))
    changes = {"whole": torch.randn(1000, 1000, generator=generator), "product": product}
    found = from_bytes(to_bytes(changes), tmp_path)
    assert [] == os.listdir(tmp_path)
    assert ["product", "whole"] == sorted(found)
    assert torch.equal(changes["whole"], found["whole"])
    assert torch.equal(product.left, found["product"].left)
    assert torch.equal(product.right, found["product"].right)
    mapped = [part for part in psutil.Process().memory_maps(grouped=False) if str(tmp_path) in part.path]
    assert 4_000_000 <= sum(part.size for part in mapped)
    assert 0 == sum(part.anonymous for part in mapped)
    np.testing.assert_array_equal(from_bytes(to_bytes(changes))["whole"].numpy(), found["whole"].numpy())


def test_a_folder_without_room_is_an_error_of_the_disk(tmp_path):
    """Here one that is not there."""
    with pytest.raises(OSError, match="nowhere"):
        from_bytes(to_bytes({"x": torch.zeros(1)}), tmp_path / "nowhere")
