"""Shows the trials of a search: a table that changes on a terminal, a line for each trial that ends in a log."""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from distmaml.config import Evaluation
from distmaml.journal import History

LOG_SECONDS = 30.0


class Board:
    """The trials as their journal has them.

    Args:
      num_trials: of the whole search.
      num_steps: outer steps of a whole trial.
    """

    def __init__(self, evaluation: Evaluation, *, num_trials: int, num_steps: int) -> None:
        self._evaluation, self._num_trials, self._num_steps = evaluation, num_trials, num_steps
        self._terminal = sys.stderr.isatty()
        self._height, self._said = 0, time.monotonic()

    def show(self, trials: Sequence[History], *, ended: History | None = None) -> None:
        """Shows how they stand; call it whenever one of them changes.

        Args:
          ended: the trial that has just ended, if one has.
        """
        if self._terminal:
            lines = table(trials, self._evaluation, most=max(shutil.get_terminal_size().lines - 4, 5)).splitlines()
            width = shutil.get_terminal_size().columns
            up = f"\x1b[{self._height}F\x1b[J" if self._height else ""
            text = "\n".join(line[:width] for line in [*lines, self._summary(trials)])
            self._height = len(lines) + 1
            print(up + text, file=sys.stderr, flush=True)
        elif ended is not None:
            self._say(f"trial {ended.number:03d} {_state(ended)}: {_cells(ended, self._evaluation)}")
            self._say(self._summary(trials))
        elif time.monotonic() - self._said >= LOG_SECONDS:
            self._say(self._summary(trials))

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def _summary(self, trials: Sequence[History]) -> str:
        over = sum(trial.state != "running" for trial in trials)
        steps = sum(trial.step for trial in trials)
        words = [f"{over}/{self._num_trials} trials", f"{steps} of {self._num_trials * self._num_steps} outer steps"]
        best = best_of(trials, self._evaluation.selection_mode)
        if best is not None:
            value = best.best(self._evaluation.selection_mode)
            words.append(f"best {shown(self._evaluation, value)} (trial {best.number:03d})")
        return "  ".join(words)


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
            *(_text(trial.values.get(field, "")) for field in fields),
            str(trial.step),
            shown(evaluation, trial.best(mode)),
            _state(trial),
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


def _cells(trial: History, evaluation: Evaluation) -> str:
    words = [f"{field}={_text(value)}" for field, value in trial.values.items()]
    words.append(f"{evaluation.selected_quantity} {shown(evaluation, trial.best(evaluation.selection_mode))}")
    return "  ".join([*words, *([trial.reason] if trial.reason else [])])


def _state(trial: History) -> str:
    return f"pruned at {trial.step}" if trial.state == "pruned" else trial.state


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
