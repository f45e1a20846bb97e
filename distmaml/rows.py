"""A row: one training run beside what its paper prints."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from scipy.special import stdtrit

from distmaml.published import Published

Figure: TypeAlias = dict[str, float | None]
"""mean and half_width of its 95 % interval; None where a number is not finite."""


@dataclass(frozen=True)
class Row:
    """One training run beside what its paper prints."""

    name: str
    """That of the run and of the file."""
    recipe: str
    algorithm: str
    """With what the recipe's name has beside it: "imaml-hf"."""
    setting: str
    """Data, ways and shots."""
    command: str
    """What made it."""
    overrides: dict[str, Any]
    """Fields that decide the figures and that `--set` gave, be it the recipe's own value."""
    schedules: dict[str, list[int]]
    """Fields that count outer steps, which shrink with them: the recipe's value and that of the run."""
    seed: int
    tasks: int
    """Tasks that were asked for."""
    outer_steps: int
    """Outer steps that were done."""
    share_of_paper: float | None
    """Tasks that were trained on, as a fraction of the protocol's; see `Published.num_outer_steps`."""
    chosen_step: int
    """Outer step of the model that was tested: the best in validation."""
    published: Published | None
    unit: Literal["percent", "mean squared error"]
    """Of the published value and of all of ours."""
    inner_steps: int
    """Inner steps in the test."""
    transductive: Figure
    inductive: Figure | None
    num_test_episodes: int
    query_loss: dict[str, Figure]
    """For a regression, after 1, 5 and 10 inner steps, as far as there are so many."""
    validation: Sequence[tuple[int, float | None]]
    """Outer step and value of each validation."""
    still_rose: float | None
    """How much better the last validation was than the last one of the first two thirds of the outer steps."""
    minutes: float
    """By the clock: from the start of Ray to the last picture, over all starts of the run."""
    cpu_seconds: float
    """For training and validation, of all workers."""
    num_workers: int
    commit: str | None
    dataset: dict[str, Any] | None
    """What identifies the data, with the hash of their division."""
    date: str
    machine: dict[str, Any]
    """Its gpu is the model that computed, or None."""
    config: dict[str, Any]
    """Everything else that decides the figures."""

    @property
    def kind(self) -> tuple[str, int, str, int]:
        """What seeds of the same row have in common."""
        return self.recipe, self.tasks, json.dumps(self.overrides, sort_keys=True), self.num_test_episodes


def share_of_protocol(published: Published | None, outer_steps: int, meta_batch_size: int) -> float | None:
    """Tasks that were trained on, as a fraction of those of the published protocol; None where there is none."""
    if published is None:
        return None
    return outer_steps * meta_batch_size / (published.num_outer_steps * published.meta_batch_size)


def mean_of_seeds(figures: Sequence[Figure | None]) -> Figure | None:
    """The mean of the means of N seeds, with ``t * s / sqrt(N)``; None where a seed has no such figure.

    t is Student's for 95 % with N - 1 degrees of freedom: 12.7 for two seeds, 4.3 for three.
    """
    found = [figure["mean"] for figure in figures if figure is not None]
    means = [mean for mean in found if mean is not None]
    if len(found) < len(figures):
        return None
    if len(means) < len(figures):
        return {"mean": None, "half_width": None}
    t = float(stdtrit(len(means) - 1, 0.975))
    return {"mean": statistics.mean(means), "half_width": t * statistics.stdev(means) / math.sqrt(len(means))}
