"""Figures of judgements: pictures of a size, that differ where what they show differs."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline import figures
from pipeline.evaluate import detection
from pipeline.judgements import agreement

X_N = np.random.default_rng(0).normal(size=60)


def scatter(slope):
    y_N = slope * X_N + np.random.default_rng(1).normal(size=60)
    return figures.scatter(agreement(X_N, y_N), X_N, y_N, "P1 against P2", "P1, nats", "P2, nats")


def bars(mean):
    return figures.bars([("ours", mean, mean - 0.1, mean + 0.1), ("theirs", 0.2, 0.1, 0.3)], "LDS", "Spearman", 0.9)


def found(sign):
    return figures.found({"ours": detection(sign * X_N, X_N > 1)}, "wrong labels")


def ranks(first):
    return figures.ranks({"ours": np.array([1, 2, first]), "theirs": np.array([3, 5, 9])}, "copies")


DRAWN = [(scatter, 1.0, -1.0), (bars, 0.5, 0.6), (found, 1, -1), (ranks, 1, 40)]


@pytest.mark.parametrize(("draw", "one", "other"), DRAWN, ids=["scatter", "bars", "found", "ranks"])
def test_a_figure_shows_what_it_is_given(draw, one, other):
    """The same numbers give the same picture, other numbers another; wide enough for a page, and not empty."""
    picture = Image.open(io.BytesIO(draw(one)))
    assert 1800 == picture.width
    assert len(picture.convert("L").getcolors(256)) > 20
    assert draw(one) == draw(one)
    assert draw(one) != draw(other)


def test_nothing_to_draw_is_an_error():
    """No rows, or a number that is none."""
    with pytest.raises(ValueError, match=r"empty|nothing"):
        figures.bars([], "LDS", "Spearman")
    with pytest.raises(ValueError, match="not finite"):
        figures.bars([("ours", float("nan"), 0, 1)], "LDS", "Spearman")
