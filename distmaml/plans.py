"""What is to be reproduced: for each recipe and seed that is asked for, the configuration of a run and its name.

The name is a function of what decides the figures, so that the same request again finds what is there.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from distmaml.config import Config, as_recipe, flatten, no_field, override, parse_field, to_json
from distmaml.errors import ConfigError, unknown
from distmaml.options import OPTIONS
from distmaml.published import PUBLISHED
from distmaml.recipes import RECIPES

LEAST_TEST_EPISODES = 600
MOST_TASKS = 10**12
NUM_VALIDATIONS, NUM_CHECKPOINTS = 12, 60
"""Of a run. A crash costs a 60th of it: some minutes of one that takes a night."""
SCHEDULES = ("annealing_steps", "first_order_steps")
"""Fields that count outer steps of the paper's protocol."""
DECIDED = {
    "num_outer_steps": "--tasks", "seed": "--seeds", "num_test_episodes": "--num-test-episodes",
    "data_dir": "--data-dir", "num_workers": "--num-workers", "output_dir": "--output-dir",
    "name": "the row", "resume": "the run's folder", "inductive": "the objective",
    **dict.fromkeys(
        ("recipe", "algorithm", "objective", "tasks", "num_ways", "num_shots", "dataset", "split"), "the recipe"
    ),
}  # fmt: skip
"""Fields that --set may not change, and what says how they are."""


@dataclass(frozen=True)
class Request:
    """What is to be reproduced."""

    recipes: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE ...")] = ()
    """Recipes to train; --list shows them."""
    tasks: int | None = None
    """Tasks to train each for, as in 48000; the outer steps are as many as that takes."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, of each a run. Other seeds have other test episodes."""
    changes: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.arg(name="set", metavar="FIELD=VALUE ..."), tyro.conf.UseAppendAction
    ] = ()
    """Fields to set otherwise than the recipes have them."""
    num_test_episodes: int = 1000
    """Episodes of the test, 600 or more."""
    data_dir: Path | None = None
    """Folder with the raw files of the data set."""
    num_workers: int = 2
    """Ray workers of each run."""
    output_dir: Path | None = None
    """Everything that a run makes lies here. Default: $DISTMAML_HOME, else ~/distmaml."""
    results: Path = Path("docs/results/reproduction")
    """Folder of the rows, a JSON file each."""
    table: Path = Path("docs/RESULTS.md")
    """File with the table, between its two markers. The picture goes into the folder images beside it."""
    listing: Annotated[bool, tyro.conf.arg(name="list"), tyro.conf.FlagCreatePairsOff] = False
    """Only list the recipes with what their papers print and the rows that are there."""


class Plan(NamedTuple):
    """A row to be made.

    Attributes:
      config: of its run, with a name and absolute paths.
      tasks: to train for, as asked; the outer steps may see some more.
      overrides: what --set says, as far as it decides the figures.
      schedules: fields that shrink with the outer steps: the recipe's value and that of the run.
      command: what makes this row alone.
    """

    config: Config
    tasks: int
    overrides: dict[str, Any]
    schedules: dict[str, list[int]]
    command: str

    @property
    def name(self) -> str:
        """Of the run and of the row."""
        return str(self.config.run.name)


def plans_of(request: Request) -> list[Plan]:
    """The rows that are asked for, recipe by recipe.

    Raises:
      ConfigError: an unknown recipe or field, a number that is too small.
    """
    if not request.recipes:
        raise ConfigError("there is nothing to reproduce: name one recipe or more; --list shows them.")
    if request.tasks is None:
        raise ConfigError("--tasks does not say for how many tasks to train each, as in --tasks 48000.")
    if not 1 <= request.tasks <= MOST_TASKS:
        raise ConfigError(f"--tasks {request.tasks!s:.20} must be 1 or more, and {MOST_TASKS:g} or less.")
    if () in request.changes:
        raise ConfigError("--set has no field=value behind it, as in --set inner_lr=0.1.")
    if not request.seeds:
        raise ConfigError("--seeds must be one whole number or more.")
    if request.num_test_episodes < LEAST_TEST_EPISODES:
        raise ConfigError(
            f"--num-test-episodes {request.num_test_episodes} must be {LEAST_TEST_EPISODES} or more: fewer than the "
            "papers have would be too wide an interval to compare."
        )
    recipes, seeds = dict.fromkeys(request.recipes), dict.fromkeys(request.seeds)
    return [_plan(request, recipe, request.tasks, seed) for recipe in recipes for seed in seeds]


