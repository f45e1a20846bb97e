"""A picture of figures of ours beside published ones.

Knows nothing of how they were made: labels and numbers in, a PNG file out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distmaml.pictures.style import BLACK, BLUE, GREY, LIGHT, VERMILION, save

_WIDTH = 9.0  # inches
_LINE, _FRAME = 0.4, 0.75  # inches of height: of a line, and of what else a panel has
_STYLES: dict[str, dict[str, Any]] = {
    "Published": {"color": BLACK, "marker": "D", "markersize": 7},
    "Published, inductive": {"color": BLACK, "marker": "D", "markersize": 7, "markerfacecolor": "white"},
    "Ours, transductive": {"color": BLUE, "marker": "o", "markersize": 7},
    "Ours, inductive": {"color": VERMILION, "marker": "s", "markersize": 6.5},
}
_OFFSETS = {"Published": -0.24, "Published, inductive": -0.24, "Ours, transductive": 0.0, "Ours, inductive": 0.24}


class Mark(NamedTuple):
    """A value with the half width of its interval; None where it has none."""

    value: float
    half_width: float | None


class Line(NamedTuple):
    """A published value and ours."""

    label: str
    published: Mark | None
    mode: str
    """"inductive" where that is what was published."""
    transductive: Mark | None
    inductive: Mark | None


class Panel(NamedTuple):
    """The lines of one setting, from the top, which have one unit."""

    title: str
    unit: str
    lines: Sequence[Line]


def against_published(path: Path, panels: Sequence[Panel], *, note: str = "") -> None:
    """Ours against published, both with their 95 % intervals: a panel for each setting, a line for each row.

    Args:
      note: what the labels mean.
    """
    heights = [_LINE * len(panel.lines) + _FRAME for panel in panels]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.9), layout="constrained", facecolor="white")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel)
    all_axes[0].set_title(note, fontsize=10.5, color=BLACK, loc="right")
    handles = [_handle(kind) for kind in _STYLES if any(_marks(line)[kind] for panel in panels for line in panel.lines)]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(_STYLES), fontsize=10.5, frameon=False,
        title="Ours beside the published figures, with 95 % intervals",
        title_fontproperties={"weight": "bold", "size": 13},
    )  # fmt: skip
    save(figure, path)


def _marks(line: Line) -> dict[str, Mark | None]:
    is_inductive = line.mode == "inductive"
    return {
        "Published": None if is_inductive else line.published,
        "Published, inductive": line.published if is_inductive else None,
        "Ours, transductive": line.transductive,
        "Ours, inductive": line.inductive,
    }


def _draw(axes: Axes, panel: Panel) -> None:
    for number, line in enumerate(panel.lines):
        for kind, mark in _marks(line).items():
            if mark is not None:
                axes.errorbar(
                    mark.value, number + _OFFSETS[kind], xerr=mark.half_width, linestyle="none", elinewidth=1.8,
                    capsize=3, **_STYLES[kind],
                )  # fmt: skip
    axes.set_yticks(np.arange(len(panel.lines)), [line.label for line in panel.lines], fontsize=11)
    axes.set_ylim(len(panel.lines) - 0.5, -0.5)
    axes.set_title(panel.title, fontsize=11.5, fontweight="bold", color=BLACK, loc="left")
    axes.set_xlabel(panel.unit, fontsize=10.5)
    axes.margins(x=0.06)
    axes.grid(color=LIGHT, linewidth=0.8, axis="x")
    for border in range(1, len(panel.lines)):
        axes.axhline(border - 0.5, color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=10.5, color=GREY)
    axes.tick_params(axis="y", length=0)


def _handle(kind: str) -> Line2D:
    return Line2D([], [], linestyle="none", label=kind, **_STYLES[kind])
