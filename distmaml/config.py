"""What a run is, as data: frozen dataclasses with a docstring under every field.

Imports no torch and builds nothing: `build.py` turns a Config into objects. Field names are unique over
the whole tree, so a flat name is enough on the command line (``--inner-lr``), as an MLflow parameter
(``inner_lr``) and in a search space.

Wherever a table's name is accepted (algorithm, model, objective, tasks, dataset), ``package.module:attribute``
names a user's own, whose arguments come as plain keyword arguments from the matching ``*_arguments`` field.
"""

import dataclasses
import json
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distmaml.errors import ConfigError, first_line, unknown
from distmaml.options import (
    OPTIONS,
    AlgorithmOptions,
    Conv4Options,
    ImageTaskOptions,
    InnerLoop,
    ModelOptions,
    TaskOptions,
)


@dataclass(frozen=True)
class Outer:
    """The outer loop."""

    num_outer_steps: int = 1000
    """Outer steps of the whole run."""
    meta_batch_size: int = 32
    """Tasks per outer step over all workers."""
    outer_lr: float = 1e-3
    """Step size of the outer optimiser."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Outer optimiser."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How outer_lr falls over num_outer_steps."""
    final_lr_fraction: float = 0.01
    """Share of outer_lr that the cosine and linear schedules end with."""
    weight_decay: float = 0.0
    """Weight decay of the outer optimiser (decoupled for adamw), on all that is learned: rates and curvature too."""
    clip_norm: float | None = None
    """Scale the meta-gradient down to this Euclidean norm when it is larger."""
    reduction: Literal["ordered", "plain"] = "ordered"
    """ordered: chunk sums are added in index order, so training is bitwise the same for every number of workers.
    plain: each worker adds its own first; less traffic for large models, equal up to rounding."""
    reduction_chunk: int = 4
    """Tasks computed together and summed as one piece; fixed over the numbers of workers. No more than
    meta_batch_size / reduction_chunk workers have something to do."""
    precision: Literal["float32", "float64", "tf32"] = "float32"
    """Type of the parameters and of all arithmetic. tf32, for GPUs alone, is float32 whose products of matrices and
    convolutions have 10 bits of mantissa: 2 to 3 times as fast (docs/PERFORMANCE.md)."""
    seed: int = 0
    """Seed of the initial parameters and of the tasks. Splits do not depend on it."""

    @property
    def dtype(self) -> str:
        """Type of the parameters and the inputs."""
        return "float64" if self.precision == "float64" else "float32"


@dataclass(frozen=True)
class Evaluation:
    """Validation while training and the test at the end."""

    num_eval_steps: int = 3
    """Inner steps in validation and test."""
    val_every: int = 100
    """Outer steps between validations; 0 for none."""
    num_val_episodes: int = 100
    """Validation episodes, always the same ones."""
    num_test_episodes: int = 600
    """Test episodes at the end of the run; 0 for none."""
    inductive: bool = True
    """In the test, also score each query item with the support set alone in the batch statistics; of more than 3 inner
    steps before, after the first and after the last."""
    selection_metric: str = "val/query_accuracy"
    """The metric that picks the best checkpoint and stops the run early."""
    selection_mode: Literal["max", "min"] = "max"
    """Whether more or less of the selection metric is better."""
    patience: int | None = None
    """Stop after this many validations without a better selection metric."""

    @property
    def selected_quantity(self) -> str:
        """What the selection metric measures, whatever the split: "query_accuracy"."""
        return self.selection_metric.removeprefix("val/")

    def num_episodes(self, split: str) -> int:
        """How many episodes of a split are looked at."""
        return self.num_val_episodes if split == "val" else self.num_test_episodes


