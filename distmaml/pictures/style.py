"""How all pictures look: colours, axes, words, and files that are whole or not there.

Figures are made without pyplot, so nothing here is global and any thread may draw. Colours are those of Okabe and Ito,
which colour-blind people can tell apart (https://jfly.uni-koeln.de/color/), and no meaning hangs on colour alone.
"""

from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from distmaml.files import atomic_file, disk_errors

Array: TypeAlias = NDArray[Any]

BLACK, GREY, SILVER, LIGHT = "#222222", "#8a8a8a", "#c8c8c8", "#e4e4e4"
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
DASHES = (0, (4, 2))
SHORT_DASHES = (0, (2.2, 1.1))
DOTS_PER_INCH = 200


def is_accuracy(metric: str) -> bool:
    """Whether a metric is one of those that are fractions, the more the better."""
    return "accuracy" in metric


def scale(metric: str) -> float:
    """Accuracies are shown in percent."""
    return 100.0 if is_accuracy(metric) else 1.0


def axis_label(metric: str) -> str:
    """The name of a metric with its unit."""
    name = metric.rpartition("/")[2].replace("_", " ")
    return name.capitalize() + (" (%)" if is_accuracy(metric) else "")


def new_figure(title: str, *, num_panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side."""
    figure = Figure(figsize=(5.2 * num_panels + 0.6, 3.9), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=13, fontweight="bold", color=BLACK)
    all_axes = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in all_axes:
        axes.grid(color=LIGHT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=10, color=GREY)
        axes.xaxis.label.set_size(11)
        axes.yaxis.label.set_size(11)
    return figure, all_axes


def add_legend(axes: Axes, **arguments: Any) -> None:
    """The legend of a panel, in the common style."""
    axes.legend(fontsize=9.5, title_fontsize=9.5, frameon=True, framealpha=0.9, edgecolor=LIGHT, **arguments)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
      RunError: the disk is full, or the folder cannot be written.
    """
    with disk_errors(path), atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
