"""What a search has found: the best of its trials, a table of them, and pictures."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distmaml.config import Config, Evaluation
from distmaml.journal import History, Journal
from distmaml.space import Search, Space, first_rung


def best_of(trials: Sequence[History], mode: str) -> History | None:
    """The trial with the best value of the selection metric; the first of equals, and none of those that failed."""
    sign = 1 if mode == "max" else -1
    found: History | None = None
    for trial in sorted(trials, key=lambda trial: trial.number):
        value = trial.best(mode)
        if trial.state == "failed" or value is None:
            continue
        known = None if found is None else found.best(mode)
        if known is None or sign * value > sign * known:
            found = trial
    return found


def table(trials: Sequence[History], evaluation: Evaluation, *, most: int | None = None) -> str:
    """The trials from the best on, a row each.

    Args:
      most: rows; those that are running stay, whatever their rank.
    """
    mode = evaluation.selection_mode
    sign = -1 if mode == "max" else 1

    def rank(trial: History) -> tuple[bool, bool, float, int]:
        value = trial.best(mode)
        return trial.state == "failed", value is None, 0.0 if value is None else sign * value, trial.number

    rows = sorted(trials, key=rank)
    if most is not None and len(rows) > most:
        running = [trial for trial in rows if trial.state == "running"]
        rest = [trial for trial in rows if trial.state != "running"]
        rows = sorted([*running, *rest[: max(most - len(running), 0)]], key=rank)
    fields = list(dict.fromkeys(field for trial in trials for field in trial.values))
    head = ["trial", *fields, "step", evaluation.selected_quantity, "state"]
    body = [
        [
            f"{trial.number:03d}",
            *(text(trial.best_values(mode).get(field, "")) for field in fields),
            str(trial.step),
            shown(evaluation, trial.best(mode)),
            state(trial),
        ]
        for trial in rows
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *body]
    )


def shown(evaluation: Evaluation, value: float | None) -> str:
    """A value of the selection metric, as people read it."""
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if "accuracy" in evaluation.selected_quantity else f"{value:.4f}"


def state(trial: History) -> str:
    """How a trial stands, in words."""
    return f"{trial.state} at {trial.step}" if trial.state in ("pruned", "lost") else trial.state


def text(value: Any) -> str:
    """A value of a field, as people read it."""
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def draw(folder: Path, config: Config, search: Search, chosen: Space, journal: Journal) -> Iterator[Path]:
    """Draws a search: its trials over the learning rates, in parallel coordinates, and what they cost; yields files."""
    from distmaml.pictures import searches as pictures  # with matplotlib, which no trial needs

    evaluation, title = config.evaluation, config.run.name or ""
    metric, mode = evaluation.selected_quantity, evaluation.selection_mode
    known = [(trial, trial.best_values(mode), trial.best(mode)) for trial in journal.trials.values()]
    judged = [(trial, tried, value) for trial, tried, value in known
              if trial.state != "failed" and value is not None and math.isfinite(value)]  # fmt: skip
    trials, values = [trial for trial, *_ in judged], [value for *_, value in judged]
    columns = {
        field: [math.log10(tried[field]) if domain.kind == "log" else tried[field] for _, tried, _ in judged]
        for field, domain in chosen.items()
    }
    logarithmic = [field for field, domain in chosen.items() if domain.kind == "log"]
    if {"inner_lr", "outer_lr"} <= chosen.keys():
        x, y = ([float(tried[rate]) for _, tried, _ in judged] for rate in ("inner_lr", "outer_lr"))
        whole = [trial.state != "pruned" for trial in trials]
        names = ("inner_lr", "outer_lr")
        file = folder / "learning_rates.png"
        pictures.value_map(file, x, y, values, whole, names=names, metric=metric, mode=mode, title=title)
        yield file
    file = folder / "parallel_coordinates.html"
    axes = {f"log10_{field}" if field in logarithmic else field: column for field, column in columns.items()}
    pictures.parallel_coordinates(file, axes, values, metric=metric, mode=mode, title=title)
    yield file
    done: dict[int, int] = {}
    totals = []
    for number, step, _ in journal.results:
        done[number] = step
        totals.append(sum(done.values()))
    file = folder / "best_so_far.png"
    pictures.best_so_far(file, totals, [v for *_, v in journal.results], metric=metric, mode=mode, title=title)
    yield file
    most, rungs = config.outer.num_outer_steps, []
    if search.scheduler == "asha":
        rung = first_rung(search, config)
        while rung < most:
            rungs.append(rung)
            rung *= search.reduction_factor
    file = folder / "budget.png"
    steps = [trial.step for trial in journal.trials.values()]
    pictures.budget(file, steps, most=most, rungs=rungs, title=title)
    yield file
    if any(journal.moves.values()) and judged:
        file = folder / "population.png"
        curves = {field: [_schedule(trial, field) for trial in trials] for field in chosen}
        pictures.schedules(file, curves, values, logarithmic=logarithmic, metric=metric, mode=mode, title=title)
        yield file


def _schedule(trial: History, field: str) -> tuple[list[int], list[float]]:
    """The outer steps at which a trial got a value, and its end; and the value from each on."""
    ends = [0, *(until for until, _ in trial.earlier), trial.step]
    values = [*(values[field] for _, values in trial.earlier), trial.values[field]]
    return ends, [*values, values[-1]]
