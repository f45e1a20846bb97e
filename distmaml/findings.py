"""What a search has found: the best of its trials, a table of them, and pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distmaml.config import Config, Evaluation
from distmaml.journal import History, Journal
from distmaml.pictures import searches as pictures
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
            *(text(trial.values.get(field, "")) for field in fields),
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
    return f"pruned at {trial.step}" if trial.state == "pruned" else trial.state


def text(value: Any) -> str:
    """A value of a field, as people read it."""
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def draw(folder: Path, config: Config, search: Search, chosen: Space, journal: Journal) -> list[Path]:
    """The pictures of a search: its trials over the learning rates, in parallel coordinates, and what they cost."""
    evaluation, title = config.evaluation, config.run.name or ""
    metric, mode = evaluation.selected_quantity, evaluation.selection_mode
    judged = [(trial, value) for trial in journal.trials.values() if (value := trial.best(mode)) is not None]
    judged = [(trial, value) for trial, value in judged if math.isfinite(value) and trial.state != "failed"]
    values = [value for _, value in judged]
    files = []
    rates = [field for field in ("inner_lr", "outer_lr") if field in chosen]
    if len(rates) == 2:
        x, y = ([float(trial.values[rate]) for trial, _ in judged] for rate in rates)
        files.append(folder / "learning_rates.png")
        whole = [trial.state != "pruned" for trial, _ in judged]
        names = (rates[0], rates[1])
        pictures.value_map(files[-1], x, y, values, whole, names=names, metric=metric, mode=mode, title=title)
    columns = {
        f"log10_{field}" if domain.kind == "log" else field: [
            math.log10(trial.values[field]) if domain.kind == "log" else trial.values[field] for trial, _ in judged
        ]
        for field, domain in chosen.items()
    }
    files.append(folder / "parallel_coordinates.html")
    pictures.parallel_coordinates(files[-1], columns, values, metric=metric, mode=mode, title=title)
    done: dict[int, int] = {}
    totals = []
    for number, step, _ in journal.results:
        done[number] = step
        totals.append(sum(done.values()))
    files.append(folder / "best_so_far.png")
    pictures.best_so_far(files[-1], totals, [v for *_, v in journal.results], metric=metric, mode=mode, title=title)
    most, rungs = config.outer.num_outer_steps, []
    if search.scheduler == "asha":
        rung = first_rung(search, config)
        while rung < most:
            rungs.append(rung)
            rung *= search.reduction_factor
    files.append(folder / "budget.png")
    steps = [trial.step for trial in journal.trials.values()]
    pictures.budget(files[-1], steps, most=most, rungs=rungs, title=title)
    if any(journal.moves.values()) and judged:
        files.append(folder / "population.png")
        curves = {field: [_schedule(journal, trial, field) for trial, _ in judged] for field in chosen}
        logarithmic = [field for field, domain in chosen.items() if domain.kind == "log"]
        pictures.schedules(files[-1], curves, values, logarithmic=logarithmic, metric=metric, mode=mode, title=title)
    return files


def _schedule(journal: Journal, trial: History, field: str) -> tuple[list[int], list[float]]:
    """The outer steps at which a trial got a value, and its end; and the value from each on."""
    moved = [(step, move.values[field]) for step, moves in journal.moves.items() for move in moves
             if move.trial == trial.number]  # fmt: skip
    points = [(0, trial.first_values[field]), *moved, (trial.step, trial.values[field])]
    return [step for step, _ in points], [value for _, value in points]