@dataclass(frozen=True)
class Run:
    """The run's name, its files and its tracking."""

    name: str | None = None
    """Name of the run: its folder under OUTPUT_DIR/runs and its name in MLflow. Default: recipe, date and time."""
    output_dir: Path | None = None
    """Everything a run makes lies here: stores, runs, mlflow.db. Default: $DISTMAML_HOME, else ~/distmaml."""
    storage: str | None = None
    """For nodes that share no disk: the run's folder is mirrored at STORAGE/runs/NAME, by which all nodes, and another
    head that goes on with the run, see it (s3://bucket/prefix; also gs:// and file:///). OUTPUT_DIR is then a folder of
    each node's own. Credentials come from the environment of each node."""
    resume: bool = False
    """Go on with the run of this name where it stopped."""
    tracking_uri: str | None = None
    """MLflow server (http://host:5000). Default: $MLFLOW_TRACKING_URI, else the embedded OUTPUT_DIR/mlflow.db."""
    experiment: str | None = None
    """MLflow experiment. Default: the recipe's name."""
    log_every: int = 10
    """Outer steps between points of train/* and system/*; each point is the mean since the last."""
    checkpoint_every: int = 100
    """Outer steps between checkpoints. Metrics are committed with them."""


@dataclass(frozen=True)
class Cluster:
    """Where the run runs."""

    num_workers: int | str = 1
    """Ray workers, each with one CPU thread or with its GPUs. LEAST:MOST is elastic: as many of them as the cluster has
    room for, and another number when nodes come or go; the result is the same."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """Use GPUs: if the cluster has any (auto), or always, or never."""
    gpus_per_worker: float = 1.0
    """GPUs of each worker; a fraction lets workers share one."""
    address: str | None = None
    """Address of a running Ray cluster. Default: $RAY_ADDRESS (set inside a Ray job), else one started for this
    run on this machine."""
    max_failures: int = 3
    """Crashed worker groups that are started again from the last checkpoint before the run counts as failed. A node
    that says beforehand that it goes does not count."""
    collective_timeout: float = 300.0
    """Seconds that workers wait for one of them before it is taken for hung, and all are started again."""
    node_timeout: float = 600.0
    """Seconds to wait for the CPUs and GPUs that the workers need, at the start or after a node is lost, before the run
    ends with an error."""

    @property
    def team(self) -> tuple[int, int]:
        """The least and the most workers; equal, unless the run is elastic."""
        least, _, most = str(self.num_workers).partition(":")
        return int(least), int(most or least)


@dataclass(frozen=True)
class Config:
    """A complete run. `recipes` has ready ones."""

    recipe: str = "custom"
    """Name of the recipe this configuration started from."""
    algorithm: str = "maml"
    """maml, fomaml, anil, boil, reptile, meta_sgd, maml_plus_plus, imaml, cavia, meta_curvature, proto_maml, meta_lstm,
    prototypical_networks, matching_networks, fine_tuning, or package.module:attribute."""
    algorithm_options: AlgorithmOptions = field(default_factory=InnerLoop)
    """Options of the algorithm (options.py); likewise of model and tasks."""
    model: str = "conv4"
    """conv4, mlp, or package.module:attribute."""
    model_options: ModelOptions = field(default_factory=Conv4Options)
    """Options of the model."""
    objective: str = "classification"
    """classification, regression, or package.module:attribute."""
    tasks: str = "images"
    """images, sinusoid, or package.module:attribute."""
    task_options: TaskOptions = field(default_factory=ImageTaskOptions)
    """Options of the task distribution."""
    outer: Outer = Outer()
    """The outer loop."""
    evaluation: Evaluation = Evaluation()
    """Validation and test."""
    run: Run = Run()
    """Name, files and tracking."""
    cluster: Cluster = Cluster()
    """Workers."""


# ------------------------------------------------------------------------------------------- operations


def is_custom(name: str) -> bool:
    """Whether a name is a user's own ``package.module:attribute``."""
    return ":" in name and "://" not in name


def is_store(dataset: str) -> bool:
    """Whether a data set's name is the path or the URI of a ready store."""
    return dataset.partition("?")[0].endswith(".arrow")


