"""Pictures of a run: numpy arrays in, PNG files out.

Knows nothing of models, tasks or MLflow.
"""

import string
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from distmaml.errors import DataError
from distmaml.pictures.style import (
    BLACK,
    BLUE,
    CYCLE,
    DASHES,
    GREEN,
    GREY,
    SHORT_DASHES,
    SILVER,
    VERMILION,
    Array,
    add_legend,
    axis_label,
    is_accuracy,
    new_figure,
    save,
    scale,
)  # fmt: skip


def learning_curve(path: Path, points: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, title: str) -> None:
    """Metrics over the outer steps: a panel for each quantity, with training and validation in it.

    The best validation is marked: of the accuracy where there is one, of the loss otherwise.

    Args:
      points: metric key (train/query_loss, val/query_accuracy, ...) -> outer steps and values. Accuracies are
        fractions. Keys that end in _step_0 are drawn as "before adaptation" with the quantity they belong to.

    Raises:
      DataError: there is no point at all.
    """
    panels: dict[str, dict[str, tuple[Array, Array]]] = {}
    for key, (at, measured) in points.items():
        if len(at):
            quantity = key.partition("/")[2].removesuffix("_step_0")
            panels.setdefault(quantity, {})[key] = (np.asarray(at), scale(key) * np.asarray(measured, dtype=float))
    if not panels:
        raise DataError("A learning curve needs at least one point; the run has logged none.")
    figure, all_axes = new_figure(title, num_panels=len(panels))
    for axes, (quantity, curves) in zip(all_axes, panels.items(), strict=True):
        for key, (steps, values) in curves.items():
            axes.plot(steps, values, **_curve_style(key, len(steps)))
        if _has_outliers(np.concatenate([values for _, values in curves.values()])):
            axes.set_yscale("log")
        axes.set_xlabel("Outer step")
        axes.set_ylabel(axis_label(quantity))
    _mark_best(all_axes, panels)
    for axes in all_axes:
        add_legend(axes)
    save(figure, path)


def _has_outliers(values: Array) -> bool:
    """Whether a few values, such as the loss of a validation that diverged, would press all others onto the axis."""
    found = values[np.isfinite(values)]
    return bool(len(found)) and found.min() > 0 and found.max() > 100 * np.median(found)


def adaptation_curve(
    path: Path, curves: Mapping[str, Mapping[int, tuple[float, float]]], *, metric: str, title: str
) -> None:
    """A metric after each inner step, with its 95 % confidence interval.

    Args:
      curves: label -> inner step -> mean and half width of the interval, in order; accuracies are fractions.
      metric: what is measured, as in query_accuracy.
    """
    figure, (axes,) = new_figure(title)
    factor, unit = scale(metric), " %" if is_accuracy(metric) else ""
    styles = zip(CYCLE, "os^Dv", strict=True)
    for (label, curve), (color, marker) in zip(curves.items(), styles, strict=False):
        steps = list(curve)
        mean, half = factor * np.asarray(list(curve.values()), dtype=float).T
        digits = 2 if is_accuracy(metric) else 3
        result = f"{label}: {mean[-1]:.{digits}f} ± {half[-1]:.{digits}f}{unit}"
        axes.fill_between(steps, mean - half, mean + half, color=color, alpha=0.22, linewidth=0)
        axes.plot(steps, mean, color=color, marker=marker, markersize=5, linewidth=1.8, label=result)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Inner step (0: before adaptation)")
    axes.set_ylabel(axis_label(metric))
    add_legend(axes, title="After the last step, with 95 % interval")
    save(figure, path)


