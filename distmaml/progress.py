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
        self._text, self._shown, self._said = "", "", 0.0
        self._testing = False
        self._first: tuple[float, float] | None = None

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
            self._follow(progress, last=ended)
        if self._terminal and self._shown:
            print(file=sys.stderr, flush=True)

    def _follow(self, progress: Mapping[str, float], *, last: bool) -> None:
        if self._testing != ("tested" in progress):
            self._show(self._text, last=True)  # the last of the training
            if self._terminal:
                print(file=sys.stderr)
            self._testing, self._first, self._said = not self._testing, None, time.monotonic()
        self._first = self._first or (time.monotonic(), progress.get("tested", progress["step"]))
        self._text = line(self._config, progress, self._first)
        self._show(self._text, last=last and not self._testing)

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


def line(config: Config, progress: Mapping[str, float], first: tuple[float, float]) -> str:
    """How far a run is, in one line: its training or its test.

    Args:
      progress: the step and the last value of each metric; in the test, the share of it that is "tested".
      first: when the first progress of the kind was seen, as `time.monotonic` has it, and its step or share.
    """
    if "tested" in progress:
        return "  ".join([f"test {100 * progress['tested']:.0f} %", *_left(progress["tested"], 1.0, first)])
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
    return "  ".join([*words, *_left(step, total, first)])


def _left(done: float, total: float, first: tuple[float, float]) -> list[str]:
    """How long it will take, where that can be said."""
    seconds, gained = time.monotonic() - first[0], done - first[1]
    if not gained > 0 or done >= total:
        return []
    left = int((total - done) * seconds / gained)
    return [f"{left // 60}:{left % 60:02d} left"]


def say(text: str) -> None:
    """Tells whoever started the command, on standard error."""
    print(text, file=sys.stderr, flush=True)
