"""Eigenvectors of many symmetric matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from .. import phases
from .base import Sample


def eigenvectors(matrices: Mapping[str, Tensor], sample: Sample) -> dict[str, Tensor]:
    """Eigenvectors of each, in columns; those of the first worker, since several may be right and all must turn the same way.

    On a CPU as many at a time as torch has threads: LAPACK hardly uses a second one.

    Args:
        matrices: Name -> symmetric matrix [N, N]. Equal ones, as of layers that share their input, are taken apart once.
        sample: Says whether there are other workers.
    """
    names, first = list(matrices), _first_of_equals(matrices)
    own = [name for name in names if first[name] == name]
    on_cpu = all(each.device.type == "cpu" for each in matrices.values())
    with _threads_outside(on_cpu) as threads, ThreadPoolExecutor(threads) as pool:
        found = dict(zip(own, _told(pool.map(_eigenvectors, [matrices[name] for name in own]), len(own)), strict=True))
    if sample.is_split:
        for each in found.values():
            dist.broadcast(each, 0)
    return {name: found[name] if name in found else found[first[name]].clone() for name in names}  # files want no views


def _eigenvectors(matrix: Tensor) -> Tensor:
    try:
        vectors = torch.linalg.eigh(matrix).eigenvectors
    except LinAlgError:  # single precision may not converge
        vectors = torch.linalg.eigh(matrix.double()).eigenvectors.to(matrix.dtype)
    return vectors.contiguous()


def _told(found: Iterator[Tensor], of: int) -> Iterator[Tensor]:
    """One after the other, with progress."""
    for done, each in enumerate(found, start=1):
        phases.at("curvature: eigenvectors, matrix", done, of, "")
        yield each


def _first_of_equals(matrices: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> the first name whose matrix is the same."""
    first: dict[str, str] = {}
    by_trace: dict[tuple[int, float], list[str]] = {}
    for name, matrix in matrices.items():
        near = by_trace.setdefault((len(matrix), float(matrix.trace())), [])
        first[name] = next((other for other in near if torch.equal(matrices[other], matrix)), name)
        if first[name] == name:
            near.append(name)
    return first


@contextmanager
def _threads_outside(on_cpu: bool) -> Iterator[int]:
    """In the block torch computes with one thread, so that several threads can call it; how many."""
    threads = torch.get_num_threads() if on_cpu else 1
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield threads
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