def flatten(config: Any) -> dict[str, Any]:
    """All fields of a dataclass tree under their own names; the groups themselves are left out."""
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {entry.name: value})
    return flat


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with some fields replaced, by flat names.

    A new algorithm, model or task name brings its own options. Those that a model or tasks share by name with the old
    ones keep their values; those of an algorithm, where it has the same options as the old one.

    Raises:
      ConfigError: a field or a table's name that does not exist.
    """
    values = dict(values)
    for selector, (table, custom) in OPTIONS.items():
        name = values.get(selector, getattr(config, selector))
        if name != getattr(config, selector):
            config = _select(config, selector, name, table, custom)
    missing = values.keys() - flatten(config).keys()
    if missing:
        raise ConfigError(no_field(config, min(missing)))
    replaced: Config = _replace(config, values)
    return replaced


def _select(config: Config, selector: str, name: str, table: dict[str, type], custom: type) -> Config:
    group = {"algorithm": "algorithm_options", "model": "model_options", "tasks": "task_options"}[selector]
    if not is_custom(name) and name not in table:
        raise ConfigError(f"{unknown(selector, name, table)} Your own is named package.module:attribute.")
    kind = custom if is_custom(name) else table[name]
    old = getattr(config, group)
    # A rate of one algorithm means nothing to another that does not have the same options: iMAML's, Reptile's, CAVIA's.
    shares = selector != "algorithm" or type(old) is kind
    shared = {f.name: getattr(old, f.name) for f in dataclasses.fields(kind) if shares and hasattr(old, f.name)}
    changes: dict[str, Any] = {selector: name, group: kind(**shared)}
    return dataclasses.replace(config, **changes)


def misplaced(config: Config, name: str, spelled: Callable[[str], str] = str) -> str | None:
    """What to say behind the name of another algorithm's option, with those that this one has; None for any other name.

    Args:
      spelled: how the user writes a field.
    """
    table, _ = OPTIONS["algorithm"]
    of_any = {entry.name for kind in table.values() for entry in dataclasses.fields(kind)}
    if name not in of_any - flatten(config).keys():
        return None
    own = ", ".join(spelled(entry.name) for entry in dataclasses.fields(config.algorithm_options))
    return f"is no option of {config.algorithm}, which has {own or 'none'}."


def no_field(config: Config, name: str, kind: str = "option", known: Iterable[str] | None = None) -> str:
    """What to say of a name that no field of the configuration has: another algorithm's, or the nearest one.

    Args:
      kind: what a field is called.
      known: names that can be given; all by default.
    """
    said = misplaced(config, name)
    return f"{name} {said}" if said else unknown(kind, name, flatten(config) if known is None else known)


def _replace(config: Any, values: Mapping[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            changes[entry.name] = _replace(value, values)
        elif entry.name in values:
            changes[entry.name] = values[entry.name]
    return dataclasses.replace(config, **changes)


def to_json(config: Config) -> dict[str, Any]:
    """A flat, JSON-ready dict; `from_json` turns it back into an equal Config."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in flatten(config).items()}


def as_recipe(config: Config) -> dict[str, Any]:
    """What `to_json` gives, without all that belongs to one run alone: its name, its folder, its cluster."""
    own = {entry.name for group in (config.run, config.cluster) for entry in dataclasses.fields(group)}
    return {name: value for name, value in to_json(config).items() if name not in own}


def from_json(values: Mapping[str, Any]) -> Config:
    """The Config that `to_json` wrote.

    Raises:
      ConfigError: a field that does not exist, or a value of the wrong type.
    """
    config = override(Config(), {name: typed(name, values[name], str) for name in OPTIONS if name in values})
    hints = _hints(config)
    for name in values:
        if name not in hints:
            raise ConfigError(no_field(config, name[:60]))
    return override(config, {name: typed(name, value, hints[name]) for name, value in values.items()})


def parse_field(config: Config, name: str, text: str) -> Any:
    """A text as the value of a field: ``"1e-3"`` as a float where the field is one; "none" where it may be None.

    Raises:
      ConfigError: no such field, or a text that is no value of it.
    """
    hints = _hints(config)
    if name not in hints:
        raise ConfigError(no_field(config, name))
    try:
        value = None if text == "none" and type(None) in typing.get_args(hints[name]) else json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return typed(name, text if hints[name] is str else value, hints[name])


