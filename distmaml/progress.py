"""Says how far a run is: one line that changes on a terminal, a line now and then in a log."""

import json
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from distmaml import paths
from distmaml.config import Config

LOOK_SECONDS = 0.5
LOG_SECONDS = 10.0


class Progress:
    """Shows the progress file that rank 0 writes, from a thread, for the length of a ``with`` block."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._file = config, paths.progress(folder)
        self._end, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)
        self._terminal = sys.stderr.isatty()
        self._shown, self._said = "", 0.0
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> "Progress":
        self._file.unlink(missing_ok=True)  # of an earlier start
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(LOOK_SECONDS)
            try:
                progress = json.loads(self._file.read_text())
            except (OSError, ValueError):
                continue
            self._first = self._first or (time.monotonic(), int(progress["step"]))
            self._show(line(self._config, progress, self._first), last=ended)
        if self._terminal and self._shown:
            print(file=sys.stderr, flush=True)

    def _show(self, text: str, *, last: bool) -> None:
        if text == self._shown or not (self._terminal or last or time.monotonic() - self._said >= LOG_SECONDS):
            return
        print(
            f"\r\x1b[K{text}" if self._terminal else text,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )
        self._shown, self._said = text, time.monotonic()


def line(config: Config, progress: Mapping[str, float], first: tuple[float, int]) -> str:
    """How far a run is, in one line.

    Args:
      progress: the step and the last value of each metric.
      first: when the first progress was seen, as `time.monotonic` has it, and its step.
    """
    total, step = config.outer.num_outer_steps, int(progress["step"])
    words = [f"step {step}/{total}"]
    quantity = config.evaluation.selected_quantity.removeprefix("query_").split("_step_")[0]
    for split in ("train", "val"):
        value = progress.get(f"{split}/query_{quantity}")
        if value is not None:
            words.append(
                f"{split} {quantity} " + (f"{100 * value:.1f} %" if "accuracy" in quantity else f"{value:.4f}")
            )
    if "system/tasks_per_second" in progress:
        words.append(f"{progress['system/tasks_per_second']:.0f} tasks/s")
    seconds, steps = time.monotonic() - first[0], step - first[1]
    if steps > 0 and step < total:
        left = int((total - step) * seconds / steps)
        words.append(f"{left // 60}:{left % 60:02d} left")
    return "  ".join(words)


def say(text: str) -> None:
    """Tells whoever started the command, on standard error."""
    print(text, file=sys.stderr, flush=True)
