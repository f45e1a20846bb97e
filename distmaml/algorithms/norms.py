"""Batch norms that are others at each inner step: their scale and shift, and the running statistics of their inputs.

The model stays as it is: a scale or shift of its own for each step is a choice of what to call the model with. Running
statistics are seen by hooks on its batch norms, and go to them as the buffers that they would have.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from distmaml.errors import ConfigError
from distmaml.inner import Params
from distmaml.objectives import Hook, Moment, Objective
from distmaml.trees import Tree, tree_map

Statistics: TypeAlias = dict[str, dict[str, Tensor]]
"""For each batch norm ``{"mean": ..., "variance": ...}``, each ``[channels]``; with a row a step where said so."""

MOMENTUM = 0.1
"""What one step's statistics count in the running ones, as torch's batch norms have it."""


class Norms:
    """The batch norms of a model.

    Attributes:
      parameters: names of the scales and shifts that are learned for each inner step; none without `biases`.

    Raises:
      ConfigError: there is none.
    """

    def __init__(self, objective: Objective, *, biases: bool, statistics: bool) -> None:
        self._objective = objective
        self._norms = {
            name: module
            for name, module in objective.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }
        found = [f"{name}.{kind}" for name, norm in self._norms.items() for kind, _ in norm.named_parameters()]
        self.parameters = tuple(found) if biases else ()
        for wanted, switch, missing in (
            (biases, "per_step_biases", not found),
            (statistics, "per_step_statistics", not self._norms),
        ):
            if wanted and missing:
                raise ConfigError(
                    f"{switch} of maml_plus_plus is for batch norms, and the model has none"
                    f"{' with a scale and a shift' if self._norms else ''}: it is a {type(objective.model).__name__}. "
                    f"Set --no-{switch.replace('_', '-')}, or take a model with batch norm, like conv4."
                )

    def first_statistics(self, params: Params, num_rows: int) -> Statistics:
        """A row for each inner step, before any has been seen."""
        like = next(iter(params.values()))
        return {
            name: {
                "mean": like.new_zeros(num_rows, norm.num_features),
                "variance": like.new_ones(num_rows, norm.num_features),
            }
            for name, norm in self._norms.items()
        }

    def observe(self, params: Params, inputs: Tree, moment: Moment) -> Statistics:
        """The statistics of what each batch norm gets when the model is called."""
        seen: Statistics = {}

        def looks(name: str) -> Hook:
            def look(norm: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
                maps = arguments[0]
                dims = [0, *range(2, maps.ndim)]
                seen[name] = {"mean": maps.mean(dims), "variance": maps.var(dims)}

            return look

        self._objective.predict_hooked(params, inputs, moment, {name: looks(name) for name in self._norms})
        return seen

    def averaged(self, statistics: Statistics, seen: Sequence[Statistics]) -> Statistics:
        """The running statistics, a row a step, after one more of each was seen."""
        stacked = tree_map(lambda *rows: torch.stack(rows), *seen)
        averaged: Statistics = tree_map(lambda old, new: (1 - MOMENTUM) * old + MOMENTUM * new, statistics, stacked)
        return averaged

    def predict(self, params: Params, statistics: Statistics, inputs: Tree) -> Any:
        """What the model says when its batch norms take these statistics for those of the batch."""
        # A batch norm that has them, and is not in training, uses them.
        buffers = {
            f"{name}.{buffer}": statistics[name][kind]
            for name in self._norms
            for buffer, kind in (("running_mean", "mean"), ("running_var", "variance"))
        }
        return self._objective.predict({**params, **buffers}, inputs, Moment(0, None))
