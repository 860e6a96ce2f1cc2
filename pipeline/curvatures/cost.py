"""What a curvature costs, in seconds of one worker, by what it takes for a few rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

_Value = TypeVar("_Value")
TIMED_SIDE = 768
"""Of matrices that are multiplied and taken apart, at most, to know how fast this machine does so."""


@dataclass(frozen=True)
class Cost:
    """Seconds, about, that one worker needs for a curvature.

    Args:
        once_s: Whatever the rows.
        row_s: For each row.
        square_s: For the rows' number squared.
        cube_s: For its cube.
        query_s: For each query.
        query_row_s: For each row and query.
        room: Rows that can be used at all.
    """

    once_s: float = 0.0
    row_s: float = 0.0
    square_s: float = 0.0
    cube_s: float = 0.0
    query_s: float = 0.0
    query_row_s: float = 0.0
    room: int = 1 << 62

    def of(self, rows: int, queries: int) -> float:
        """Seconds for so many rows and queries."""
        each = self.row_s + self.query_row_s * queries
        return self.once_s + self.query_s * queries + rows * (each + rows * (self.square_s + rows * self.cube_s))

    def most_rows(self, budget_s: float, queries: int, most: int) -> int:
        """The most rows that are done within the budget: at most `most` and what there is room for; 0 if not one is."""
        least, beyond = 0, min(most, self.room) + 1
        while beyond - least > 1:
            middle = (least + beyond) // 2
            least, beyond = (middle, beyond) if self.of(middle, queries) <= budget_s else (least, middle)
        return least


def timed(what: Callable[[], _Value]) -> tuple[_Value, float]:
    """What something gives, and the seconds that it takes; on a GPU until it is done."""
    _settle()
    started = time.perf_counter()
    found = what()
    _settle()
    return found, time.perf_counter() - started


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def multiply_s(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds for one multiplication and addition in a product of matrices."""
    matrix = torch.ones(TIMED_SIDE, TIMED_SIDE, device=device, dtype=dtype)
    matrix @ matrix
    return timed(lambda: matrix @ matrix)[1] / TIMED_SIDE**3


@cache
def eigenvectors_s(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Seconds for the eigenvectors of a matrix, by the cube of its side: of one of this side, or as large as is timed."""
    half = torch.rand(side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    matrix = half @ half.mT
    torch.linalg.eigh(matrix[:8, :8])
    return timed(lambda: torch.linalg.eigh(matrix))[1] / side**3