def _plan(request: Request, recipe: str, tasks: int, seed: int) -> Plan:
    if recipe not in RECIPES:
        raise ConfigError(unknown("recipe", recipe, RECIPES))
    config, given = _changed(RECIPES[recipe](), [text for texts in request.changes for text in texts])
    overrides = {field: value for field, value in given.items() if field in as_recipe(config)}
    if config.outer.meta_batch_size < 1:
        raise ConfigError(f"--set meta_batch_size={config.outer.meta_batch_size} must be 1 or more.")
    num_outer_steps = -(-tasks // config.outer.meta_batch_size)
    schedules = _shrunk(config, num_outer_steps, given)
    derived = {
        "num_outer_steps": num_outer_steps,
        "val_every": math.ceil(num_outer_steps / NUM_VALIDATIONS),
        "checkpoint_every": math.ceil(num_outer_steps / NUM_CHECKPOINTS),
        "num_test_episodes": request.num_test_episodes,
        "inductive": config.objective == "classification",
        "seed": seed,
        "name": _name(request, recipe, seed, overrides),
        "num_workers": request.num_workers,
        "output_dir": request.output_dir,
        **({"data_dir": request.data_dir} if "data_dir" in flatten(config) else {}),
        **{field: value for field, (_, value) in schedules.items()},
    }
    config = override(config, {field: value for field, value in derived.items() if field not in given})
    return Plan(
        config, tasks, overrides, schedules, _command(request, recipe, seed, reads_files="data_dir" in flatten(config))
    )


def _changed(config: Config, texts: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """The configuration with what --set says, and that by field, as JSON has it; in whatever order it is said."""
    fields = []
    # OPTIONS go first: they say which fields there are.
    for text in sorted(texts, key=lambda text: text.partition("=")[0] not in OPTIONS):
        field, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set {text} must be field=value, as in inner_lr=0.1.")
        if field in DECIDED:
            raise ConfigError(f"--set {text} is not possible: {field} follows from {DECIDED[field]}.")
        known = flatten(config).keys()
        if field not in known:
            said = no_field(config, field, "field", known - DECIDED.keys())
            raise ConfigError(f"--set {text} for {config.recipe}: {said}")
        try:
            config = override(config, {field: parse_field(config, field, value)})
        except ConfigError as error:
            raise ConfigError(f"--set {text} for {config.recipe}: {error}") from None
        fields.append(field)
    return config, {field: to_json(config)[field] for field in sorted(fields)}


def _shrunk(config: Config, num_outer_steps: int, given: Container[str]) -> dict[str, list[int]]:
    """What counts outer steps: the recipe's value, and the same share of so many steps as it is of the paper's."""
    published, flat = PUBLISHED.get(config.recipe), flatten(config)
    of_paper = config.outer.num_outer_steps if published is None else published.num_outer_steps
    return {
        field: [flat[field], math.ceil(flat[field] * num_outer_steps / of_paper)]
        for field in SCHEDULES
        if flat.get(field) and field not in given
    }


def _name(request: Request, recipe: str, seed: int, overrides: dict[str, Any]) -> str:
    own = dict(overrides)
    if request.num_test_episodes != Request.num_test_episodes:
        own["num_test_episodes"] = request.num_test_episodes
    mark = "-" + hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8] if own else ""
    return f"reproduce-{recipe}-{request.tasks}{mark}-s{seed}"


def _command(request: Request, recipe: str, seed: int, *, reads_files: bool) -> str:
    changes = [text for texts in request.changes for text in texts]
    words = ["python", "jobs/reproduce.py", recipe, "--tasks", str(request.tasks), "--seeds", str(seed)]
    words += ["--set", *changes] if changes else []
    words += ["--num-test-episodes", str(request.num_test_episodes), "--num-workers", str(request.num_workers)]
    words += ["--data-dir", "DIR"] if request.data_dir and reads_files else []
    return shlex.join(words)
