"""Figures are pictures of their data: sharp, the same for the same data, and refused for what cannot be drawn."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline import figures
from pipeline.errors import SpecError
from pipeline.evaluate import detection
from pipeline.judgements import agreement

pytestmark = pytest.mark.slow

WIDTH = 1800
ROWS = [("release", 0.21, 0.18, 0.24), ("natural", 0.48, 0.45, 0.51), ("random", -0.01, -0.04, 0.02)]
BAD = np.arange(200) < 20


def scattered(seed=0, points=100):
    x, noise = np.random.default_rng(seed).normal(size=(2, points))
    return figures.scatter(agreement(x, x + noise), x, x + noise, "Mirrored influence", "P1 (nats)", "P2 (nats)")


def barred(rows=ROWS, **more):
    return figures.bars(rows, "Linear datamodelling score", "Spearman correlation", **more)


def detected(names=("release", "natural"), seed=0):
    chance = np.random.default_rng(seed)
    return figures.found({name: detection(BAD + chance.normal(size=200), BAD) for name in names}, "Mislabelled")


def ranked(names=("release", "natural"), seed=0):
    chance = np.random.default_rng(seed)
    return figures.ranks({name: chance.geometric(0.1, 60) for name in names}, "Own copies")


def pixels(png):
    """As an array [height, width, 3]."""
    image = Image.open(io.BytesIO(png))
    assert "PNG" == image.format
    return np.asarray(image.convert("RGB"))


def shows(png, colour):
    """Whether some pixel has exactly this colour, such as "#d55e00"."""
    return bool((pixels(png) == tuple(bytes.fromhex(colour[1:]))).all(axis=-1).any())


@pytest.mark.parametrize("draw", [scattered, barred, detected, ranked])
def test_a_figure_is_sharp_at_the_width_it_is_read(draw):
    """Twice 900 px wide, no higher than wide, dark on white, and with nothing at its edges that could be cut off."""
    found = pixels(draw())
    assert WIDTH == found.shape[1]
    assert found.shape[0] <= WIDTH
    assert 255 == np.median(found)
    assert (255, 255, 255, 255) == (found[:8].min(), found[-8:].min(), found[:, :8].min(), found[:, -8:].min())


@pytest.mark.parametrize("draw", [scattered, detected, ranked])
def test_a_figure_is_of_its_data(draw):
    """The same data give the same bytes, other data others."""
    assert draw() == draw()
    assert draw() != draw(seed=1)


def test_rows_are_drawn_best_first_in_whatever_order_they_come():
    """The order of the rows changes nothing; their means do."""
    assert barred() == barred(ROWS[::-1])
    assert barred() != barred([("release", 0.22, 0.18, 0.24), *ROWS[1:]])


def test_every_row_has_its_room():
    """Forty rows stand as far apart as three do."""
    few, many = pixels(barred()).shape[0], pixels(barred([(f"row {i}", i, i - 1, i + 1) for i in range(40)])).shape[0]
    assert 37 * 0.42 * figures.DPI == pytest.approx(many - few, abs=2)


def test_the_reference_is_a_line_of_its_own_colour():
    """It is there when asked for, and named."""
    assert not shows(barred(), figures.ORANGE)
    assert shows(barred(reference=0.7), figures.ORANGE)
    assert barred(reference=0.7) != barred(reference=0.7, reference_name="ceiling")


@pytest.mark.parametrize("draw", [detected, ranked])
def test_each_method_has_its_colour(draw):
    """Two methods, the first two colours, no third; an eighth and ninth are drawn all the same."""
    assert (True, True, False) == tuple(shows(draw(), colour) for colour in figures.COLOURS[:3])
    assert WIDTH == pixels(draw([f"method {i}" for i in range(9)])).shape[1]


def test_a_crowd_is_drawn_smaller():
    """Points by the thousand leave white between them."""
    few, many = (np.mean(pixels(scattered(points=n)) < 250) for n in (1000, 4000))
    assert many < 2 * few


@pytest.mark.parametrize(
    "title", ["", "x" * 500, "a title of many words " * 10, "$ 5 % of {these} \\ are _mislabelled_ ^"]
)
def test_any_title_fits(title):
    """However long, and whatever signs it has."""
    found = pixels(figures.bars(ROWS, title, "share"))
    assert (WIDTH, 255) == (found.shape[1], found[:, -8:].min())


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: barred([]), "nothing"),
        (lambda: barred([("a", np.nan, 0, 1)]), "rows: .*not finite"),
        (lambda: barred(reference=np.inf), "reference: .*not finite"),
        (lambda: detected([]), "nothing"),
        (lambda: ranked([]), "nothing"),
        (lambda: figures.ranks({"a": np.array([])}, ""), "a: cannot draw nothing"),
        (lambda: figures.ranks({"a": np.array([0, 1])}, ""), "a: a rank of 0"),
        (
            lambda: figures.scatter(
                agreement(np.arange(3.0), np.arange(3.0)), np.full(3, np.nan), np.ones(3), "", "", ""
            ),
            "x_N",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(draw, says):
    """Nothing at all, what is no number, a rank before the first."""
    with pytest.raises(ValueError, match=says):
        draw()


def test_without_matplotlib_its_extra_is_named(monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SpecError, match=r"matplotlib") as caught:
        barred()
    assert "pip install 'mirrorscope[evaluate]'" == caught.value.hint


def test_drawing_leaves_no_state_behind():
    """Pyplot, which keeps every figure and picks a screen, is not even imported."""
    program = (
        "import sys; from pipeline import figures; "
        "figures.bars([('a', 1.0, 0.0, 2.0)], 'title', 'x'); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert 0 == subprocess.run([sys.executable, "-c", program], check=False).returncode
