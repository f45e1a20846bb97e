"""Sine waves that come slowly and leave a trace, so that there is time to break something, and to see what it cost."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from distmaml.episodes import TaskBatch
from distmaml.tasks.sinusoid import SinusoidTasks


class TracedWaves(SinusoidTasks):
    """Tasks that write a line whenever some of them are sampled for training.

    Args:
      pace: seconds that it takes to sample.
      trace: a file; lines of time, process and index of the first task.
    """

    def __init__(self, *, split: str, seed: int, pace: float = 0.0, trace: str = "") -> None:
        super().__init__(split=split, seed=seed, num_shots=5, num_queries=5)
        self.pace, self.trace = pace, trace

    def sample(self, indices: Sequence[int]) -> TaskBatch:
        """The tasks, after a while."""
        if self.split == "train" and self.trace and indices[0] > 0:  # the first also show what tasks look like
            time.sleep(self.pace)
            with Path(self.trace).open("a") as file:
                file.write(f"{time.time()} {os.getpid()} {indices[0]}\n")
        return super().sample(indices)