def _hints(config: Any) -> dict[str, Any]:
    hints = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        hints.update(_hints(value) if dataclasses.is_dataclass(value) else {name: hint})
    return hints


def typed(name: str, value: Any, hint: Any) -> Any:
    """The JSON value of a field as the annotated type.

    Raises:
      ConfigError: it is of another type, or a text that can be no name of a file.
    """
    if isinstance(value, str) and not _is_writable(value):
        raise ConfigError(f"{name}={_shown(value)} holds characters that no name may hold. Write it anew.")
    for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if option is type(None) and value is None:
            return None
        if option is Path and isinstance(value, str):
            return Path(value)
        is_int = type(value) is int and abs(value) < 2**63
        if option is float and (is_int or type(value) is float):
            return float(value)
        if (option is int and is_int) or (option in (str, bool) and type(value) is option):
            return value
        if origin is Literal and isinstance(value, str) and value in inner:
            return value
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(typed(name, element, inner[0]) for element in value)
        if origin is dict and isinstance(value, dict):
            return {typed(name, key, str): typed(name, element, inner[1]) for key, element in value.items()}
    raise ConfigError(f"{name}={_shown(value)} must be {_in_words(hint)}.")


def _is_writable(text: str) -> bool:
    """Whether a text can be written: JSON may hold halves of characters. The name of a file need not be Unicode."""
    try:
        return b"\0" not in text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False


def _shown(value: Any) -> str:
    """The beginning of a value, which may be long and deep where a file says so."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 100
    return short.repr(value)[:60]


def _in_words(hint: Any) -> str:
    """A type as people call it."""
    if isinstance(hint, types.UnionType):
        return " or ".join(_in_words(option) for option in typing.get_args(hint))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple:
        return f"a list, each {_in_words(inner[0])}"
    if origin is dict:
        return "a table of names and values"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    return words.get(hint, "none")


MAY_CHANGE = {
    *("name", "output_dir", "resume", "tracking_uri", "experiment", "log_every", "checkpoint_every", "data_dir"),
    "storage",
    *("num_workers", "use_gpu", "gpus_per_worker", "address", "max_failures", "collective_timeout", "node_timeout"),
    *("num_outer_steps", "patience", "num_test_episodes", "inductive"),
}
"""Fields that may differ between a run and its resumption. With ordered sums another number of workers leaves the
result the same to the last bit. More outer steps stretch the schedule: a cosine that had come down goes up again."""


def is_repeated(before: Mapping[str, Any], config: Config) -> bool:
    """Whether an earlier configuration, from `to_json`, is asked for again, on whatever cluster and MLflow."""
    now = to_json(config)
    where = {"resume", "tracking_uri", "storage", *(entry.name for entry in dataclasses.fields(config.cluster))}
    where |= {"output_dir"} if config.run.storage else set()  # that of another head
    return all(before[name] == now.get(name) for name in before if name not in where)


def changes(before: Mapping[str, Any], config: Config) -> list[str]:
    """What stands between an earlier configuration, from `to_json`, and going on with it: "inner_lr=0.1 (was 0.4)"."""
    now = to_json(config)
    different = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
    return [f"{name}={now[name]!r} (was {_shown(before.get(name))})" for name in different]


MOST_BYTES = 1 << 20
"""Of a configuration in a file; a whole one has less than 4 KiB."""


def read(file: Path) -> Config:
    """The configuration in a JSON file that holds what `to_json` gave.

    Raises:
      ConfigError: a missing or damaged file, or one with other fields.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST_BYTES + 1)
        values = json.loads(text) if len(text) <= MOST_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read ({first_line(error)}). Take another one.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is damaged: it holds no configuration. Take another one.")
    try:
        return from_json(values)
    except ConfigError as error:
        raise ConfigError(f"{file} is of another version of distmaml, or damaged: {error} Take another one.") from error
