"""How much memory there is, and how much of it a worker may take for counterparts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch

SHARE = 0.5
"""Of a worker's memory, for counterparts; the other half is for the base, batches and what the model makes of them."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def room_bytes(device: torch.device, cpus: float, gpus: float, given_gib: float | None = None) -> int:
    """Memory for counterparts on a device that the base model is on already.

    Args:
        device: The worker's.
        cpus: CPUs of the worker: others have as much of the host's memory for each of theirs.
        gpus: GPUs of the worker; below 1 others are on the same.
        given_gib: What it is to be; null for what there is.
    """
    if given_gib is not None:
        return int(given_gib * 2**30)
    if device.type != "cuda":
        return host_room_bytes(cpus)
    free, total = torch.cuda.mem_get_info(device)
    return int(SHARE * min(free, total * min(1.0, gpus or 1.0)))


def told(groups: Sequence[Sequence[int]], counterparts_bytes: int, room_bytes: int) -> str:
    """How counterparts lie in a worker's memory, for people."""
    number = sum(map(len, groups))
    if len(groups) == 1:
        return f"{number:,} of {counterparts_bytes / 2**30:.2g} GiB together, all at once beside the base"
    return (
        f"{number:,} of {counterparts_bytes / 2**30:.2g} GiB together, for which a worker has {room_bytes / 2**30:.2g} "
        f"(resources.score.counterparts_gib): {len(groups):,} passes over each shard while it is in memory, with up to "
        f"{max(map(len, groups)):,} at a time"
    )


def host_room_bytes(cpus: float) -> int:
    """Memory of the host for counterparts, of a worker with so many of its CPUs."""
    return int(SHARE * host_bytes() * min(1.0, cpus / (os.cpu_count() or 1)))


def host_bytes() -> int:
    """Memory of the machine, or of the container that this process is in."""
    found = [psutil.virtual_memory().total]
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # none, or `max`
            found.append(int(Path(path).read_text()))
    return min(found)