def fit_curve(
    path: Path,
    *,
    inputs: Array,
    targets: Array,
    support_inputs: Array,
    support_targets: Array,
    predictions: Mapping[int, Array],
    title: str,
) -> None:
    """One regression task: the true curve, the support points, and what is predicted after some inner steps.

    Args:
      inputs: where the curves are drawn [num_points], ascending.
      targets: the true values there [num_points].
      support_inputs: [num_shots]
      support_targets: [num_shots]
      predictions: inner steps taken -> predicted values [num_points]; 0 is before adaptation.
    """
    figure, (axes,) = new_figure(title)
    axes.plot(inputs, targets, color=SILVER, linewidth=6, solid_capstyle="round", label="True curve")
    colors = iter(CYCLE)
    for steps, values in sorted(predictions.items()):
        if steps == 0:
            axes.plot(inputs, values, color=GREY, linestyle=DASHES, linewidth=1.8, label="Before adaptation")
        else:
            label = f"After {steps} inner step{'s' if steps > 1 else ''}"
            axes.plot(inputs, values, color=next(colors), linewidth=1.8, label=label)
    axes.scatter(support_inputs, support_targets, s=46, color=BLACK, marker="X", zorder=5, label="Support points")
    axes.set_xlabel("Input $x$")
    axes.set_ylabel("Output $y$")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.24 * (high - low))  # room for the legend above the curves
    add_legend(axes, loc="upper center", ncols=2)
    save(figure, path)


# ------------------------------------------------------------------------------------------------ episodes

_CELL = 0.56  # inches
_GAP = 0.14  # share of a cell between two images
_QUERIES_IN_LINE = 15


