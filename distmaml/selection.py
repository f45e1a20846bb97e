"""Which validation of a run was the best so far, and whether it is worth going on: decided alike on every worker."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from distmaml.config import Evaluation
from distmaml.errors import ConfigError


class Selection(NamedTuple):
    """How a run stands.

    Attributes:
      best: the best value of the selection metric; None before the first that is a number.
      stale: validations since then.
    """

    best: float | None = None
    stale: int = 0

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Selection":
        """What a checkpoint's document says, into which `_asdict` was written."""
        return cls(document["best"], document["stale"])

    def after(self, value: float, options: Evaluation) -> "Selection":
        """How the run stands after one more validation. NaN is never the best."""
        sign = 1 if options.selection_mode == "max" else -1
        better = sign * value > (-math.inf if self.best is None else sign * self.best)
        return Selection(value) if better else Selection(self.best, self.stale + 1)

    def is_over(self, options: Evaluation) -> bool:
        """Whether there have been as many validations without a better one as `patience` allows."""
        return options.patience is not None and self.stale >= options.patience


def selected(metrics: Mapping[str, float], options: Evaluation) -> float:
    """The value of the selection metric.

    Raises:
      ConfigError: it is not among the metrics.
    """
    if options.selection_metric not in metrics:
        raise ConfigError(
            f"selection_metric={options.selection_metric!r} is not among the metrics: {', '.join(sorted(metrics))}."
        )
    return metrics[options.selection_metric]


def best_of(stands: Selection, options: Evaluation) -> dict[str, float]:
    """The best value under the metric that it is logged as, "best/query_accuracy"; nothing before there is one."""
    return {} if stands.best is None else {f"best/{options.selected_quantity}": stands.best}
