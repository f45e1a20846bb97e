"""Shows the trials of a search: a table that changes on a terminal, a line for each trial that ends in a log."""

import shutil
import sys
import time
from collections.abc import Sequence

from distmaml import findings
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
            lines = findings.table(
                trials, self._evaluation, most=max(shutil.get_terminal_size().lines - 4, 5)
            ).splitlines()
            width = shutil.get_terminal_size().columns
            up = f"\x1b[{self._height}F\x1b[J" if self._height else ""
            text = "\n".join(line[:width] for line in [*lines, self._summary(trials)])
            self._height = len(lines) + 1
            print(up + text, file=sys.stderr, flush=True)
        elif ended is not None:
            self._say(f"trial {ended.number:03d} {findings.state(ended)}: {_cells(ended, self._evaluation)}")
            self._say(self._summary(trials))
        elif time.monotonic() - self._said >= LOG_SECONDS:
            self._say(self._summary(trials))

    def tell(self, text: str) -> None:
        """Adds a line to a log; on a terminal the table shows what has changed."""
        if not self._terminal:
            self._say(text)

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def _summary(self, trials: Sequence[History]) -> str:
        over = sum(trial.state != "running" for trial in trials)
        steps = sum(trial.step for trial in trials)
        words = [f"{over}/{self._num_trials} trials", f"{steps} of {self._num_trials * self._num_steps} outer steps"]
        best = findings.best_of(trials, self._evaluation.selection_mode)
        if best is not None:
            value = best.best(self._evaluation.selection_mode)
            words.append(f"best {findings.shown(self._evaluation, value)} (trial {best.number:03d})")
        return "  ".join(words)


def _cells(trial: History, evaluation: Evaluation) -> str:
    mode = evaluation.selection_mode
    words = [f"{field}={findings.text(value)}" for field, value in trial.best_values(mode).items()]
    words.append(f"{evaluation.selected_quantity} {findings.shown(evaluation, trial.best(mode))}")
    return "  ".join([*words, *([trial.reason] if trial.reason else [])])