def episode_sheet(
    path: Path,
    support_images: Array,
    support_labels: Array,
    query_images: Array,
    query_labels: Array,
    predictions: Array,
    *,
    class_names: Sequence[str],
    ink: bool,
    title: str,
) -> None:
    """One classification task: a row for each class, support images left, queries right with what was predicted.

    Each class has a letter. A right prediction has a green frame; a wrong one has a red dashed frame and the letter of
    the predicted class below.

    Args:
      support_images: [num_ways * num_shots, channels, height, width], uint8, or float in [0, 1] (other floats are
        brought there together); 1 channel or 3.
      support_labels: [num_ways * num_shots], from 0.
      query_images: [num_ways * num_queries, channels, height, width]
      query_labels: [num_ways * num_queries]
      predictions: predicted labels [num_ways * num_queries]
      class_names: name of each label.
      ink: the images are strokes, 0 where there is no ink; they are shown dark on light.

    Raises:
      DataError: a number of channels other than 1 and 3.
    """
    support, query = _displayable(support_images, query_images, ink=ink)
    rows: list[tuple[int, Array, Array]] = []  # label, its support, indices of its queries in this line
    for label in range(len(class_names)):
        of_class = np.flatnonzero(query_labels == label)
        for first in range(0, max(len(of_class), 1), _QUERIES_IN_LINE):
            shots = support[support_labels == label] if first == 0 else support[:0]
            rows.append((label, shots, of_class[first : first + _QUERIES_IN_LINE]))
    num_shots = max(len(shots) for _, shots, _ in rows)
    num_queries = max(len(of_line) for _, _, of_line in rows)

    names = 2.6  # cells
    query_left = names + num_shots + 0.5
    width, height = query_left + max(num_queries, 10) + 0.1, 1.6 + 1.3 * len(rows)
    figure = Figure(figsize=(_CELL * width, _CELL * height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    right = np.mean(np.asarray(predictions) == np.asarray(query_labels))
    axes.text(0.2, 0.45, title, fontsize=13, fontweight="bold", color=BLACK, va="center")
    axes.text(names, 1.2, "Support", fontsize=11, color=BLACK, va="center")
    axes.text(query_left, 1.2, f"Query ({100 * right:.1f} % right)", fontsize=11, color=BLACK, va="center")
    _frame_legend(axes, width)
    for number, (label, shots, of_line) in enumerate(rows):
        top = 1.55 + 1.3 * number
        if len(shots):
            axes.text(0.2, top + 0.5, _letter(label), fontsize=15, fontweight="bold", color=BLACK, va="center")
            axes.text(
                0.75, top + 0.5, _folded(class_names[label]), fontsize=8, color=BLACK, va="center", linespacing=1.1
            )
        for column, image in enumerate(shots):
            _draw_image(axes, image, names + column, top, color=GREY, width=0.8)
        for column, index in enumerate(of_line):
            left, prediction = query_left + column, int(predictions[index])
            if prediction == label:
                _draw_image(axes, query[index], left, top, color=GREEN, width=2.4)
            else:
                _draw_image(axes, query[index], left, top, color=VERMILION, width=2.4, dashed=True)
                center = left + (1 - _GAP) / 2
                axes.text(
                    center, top + 1.08, _letter(prediction), fontsize=9.5, fontweight="bold", color=VERMILION,
                    ha="center", va="center",
                )  # fmt: skip
    save(figure, path)


def _displayable(support: Array, query: Array, *, ink: bool) -> tuple[Array, Array]:
    """Both as [num_samples, height, width, 3] in [0, 1]."""
    if support.shape[1] not in (1, 3):
        raise DataError(f"Images of {support.shape[1]} channels cannot be shown; 1 (grey) or 3 (red, green, blue) can.")
    both = np.concatenate([support, query])
    images = both / 255.0 if both.dtype == np.uint8 else both.astype(float)
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        images = (images - low) / (high - low)
    if ink:
        images = 1 - images
    images = np.broadcast_to(images.transpose(0, 2, 3, 1), (*images.shape[:1], *images.shape[2:], 3))
    return images[: len(support)], images[len(support) :]


def _draw_image(
    axes: Axes, image: Array, left: float, top: float, *, color: str, width: float, dashed: bool = False
) -> None:
    size = 1 - _GAP
    axes.imshow(image, extent=(left, left + size, top + size, top), interpolation="antialiased", aspect="auto")
    line = SHORT_DASHES if dashed else "-"
    axes.add_patch(Rectangle((left, top), size, size, fill=False, edgecolor=color, linewidth=width, linestyle=line))


def _frame_legend(axes: Axes, width: float) -> None:
    handles = [
        Line2D([], [], color=GREEN, linewidth=2.4, label="right"),
        Line2D(
            [],
            [],
            color=VERMILION,
            linewidth=2.4,
            linestyle=SHORT_DASHES,
            label="wrong, and the class it was taken for",
        ),
    ]
    axes.legend(
        handles=handles, loc="center right", bbox_to_anchor=(width - 0.1, 1.2), bbox_transform=axes.transData, ncols=2,
        frameon=False, fontsize=9, borderaxespad=0, borderpad=0, columnspacing=1.2, handlelength=1.8,
    )  # fmt: skip


def _letter(label: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    first, second = divmod(label, 26)
    return (string.ascii_uppercase[first - 1] if first else "") + string.ascii_uppercase[second]


def _folded(name: str) -> str:
    """The name in at most three short lines; of a longer one the end is kept, where names of one alphabet differ."""
    words = name.replace("_", " ").replace("/", " / ")
    lines = textwrap.wrap(words, width=13)
    return "\n".join(lines if len(lines) <= 3 else [lines[0], "…", lines[-1]])


# --------------------------------------------------------------------------------------------- conventions


def _curve_style(key: str, num_points: int) -> dict[str, Any]:
    split = key.partition("/")[0]
    name = {"train": "Training", "val": "Validation", "test": "Test"}.get(split, split)
    if key.endswith("_step_0"):
        return {"color": GREY, "linestyle": DASHES, "linewidth": 1.4, "label": f"{name}, before adaptation"}
    if split == "train":
        return {"color": BLUE, "linewidth": 1.2, "alpha": 0.75, "label": name}
    marker = "o" if num_points <= 60 else ""
    return {"color": VERMILION, "linewidth": 1.8, "marker": marker, "markersize": 3.5, "label": name}


def _mark_best(all_axes: Sequence[Axes], panels: Mapping[str, Mapping[str, tuple[Array, Array]]]) -> None:
    """A star at the best validation, and a line through all panels at its step."""
    judged = [(q, key) for q, curves in panels.items() for key in curves if key == f"val/{q}"]
    judged.sort(key=lambda item: not is_accuracy(item[0]))
    if not judged or not np.isfinite(panels[judged[0][0]][judged[0][1]][1]).any():
        return
    quantity, key = judged[0]
    steps, values = panels[quantity][key]
    best = int(np.nanargmax(values) if is_accuracy(quantity) else np.nanargmin(values))
    text = f"{values[best]:.1f} %" if is_accuracy(quantity) else f"{values[best]:.3g}"
    axes = all_axes[list(panels).index(quantity)]
    label = f"Best: {text} at step {steps[best]}"
    axes.plot(steps[best], values[best], "*", color=BLACK, markersize=12, zorder=6, linestyle="none", label=label)
    for panel in all_axes:
        panel.axvline(float(steps[best]), color=BLACK, linewidth=0.8, linestyle=":", zorder=1)
