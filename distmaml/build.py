"""From a Config to objects: the only place that turns names into things."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from distmaml import paths
from distmaml.algorithms import ALGORITHMS, Algorithm, MetaParams
from distmaml.config import Config, is_custom, is_store
from distmaml.datasets import ensure_store
from distmaml.episodes import TaskDistribution
from distmaml.errors import ConfigError, first_line, unknown
from distmaml.files import write_text
from distmaml.models import MODELS
from distmaml.objectives import Objective, initial_params
from distmaml.options import ImageTaskOptions
from distmaml.splits import SAMPLES, SPLITS
from distmaml.store import ClassStore, open_store
from distmaml.tasks import TASKS

OBJECTIVES: dict[str, str] = {
    "classification": "distmaml.objectives:classification",
    "regression": "distmaml.objectives:regression",
}
"""Name -> where its function is: ``function(module) -> Objective``."""


_CPU = torch.device("cpu")
MOST_OF_GPU = 0.25
"""Of a GPU's free memory, for the images of a store."""


class Learner(NamedTuple):
    """What learns: an algorithm on a model.

    Attributes:
      vectorize: whether tasks are computed side by side. Per-task weights turn a convolution into a grouped one, which
        a GPU wants and a CPU is slower at than one task after the other.
    """

    algorithm: Algorithm
    objective: Objective
    meta_params: MetaParams
    vectorize: bool


class Shapes(NamedTuple):
    """What a model must know of its tasks."""

    input_shape: tuple[int, ...]
    """Shape of one input."""
    num_outputs: int
    """Ways of a classification, values of a regression target."""
    num_classes: int | None = None
    """Classes of the split that is trained on; None for tasks without classes."""


def shapes(tasks: TaskDistribution) -> Shapes:
    """The shapes of a distribution, read off its first tasks. Inputs that are no single tensor have none."""
    support, query, *_ = tasks.sample(range(16))  # one task need not have every label
    inputs, targets = support.inputs, support.targets
    largest = max(int(targets.max()), int(query.targets.max()))
    num_outputs = targets.shape[-1] if targets.is_floating_point() else largest + 1
    input_shape = tuple(inputs.shape[2:]) if isinstance(inputs, torch.Tensor) else ()
    return Shapes(input_shape, num_outputs, getattr(tasks, "num_classes", None))


def learner(
    config: Config,
    shapes: Shapes,
    device: torch.device,
    *,
    module: nn.Module | None = None,
    objective: Callable[[nn.Module], Objective] | None = None,
    algorithm: Callable[..., Algorithm] | None = None,
) -> Learner:
    """Algorithm, objective and initial meta-parameters, which depend on the seed alone.

    Args:
      module: takes the place of the one that the configuration names; likewise `objective` and `algorithm`.
    """
    generator = torch.Generator().manual_seed(config.outer.seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.outer.seed)
        module = _module(config, shapes) if module is None else module
    set_products(config.outer.precision)
    module = module.to(device, getattr(torch, config.outer.dtype))
    objective = resolve("objective", config.objective, OBJECTIVES) if objective is None else objective
    algorithm = resolve("algorithm", config.algorithm, ALGORITHMS) if algorithm is None else algorithm
    target = objective(module)
    arguments = _arguments(config.algorithm, config.algorithm_options)
    if "num_classes" in arguments:
        arguments["num_classes"] = _num_classes(arguments["num_classes"], shapes)
    learned = algorithm(target, **arguments)
    convolves = any(isinstance(layer, nn.modules.conv._ConvNd) for layer in module.modules())
    meta_params = learned.init(initial_params(module), generator)
    return Learner(learned, target, meta_params, vectorize=device.type != "cpu" or not convolves)


def task_distributions(config: Config, device: torch.device = _CPU) -> dict[str, TaskDistribution]:
    """The task distribution of each split: train, val and test.

    Args:
      device: where images are kept, if it is a GPU with room for them; episodes are then put together there.

    Raises:
      ConfigError, DataError: a split that the data cannot fill.
    """
    options = config.task_options
    seed = config.outer.seed
    if not isinstance(options, ImageTaskOptions):
        factory = resolve("tasks", config.tasks, TASKS)
        arguments = _arguments(config.tasks, options)
        num_queries = arguments.pop("num_eval_queries", None)
        evaluating = arguments if num_queries is None else {**arguments, "num_queries": num_queries}
        chosen = {split: arguments if split == "train" else evaluating for split in SPLITS}
        return {split: factory(split=split, seed=seed, **chosen[split]) for split in SPLITS}
    opened = store(config)
    assert opened is not None
    if options.rotations != "none" and opened.info.name == "glyphs":
        raise ConfigError(
            f"rotations={options.rotations!r} does not suit glyphs: turned, many letters are other letters (d and p, n "
            "and u), which may be classes of another split. Take --rotations none, or another data set."
        )
    cls = resolve("tasks", config.tasks, TASKS)
    images: np.ndarray | torch.Tensor = opened.images
    if device.type == "cuda" and opened.images.nbytes <= MOST_OF_GPU * torch.cuda.mem_get_info(device)[0]:
        images = torch.tensor(opened.images, device=device)
    return {
        split: cls(
            images,
            opened.classes(_scheme(options), split),
            split=split,
            seed=seed,
            num_ways=options.num_ways,
            num_shots=options.num_shots,
            num_queries=options.num_queries if split == "train" else options.num_eval_queries,
            rotations=options.rotations == "all" or (options.rotations == "train" and split == "train"),
        )
        for split in SPLITS
    }


