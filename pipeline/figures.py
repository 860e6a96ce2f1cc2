"""Measures of attribution as pictures, PNG: for a page, a paper or a report.

Colours are Okabe and Ito's, told apart by the colour-blind; text is sized to be read when a picture is 900 px wide.
The same data give the same bytes. Shapes: Q queries, N examples.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .importing import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .evaluate import Detection, Estimate
    from .judgements import Agreement

WIDTH_IN, DPI = 9.0, 200  # 1,800 px: sharp where 900 are shown on a dense screen
TITLE_PT, LABEL_PT, TICK_PT = 14, 12, 11
INK, FAINT, RULE, PAPER = "#1b1f24", "#6b7280", "#e5e7eb", "#ffffff"
BLUE, ORANGE = "#0072b2", "#d55e00"
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("-", "--", "-.", ":")
EDGE_IN = 0.15
TITLE_CHARACTERS, LEGEND_CHARACTERS = 68, 44  # that fit in a line; in one of two columns
CROWDED = 1500  # points: from here on they are drawn small and faint


def scatter(agreement: Agreement, x_N: np.ndarray, y_N: np.ndarray, title: str, xlabel: str, ylabel: str) -> bytes:
    """Two numbers of the same examples against each other, such as P1 and P2, with their correlations.

    Args:
        agreement: Of these numbers.
        x_N: One number per example.
        y_N: The other.
        title: What is compared.
        xlabel: What x is, with its unit.
        ylabel: What y is, with its unit.

    Returns:
        PNG, 1,800 px wide.

    Raises:
        ValueError: There is nothing to draw, or something that is not finite.
        SpecError: Matplotlib is not installed.
    """
    _must_be_drawable(x_N=x_N, y_N=y_N)
    figure, axes = _canvas(7.2, title, f"{_correlations(agreement)}   n = {agreement.count:,}")
    crowded = len(x_N) > CROWDED
    axes.scatter(
        x_N, y_N, s=9 if crowded else 26, c=BLUE, alpha=0.3 if crowded else 0.6, linewidths=0, zorder=3, rasterized=True
    )
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    axes.margins(0.05)
    _label(axes, xlabel, ylabel)
    return _png(figure)


def bars(
    rows: Sequence[tuple[str, float, float, float]],
    title: str,
    xlabel: str,
    reference: float | None = None,
    reference_name: str = "reliability of the truth",
) -> bytes:
    """Methods by what they reach, best first: a dot, its interval and its figure per row.

    Args:
        rows: Name, mean, low and high end of the interval; in any order.
        title: What is measured, of how many.
        xlabel: The measure, with its unit.
        reference: Drawn as a line: what the rows are to be read against, such as what the truth allows.
        reference_name: What that line is.

    Returns:
        PNG, 1,800 px wide, as high as the rows ask for.

    Raises:
        ValueError: There is nothing to draw, or something that is not finite.
        SpecError: Matplotlib is not installed.
    """
    ordered = sorted(rows, key=lambda row: -row[1])
    number_RV = np.array([row[1:] for row in ordered], np.float64)
    _must_be_drawable(rows=number_RV, reference=np.array(reference or 0.0))
    mean_R, low_R, high_R = number_RV.T
    place_R = np.arange(len(ordered))
    figure, axes = _canvas(1.35 + 0.42 * len(ordered) + (reference is not None) * 0.3, title)
    axes.hlines(place_R, low_R, high_R, color=BLUE, linewidth=2.4, zorder=3)
    axes.scatter(mean_R, place_R, s=46, c=BLUE, edgecolors=PAPER, linewidths=1.2, zorder=4)
    axes.set_yticks(place_R, [row[0] for row in ordered], fontsize=LABEL_PT, color=INK)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    for place, mean in zip(place_R, mean_R, strict=True):
        axes.annotate(
            f"{mean:.3f}".replace("-", "\N{MINUS SIGN}"), (1, place), (8, 0), ("axes fraction", "data"),
            textcoords="offset points", va="center_baseline", fontsize=TICK_PT, color=INK, annotation_clip=False,
        )  # fmt: skip
    if reference is not None:
        axes.axvline(reference, color=ORANGE, linewidth=1.6, linestyle="--", zorder=2)
        axes.annotate(
            f"{reference_name} {reference:.3f}", (reference, 1), (0, 4), ("data", "axes fraction"), textcoords="offset points",
            ha="right" if reference > np.mean(axes.get_xlim()) else "left", fontsize=TICK_PT, color=ORANGE,
        )  # fmt: skip
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    _label(axes, xlabel, "")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return _png(figure)


def found(curves: Mapping[str, Detection], title: str) -> bytes:
    """Share of the bad examples found against the share inspected, most suspicious first, beside chance.

    Args:
        curves: Per method, what it detects; drawn with its AUC, best first.
        title: What is looked for, in what.

    Returns:
        PNG, 1,800 px wide.

    Raises:
        ValueError: There is nothing to draw, or something that is not finite.
        SpecError: Matplotlib is not installed.
    """
    ordered = sorted(curves.items(), key=lambda item: -item[1].auc)
    if not ordered:
        raise ValueError("no curves: cannot draw nothing")
    for name, curve in ordered:
        _must_be_drawable(**{f"{name}: found_P": curve.found_P, f"{name}: inspected_P": curve.inspected_P})
    kinds = sorted({f"{curve.count:,} bad of {len(curve.found_P) - 1:,}" for _, curve in ordered})
    labels = [*(f"{name}: AUC {curve.auc:.3f}" for name, curve in ordered), "chance: AUC 0.500"]
    figure, axes = _canvas(_height(labels), title, "; ".join(kinds))
    for place, (_, curve) in enumerate(ordered):
        axes.plot(100 * curve.inspected_P, 100 * curve.found_P, label=labels[place], **_style(place))
    axes.plot([0, 100], [0, 100], color=FAINT, linewidth=1.2, label=labels[-1], zorder=2)
    axes.set(xlim=(0, 100), ylim=(0, 101.5))
    _label(axes, "examples inspected, most suspicious first (%)", "bad examples found (%)")
    _legend(figure, labels)
    return _png(figure)


def ranks(ranks: Mapping[str, np.ndarray], title: str) -> bytes:
    """Share of the queries whose own copy is among the first r, against r.

    Args:
        ranks: Per method, the rank of each query's own copy, from 1; drawn with its top-1 and top-5, the
            smallest geometric mean first.
        title: Of what, among how many.

    Returns:
        PNG, 1,800 px wide.

    Raises:
        ValueError: There is nothing to draw, or a rank below 1.
        SpecError: Matplotlib is not installed.
    """
    if not ranks:
        raise ValueError("no ranks: cannot draw nothing")
    for name, rank_Q in ranks.items():
        _must_be_drawable(**{name: rank_Q})
        if rank_Q.min() < 1:
            raise ValueError(f"{name}: a rank of {rank_Q.min()}, expected 1 or more")
    ordered = sorted(ranks.items(), key=lambda item: float(np.log(item[1]).mean()))
    last = max(10, *(int(rank_Q.max()) for _, rank_Q in ordered))
    counts = sorted({f"{len(rank_Q):,} queries" for _, rank_Q in ordered})
    labels = [f"{name}: top-1 {(rank_Q <= 1).mean():.0%}, top-5 {(rank_Q <= 5).mean():.0%}" for name, rank_Q in ordered]
    figure, axes = _canvas(_height(labels), title, "; ".join(counts))
    for place, (_, rank_Q) in enumerate(ordered):
        at_P, before_P = np.unique(np.sort(rank_Q), return_index=True)
        share_P = np.append(before_P[1:], len(rank_Q)) / len(rank_Q)
        rank_X, share_X = [1, *at_P, last], [(rank_Q <= 1).mean(), *share_P, 1.0]
        axes.step(rank_X, 100 * np.array(share_X), where="post", label=labels[place], **_style(place))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda rank, _: f"{rank:,.0f}")
    axes.set(xlim=(1, last), ylim=(0, 101.5))
    _label(axes, "rank r", "queries whose own copy is within rank r (%)")
    _legend(figure, labels)
    return _png(figure)


def _canvas(height_in: float, title: str, figures: str = "") -> tuple[Figure, Axes]:
    """An empty picture under its title, with its figures in a line below that."""
    with extra("evaluate", "a figure"):
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = textwrap.wrap(title, TITLE_CHARACTERS) or [""]
    title_in = 0.26 * len(lines)
    head_in = title_in + (0.58 if figures else 0.28)
    height_in += title_in
    layout = ConstrainedLayoutEngine(w_pad=EDGE_IN, h_pad=EDGE_IN, rect=(0, 0, 1, 1 - head_in / height_in))
    figure = Figure((WIDTH_IN, height_in), DPI, facecolor=PAPER, layout=layout)
    for text, below_in, size, weight, colour in (
        ("\n".join(lines), 0.18, TITLE_PT, "bold", INK),
        (figures, 0.24 + title_in, LABEL_PT, "normal", FAINT),
    ):
        figure.text(
            EDGE_IN / WIDTH_IN,
            1 - below_in / height_in,
            text,
            fontsize=size,
            fontweight=weight,
            color=colour,
            va="top",
            linespacing=1.25,
        )
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=TICK_PT, labelcolor=INK, color=FAINT)
    axes.tick_params(which="minor", color=FAINT)
    axes.grid(visible=True, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=LABEL_PT, color=INK, labelpad=8)
    axes.set_ylabel(y, fontsize=LABEL_PT, color=INK, labelpad=8)


def _columns(labels: Sequence[str]) -> int:
    """Of a legend, by what fits."""
    return 2 if len(labels) > 1 and max(map(len, labels)) <= LEGEND_CHARACTERS else 1


def _height(labels: Sequence[str]) -> float:
    """Inches for a plot and the legend of its lines."""
    return 6.0 + 0.26 * math.ceil(len(labels) / _columns(labels))


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    """Below the axes, where it hides no line."""
    figure.legend(
        loc="outside lower left", ncols=_columns(labels), fontsize=TICK_PT, labelcolor=INK, frameon=False,
        handlelength=2.4, borderaxespad=0.95, borderpad=0.0,
    )  # fmt: skip


def _style(place: int) -> dict[str, Any]:
    """Lines that differ in colour, and from the eighth on in dashes; the best lies on top."""
    dashes = DASHES[place // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dashes, "linewidth": 2.2, "zorder": 4 - place / 1000}


def _correlations(agreement: Agreement) -> str:
    """Both correlations with their intervals."""

    def said(name: str, estimate: Estimate) -> str:
        return f"{name} {estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"

    return f"{said('Pearson', agreement.pearson)}   {said('Spearman', agreement.spearman)}"


def _must_be_drawable(**values: np.ndarray) -> None:
    for name, value in values.items():
        if value.size == 0 or not np.isfinite(value).all():
            raise ValueError(f"{name}: cannot draw " + ("nothing" if value.size == 0 else "what is not finite"))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
