"""The result of a training run, for use without Ray: adapt to a handful of examples, then predict.

model = distmaml.load("model.safetensors")
adapted = model.adapt(Batch(images, labels))
probabilities = adapted.predict(new_images)
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distmaml import build, checkpoint, paths
from distmaml.algorithms import Algorithm
from distmaml.config import Config, from_json, is_custom
from distmaml.datasets.images import read_image
from distmaml.episodes import Batch
from distmaml.errors import CheckpointError, ConfigError, DataError, first_line
from distmaml.files import absolute
from distmaml.inner import hvp_mode
from distmaml.limits import check
from distmaml.objectives import Objective
from distmaml.options import ImageTaskOptions
from distmaml.outer import load_meta_params
from distmaml.scoring import predict_one_by_one


class FewShotModel:
    """A meta-trained model, not yet adapted to any task.

    Attributes:
      config: how it was trained.
      num_outputs: ways of its tasks, or values of its regression target.
    """

    def __init__(self, config: Config, shapes: build.Shapes, learner: build.Learner, ink: bool) -> None:
        self.config, self.num_outputs = config, shapes.num_outputs
        self._shapes, self._learner, self._ink = shapes, learner, ink

    def adapt(self, support: Batch, num_steps: int | None = None) -> "AdaptedModel":
        """Adapts to one task.

        Args:
          support: inputs ``[num_samples, *input_shape]`` and targets; labels are ``[num_samples]`` in
            [0, num_outputs). Any number of shots will do.
          num_steps: inner steps; as many as in the evaluation of the run by default.

        Raises:
          DataError: inputs of another shape, labels out of range.
          ConfigError: a negative number of steps.
        """
        inputs, targets = self._inputs(support.inputs), _tensor(support.targets, "targets")
        if targets.dim() == 0 or len(inputs) != len(targets) or not len(targets):
            raise DataError(
                f"{len(inputs)} support inputs and targets of shape {list(targets.shape)}; there must be equally "
                "many, 1 or more."
            )
        if self.config.objective == "classification":
            whole = targets.dim() == 1 and not targets.is_floating_point()
            if not whole or int(targets.min()) < 0 or int(targets.max()) >= self.num_outputs:
                raise DataError(
                    f"labels from {targets.min().item()} to {targets.max().item()}: this model tells "
                    f"{self.num_outputs} classes apart, so labels must be whole numbers in [0, {self.num_outputs})."
                )
            targets = targets.long()
        elif targets.is_floating_point() or self.config.objective == "regression":
            targets = targets.to(getattr(torch, self.config.outer.dtype))
        steps = self.config.evaluation.num_eval_steps if num_steps is None else num_steps
        if steps < 0:
            raise ConfigError(f"num_steps={steps} must be 0 or more.")
        algorithm, meta_params = self._learner.algorithm, self._learner.meta_params
        # One task needs no engine that lays many side by side, and this one knows all operators.
        with torch.no_grad(), hvp_mode("graph"):
            state = algorithm.adapt(meta_params, Batch(inputs, targets), num_steps=steps)[-1]
        return AdaptedModel(self, state, inputs, targets)

    def read_pictures(self, files: Sequence[str | Path]) -> Tensor:
        """Pictures as this model's inputs, ``[num_files, channels, height, width]`` in [0, 1].

        They are read as its training data were: resized, and for drawings inverted, so that dark ink on light paper is
        what the model knows.

        Raises:
          ConfigError: the model does not see images.
          DataError: a file that is no picture, named; no file at all.
        """
        options = self.config.task_options
        if not isinstance(options, ImageTaskOptions):
            raise ConfigError(f"this model was trained on {self.config.tasks!r}, not on images.")
        if not files:
            raise DataError("no pictures to read; give one file or more.")
        channels, height, _ = self._shapes.input_shape
        images = [read_image(Path(file), image_size=height, color=channels == 3, ink=self._ink) for file in files]
        return torch.from_numpy(np.stack(images)).to(torch.float32) / 255

    def _inputs(self, inputs: Any) -> Tensor:
        tensor = _tensor(inputs, "inputs")
        if self._shapes.input_shape and tuple(tensor.shape[1:]) != self._shapes.input_shape:
            raise DataError(
                f"inputs of shape {list(tensor.shape)}; this model takes [num_samples, "
                f"{', '.join(map(str, self._shapes.input_shape))}]."
            )
        if isinstance(self.config.task_options, ImageTaskOptions) and tensor.numel():
            low, high = float(tensor.min()), float(tensor.max())
            if not tensor.is_floating_point() or not (low >= 0 and high <= 1):
                raise DataError(
                    f"images of type {tensor.dtype} from {low:g} to {high:g}; this model takes floats in "
                    "[0, 1]: divide by 255."
                )
        return tensor.to(getattr(torch, self.config.outer.dtype)) if tensor.is_floating_point() else tensor


class AdaptedModel:
    """A model that knows its task."""

    def __init__(self, model: FewShotModel, state: Any, support_inputs: Tensor, support_targets: Tensor) -> None:
        self._model, self._state = model, state
        self._support_inputs, self._support_targets = support_inputs, support_targets

    def predict(self, query: Any, *, transductive: bool = False) -> Tensor:
        """Class probabilities ``[num_samples, num_outputs]``, for a regression values, else what the objective says.

        A class that the support set does not show has the probability 0.

        Args:
          query: inputs ``[num_samples, *input_shape]``.
          transductive: predict all queries at once. A model with batch statistics then profits from the others, as
            in the figures of the MAML papers, but its answer depends on what else is asked. By default each
            query is predicted with the support set alone.

        Raises:
          DataError: inputs of another shape or range.
        """
        inputs, learner = self._model._inputs(query), self._model._learner
        algorithm, meta_params = learner.algorithm, learner.meta_params
        predicted: Tensor
        with torch.no_grad():
            if transductive and len(inputs):
                predicted = algorithm.predict(meta_params, self._state, inputs)
            else:
                predicted = predict_one_by_one(algorithm, meta_params, self._state, self._support_inputs, inputs)
        if self._model.config.objective != "classification":
            return predicted
        absent = torch.ones(self._model.num_outputs, dtype=torch.bool)
        absent[self._support_targets] = False
        return predicted.masked_fill(absent, -torch.inf).softmax(-1)


def _tensor(values: Any, what: str) -> Tensor:
    try:
        return (
            torch.stack(list(values)) if isinstance(values, list) and _are_tensors(values) else torch.as_tensor(values)
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"the {what} are no tensor ({first_line(error)}); make them one array.") from error


def _are_tensors(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def load(
    path: str | Path,
    *,
    model: Callable[[], nn.Module] | None = None,
    objective: Callable[[nn.Module], Objective] | None = None,
    algorithm: Callable[..., Algorithm] | None = None,
) -> FewShotModel:
    """Reads the model that a training run wrote, onto the CPU.

    No code is run that the file names, and nothing is unpickled.

    Args:
      path: ``model.safetensors``, or the folder of a run.
      model: makes the module, for a run whose model was a user's own ``package.module:attribute``.
      objective: likewise, ``module -> Objective``.
      algorithm: likewise, ``(objective, **options) -> Algorithm``.

    Raises:
      CheckpointError: a damaged or foreign file.
      ConfigError: the run used code of its own that is not given here.
    """
    file = absolute(Path(path))
    tensors, document = checkpoint.load(paths.model(file) if file.is_dir() else file)
    if any(name.startswith(("optimizer/", "meta_params/")) for name in tensors):
        raise CheckpointError(f"{file} is a checkpoint but not a model: take the run's model.safetensors.")
    try:
        config = from_json(document["config"])
        check(config)
    except ConfigError as error:
        raise CheckpointError(f"{file} is no model that this version can read: {error}") from None
    sizes = document["shapes"]
    shapes = build.Shapes(tuple(sizes["input_shape"]), sizes["num_outputs"], sizes.get("num_classes"))
    if isinstance(config.task_options, ImageTaskOptions) and len(shapes.input_shape) != 3:
        raise CheckpointError(
            f"{file} is no model of images: its inputs have the shape {list(shapes.input_shape)[:9]}."
        )
    ink = document["dataset"] is not None and document["dataset"]["ink"]
    given = {"model": model, "objective": objective, "algorithm": algorithm}
    foreign = {kind: getattr(config, kind) for kind, own in given.items() if own is None}
    foreign = {kind: name for kind, name in foreign.items() if is_custom(name)}
    if foreign:
        raise ConfigError(
            f"{file} was trained with {', '.join(map(repr, foreign.values()))}. A file may not say which code to run: "
            f"give it yourself by load(path, {', '.join(f'{kind}=...' for kind in foreign)})."
        )
    module = model() if model else None
    try:
        if algorithm is None:
            _check_size(config, shapes, tensors, objective, copy.deepcopy(module))
        learner = build.learner(
            config, shapes, torch.device("cpu"), module=module, objective=objective, algorithm=algorithm
        )
        meta_params = load_meta_params(learner.meta_params, tensors)
    except (TypeError, ValueError, RuntimeError, ConfigError, CheckpointError) as error:
        raise CheckpointError(f"{file} does not fit its own configuration: {first_line(error)[:500]}.") from error
    return FewShotModel(config, shapes, learner._replace(meta_params=meta_params), ink)


def _check_size(
    config: Config,
    shapes: build.Shapes,
    tensors: Mapping[str, Tensor],
    objective: Callable[[nn.Module], Objective] | None,
    module: nn.Module | None,
) -> None:
    """That a file holds the parameters of the model that it describes, before memory is taken for them.

    A header of a kilobyte can describe terabytes.
    """
    with torch.device("meta"):  # which knows shapes and has no numbers
        described = build.learner(config, shapes, torch.device("meta"), module=module, objective=objective)
    load_meta_params(described.meta_params, tensors)