def store(config: Config) -> ClassStore | None:
    """The class store of the run, built from raw files when it is missing; None for tasks that need none."""
    options = config.task_options
    if not isinstance(options, ImageTaskOptions):
        return None
    return open_store(options.dataset if is_store(options.dataset) else _pinned(config) or _ensured(config, options))


def pin_store(config: Config) -> None:
    """Notes in the run's folder which store it uses, as pictures that come or go make a store of their own."""
    options = config.task_options
    if isinstance(options, ImageTaskOptions) and not is_store(options.dataset):
        path = _pinned(config) or _ensured(config, options)
        write_text(paths.pinned_store(paths.run_folder(config)), f"{path}\n")


def _pinned(config: Config) -> Path | None:
    if config.run.name is None:
        return None
    try:
        path = Path(os.fsdecode(paths.pinned_store(paths.run_folder(config)).read_bytes()).strip())
    except FileNotFoundError:
        return None
    return path if path.exists() else None


def _ensured(config: Config, options: ImageTaskOptions) -> Path:
    return ensure_store(
        options.dataset,
        data_dir=options.data_dir,
        image_size=options.image_size,
        color=options.color,
        stores_dir=paths.stores(paths.output_dir(config.run.output_dir)),
        builder=import_attribute(options.dataset) if is_custom(options.dataset) else None,
    )


def dataset_record(config: Config) -> dict[str, Any] | None:
    """What identifies a run's data: name, source, content_hash, ink, split and split_hash; None without a store."""
    opened = store(config)
    if opened is None:
        return None
    assert isinstance(config.task_options, ImageTaskOptions)
    scheme = _scheme(config.task_options)
    return {
        "name": opened.info.name,
        "source": opened.info.source,
        "content_hash": opened.info.content_hash,
        "ink": opened.info.ink,
        "split": scheme,
        "split_hash": opened.split_hash(scheme),
    }


def resolve(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """What a name of a table, or a user's own ``package.module:attribute``, stands for.

    Raises:
      ConfigError: a name that is in no table, or a module or attribute that cannot be imported.
    """
    if name in table:
        return import_attribute(table[name])
    if is_custom(name):
        return import_attribute(name)
    raise ConfigError(f"{unknown(kind, name, table)} Your own is named package.module:attribute.")


def import_attribute(path: str) -> Any:
    """The attribute that ``package.module:attribute`` names; the working directory is searched too."""
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{path!r} cannot be imported ({error}). Run from the folder that holds its package, or install it."
        ) from error
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is imported
        raise ConfigError(f"{path!r} cannot be imported: {described(error)}.") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"module {module_name!r} has no attribute {attribute!r}.")
    return getattr(module, attribute)


def described(error: BaseException) -> str:
    """What was raised, and where: for errors out of a user's own code."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({place.filename}, line {place.lineno})"


def set_products(precision: str) -> None:
    """How this process multiplies float32 matrices on a GPU; torch's own default is TF32 for convolutions alone."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _module(config: Config, shapes: Shapes) -> nn.Module:
    factory = resolve("model", config.model, MODELS)
    arguments = _arguments(config.model, config.model_options)
    sizes = () if is_custom(config.model) else (shapes.input_shape, shapes.num_outputs)
    module = factory(*sizes, **arguments)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model={config.model!r} returned a {type(module).__name__}, not a torch.nn.Module.")
    return module


def _num_classes(wanted: int | None, shapes: Shapes) -> int | None:
    if wanted is not None and wanted < (shapes.num_classes or 0):
        raise ConfigError(
            f"num_classes={wanted} is less than the {shapes.num_classes} classes of the training split, rotations "
            "counted. Leave it out: it follows from the tasks."
        )
    return shapes.num_classes if wanted is None else wanted


def _arguments(name: str, options: Any) -> dict[str, Any]:
    """The options as keyword arguments; for a user's own, its mapping of arguments."""
    arguments = asdict(options)
    if is_custom(name):
        (arguments,) = arguments.values()
    return dict(arguments)


def _scheme(options: ImageTaskOptions) -> str:
    return SAMPLES if options.split_by == "samples" else options.split
