"""Pictures of a search: where its trials lie, how they came about, and what they cost.

Knows nothing of what a trial is: numbers in, PNG and HTML files out.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from distmaml.files import write_text
from distmaml.pictures.style import BLACK, BLUE, GREY, VERMILION, Array, add_legend, axis_label, new_figure, save, scale

_FEWEST_FOR_A_MAP = 4


def value_map(
    path: Path,
    x: Sequence[float],
    y: Sequence[float],
    values: Sequence[float],
    whole: Sequence[bool],
    *,
    names: tuple[str, str],
    metric: str,
    mode: str,
    title: str,
) -> None:
    """A metric over two fields that were searched on logarithmic axes: a mark for each trial, colours between them.

    Args:
      x: of each trial, positive; likewise `y` and `values`, which are finite.
      whole: whether a trial was trained to its end.
      mode: "max" or "min": which of the values is marked as the best.
    """
    figure, (axes,) = new_figure(title)
    across, along = np.log10(x), np.log10(y)
    shown = scale(metric) * np.asarray(values, dtype=float)
    low, high = np.percentile(shown, [10, 100] if mode == "max" else [0, 90])  # what went astray would take all colours
    levels = np.linspace(low, high if high > low else low + 1e-9, 12)
    colours: dict[str, Any] = {
        "cmap": "viridis" if mode == "max" else "viridis_r",
        "vmin": levels[0],
        "vmax": levels[-1],
    }
    if _spans_an_area(np.column_stack([across, along])):
        axes.tricontourf(across, along, np.clip(shown, levels[0], levels[-1]), levels=levels, alpha=0.55, **colours)
    ended = np.asarray(whole)
    for chosen, marker, size, label in ((ended, "o", 70, "Trained to the end"), (~ended, "v", 40, "Pruned")):
        if chosen.any():
            style: dict[str, Any] = {
                "marker": marker,
                "s": size,
                "edgecolors": BLACK,
                "linewidths": 0.8,
                "zorder": 3,
                "label": label,
            }
            axes.scatter(across[chosen], along[chosen], c=shown[chosen], **style, **colours)
    best = int(np.argmax(shown) if mode == "max" else np.argmin(shown))
    star: dict[str, Any] = {
        "color": VERMILION,
        "markersize": 17,
        "markeredgecolor": "white",
        "linestyle": "none",
        "zorder": 4,
    }
    axes.plot(across[best], along[best], "*", label=f"Best: {shown[best]:.4g}", **star)
    axes.use_sticky_edges = False  # of the coloured area, on which marks would be cut in two
    axes.margins(0.06)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda power, _: f"{10**power:.2g}")
    add_legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.colorbar(
        ScalarMappable(Normalize(levels[0], levels[-1]), colours["cmap"]), ax=axes, label=axis_label(metric)
    )
    save(figure, path)


def _spans_an_area(points: Array) -> bool:
    return len(np.unique(points, axis=0)) >= _FEWEST_FOR_A_MAP and np.linalg.matrix_rank(points - points[0]) == 2


def best_so_far(
    path: Path, steps: Sequence[int], values: Sequence[float], *, metric: str, mode: str, title: str
) -> None:
    """The best value over the outer steps that all trials together had done.

    Args:
      steps: done by all trials when a value came, in the order in which they came.
      values: as they came; some may be NaN.
    """
    figure, (axes,) = new_figure(title)
    shown = scale(metric) * np.asarray(values, dtype=float)
    best = np.fmax.accumulate(shown) if mode == "max" else np.fmin.accumulate(shown)
    axes.plot(steps, shown, ".", color=GREY, markersize=4, label="A validation of a trial")
    axes.step(steps, best, where="post", color=BLUE, linewidth=2, label="Best so far")
    known = best[np.isfinite(best)]
    if len(known):  # what is far worse than the first best tells nothing
        first, last = known[0], known[-1]
        margin = 0.1 * abs(last - first) or 0.05 * abs(last) or 1.0
        axes.set_ylim(min(first, last) - margin, max(first, last) + margin)
    axes.set_xlabel("Outer steps of all trials")
    axes.set_ylabel(axis_label(metric))
    add_legend(axes, loc="lower right" if mode == "max" else "upper right")  # where the curve does not go
    save(figure, path)


def budget(path: Path, steps: Sequence[int], *, most: int, rungs: Sequence[int], title: str) -> None:
    """How many outer steps each trial got, the longest first, and where the rungs lie.

    Args:
      steps: of each trial.
      most: of a whole trial.
    """
    figure, (axes,) = new_figure(title)
    lengths = np.sort(np.asarray(steps))[::-1]
    axes.bar(np.arange(len(lengths)), lengths, color=BLUE, width=0.85)
    for number, rung in enumerate(rungs):
        label = "Rung" if number == 0 else None
        axes.axhline(rung, color=VERMILION, linewidth=1, linestyle="--", label=label)
    share = lengths.sum() / (most * len(lengths))
    axes.set_xlabel(f"{len(lengths)} trials: {lengths.sum()} outer steps, {share:.0%} of training all to the end")
    axes.set_ylabel("Outer steps")
    axes.set_xticks([])
    if len(rungs):
        axes.set_yscale("log")
        axes.set_yticks([*rungs, most], labels=[str(step) for step in (*rungs, most)])
        axes.minorticks_off()
        add_legend(axes)
    save(figure, path)


def schedules(
    path: Path,
    curves: Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]],
    values: Sequence[float],
    *,
    logarithmic: Collection[str],
    metric: str,
    mode: str,
    title: str,
) -> None:
    """How fields changed in the course of the trials, a panel for each field and a line for each trial.

    Args:
      curves: field -> for each trial, outer steps and the value from each of them to the next.
      values: of the metric in each trial, finite; they colour the lines.
      logarithmic: fields whose axis is.
    """
    figure, panels = new_figure(title, num_panels=len(curves))
    shown = scale(metric) * np.asarray(values, dtype=float)
    colours = ScalarMappable(Normalize(shown.min(), shown.max()), "viridis" if mode == "max" else "viridis_r")
    best = int(np.argmax(shown) if mode == "max" else np.argmin(shown))
    for axes, (field, lines) in zip(panels, curves.items(), strict=True):
        for number, (steps, line) in enumerate(lines):
            style: dict[str, Any] = {"color": colours.to_rgba(shown[number]), "linewidth": 1.5}
            if number == best:
                style = {"color": VERMILION, "linewidth": 2.5, "zorder": 3, "label": f"Best: {shown[best]:.4g}"}
            axes.step(steps, line, where="post", **style)
        if field in logarithmic:
            axes.set_yscale("log")
        axes.set_xlabel("Outer step")
        axes.set_ylabel(field)
    add_legend(panels[-1])
    figure.colorbar(colours, ax=panels[-1], label=axis_label(metric))
    save(figure, path)


def parallel_coordinates(
    path: Path, columns: Mapping[str, Sequence[Any]], values: Sequence[float], *, metric: str, mode: str, title: str
) -> None:
    """An HTML page that needs no network: a line for each trial through its values, coloured by the metric.

    Args:
      columns: field -> its value in each trial; numbers, or anything else as categories. Names that begin with log10_
        hold logarithms.
      values: of the metric in each trial, finite.
    """
    import plotly.graph_objects as go

    shown = [scale(metric) * value for value in values]
    dimensions = [_dimension(name, list(column)) for name, column in columns.items()]
    lines = {"color": shown, "colorscale": "Viridis", "reversescale": mode == "min", "showscale": True}
    axis = {"label": axis_label(metric), "values": shown}
    figure = go.Figure(go.Parcoords(line=lines, dimensions=[*dimensions, axis]))
    figure.update_layout(title=title, margin={"l": 90, "r": 60, "t": 90, "b": 40})
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))


def _dimension(name: str, column: list[Any]) -> dict[str, Any]:
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
        return {"label": name, "values": column}
    kinds = sorted(set(map(str, column)))
    return {
        "label": name,
        "values": [kinds.index(str(value)) for value in column],
        "tickvals": list(range(len(kinds))),
        "ticktext": kinds,
    }
