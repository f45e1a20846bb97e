"""A search space as data: for each configuration field, which values a search may take.

A domain is written ``kind:...``, the same way on the command line, in a search's file and in MLflow:

    uniform:0.1:2         any number between the two
    log:1e-3:1            likewise, each power of ten as often as the next
    log:1e-3:1:4          the same; the fourth part is the number of points that a grid takes
    int:1:5               whole numbers, both ends among them
    choice:maml,fomaml    one of these

Configuration `number` of a random search or a grid is a function of (space, seed, number) alone, so a resumed search
and one on another cluster try the same ones.
"""

import itertools
import json
import math
import random
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from tyro.conf import UseAppendAction

from distmaml.config import Config, flatten, from_json, override, parse_field, to_json, typed
from distmaml.errors import ConfigError, unknown
from distmaml.limits import check
from distmaml.options import OPTIONS

Kind = Literal["uniform", "log", "int", "choice"]
SCHEDULERS = ("none", "asha", "pbt")
MOST = 1_000_000
"""Trials of a search, and what else is counted of one."""
LONGEST_NAME = 93
"""Letters of a search's name: those of its trials have seven more, and a run's 100 at most."""


@dataclass(frozen=True)
class Domain:
    """The values that one field may take."""

    kind: Kind
    """How they are spread."""
    low: float = 0.0
    """The least, for all but a choice."""
    high: float = 0.0
    """The greatest, itself among them."""
    values: tuple[Any, ...] = ()
    """All of them, for a choice."""
    num_points: int | None = None
    """How many of them a grid takes, for uniform and log."""

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"choice:{','.join('none' if value is None else str(value) for value in self.values)}"
        points = [] if self.num_points is None else [str(self.num_points)]
        return ":".join([self.kind, f"{self.low:g}", f"{self.high:g}", *points])

    def at(self, fraction: float) -> Any:
        """The value that so large a part of the domain lies below, 0 <= fraction <= 1."""
        if self.kind == "choice":
            return self.values[min(int(fraction * len(self.values)), len(self.values) - 1)]
        if self.kind == "int":
            return min(int(self.low + fraction * (self.high - self.low + 1)), int(self.high))
        if self.kind == "log":
            between = math.exp(math.log(self.low) + fraction * (math.log(self.high) - math.log(self.low)))
        else:
            between = self.low + fraction * (self.high - self.low)
        return self.rounded(between)

    def rounded(self, value: float) -> float:
        """A value of the range to four digits: a command line should be readable."""
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def grid_size(self, field: str) -> int:
        """How many values a grid takes.

        Raises:
          ConfigError: a range of which nobody says how many points to take.
        """
        if self.kind == "choice":
            return len(self.values)
        if self.kind == "int":
            return int(self.high) - int(self.low) + 1
        if self.num_points is None:
            raise ConfigError(
                f"a grid needs a number of points for {field}: --space {field}={self}:5, or --space "
                f"{field}=choice:{self.at(0):g},{self.at(1):g}."
            )
        return self.num_points

    def grid(self, field: str) -> list[Any]:
        """The values that a grid takes.

        Raises:
          ConfigError: a range of which nobody says how many points to take.
        """
        size = self.grid_size(field)
        if self.kind == "choice":
            return list(self.values)
        if self.kind == "int":
            return list(range(int(self.low), int(self.high) + 1))
        return [self.at(i / max(size - 1, 1)) for i in range(size)]


Space: TypeAlias = dict[str, Domain]
"""Flat field name -> what it may be."""


@dataclass(frozen=True)
class Search:
    """How a search goes about it; which values it tries stands in its space."""

    space: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A field and what it may be; may be given several times: inner_lr=log:1e-3:1, weight_decay=uniform:0:1,
    num_inner_steps=int:1:5, algorithm=choice:maml,fomaml. Default: learning rates, inner steps, algorithm and tasks per
    step."""
    num_samples: int | None = None
    """Configurations to try: 16 by default, all points for a grid."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """random: independent draws. grid: all combinations. tpe: Optuna's tree-structured Parzen estimator."""
    scheduler: Literal["none", "asha", "pbt"] = "asha"
    """asha: asynchronous successive halving, which stops all but the best 1 / reduction_factor at each rung. pbt:
    population-based training, in which the worst quarter goes on from the weights of the best, with other learning
    rates, again and again. none: all trials are trained to the end, as they began."""
    reduction_factor: int = 3
    """How many times fewer trials each rung of asha lets through, and how many times further off the next one is."""
    first_rung: int | None = None
    """Outer steps before the first decision of asha. Default: about a 27th of num_outer_steps, at a validation."""
    move_every: int | None = None
    """Outer steps from one copying of pbt to the next, at validations. Default: about an eighth of num_outer_steps."""
    max_concurrent: int | None = None
    """Trials at a time. Default: as many as the cluster has room for."""
    search_seed: int = 0
    """Seed of what is tried. The trials themselves all have the recipe's seed."""


def to_text(config: Config, search: Search) -> str:
    """JSON of a search; `read` turns a file of it back."""
    return json.dumps({"config": to_json(config), "search": asdict(search)}, indent=2) + "\n"


def read(file: Path) -> tuple[Config, Search]:
    """What all trials of a search have in common, and how it goes about it.

    Raises:
      ConfigError: a missing or damaged file, or one of another version.
    """
    hints = typing.get_type_hints(Search)
    try:
        record = json.loads(file.read_text())
        fields = {key: typed(key, value, hints[key]) for key, value in record["search"].items()}
        return from_json(record["config"]), Search(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise ConfigError(f"{file} is damaged, or of another version of distmaml ({error}). Search anew.") from error


def first_rung(search: Search, config: Config) -> int:
    """Outer steps of the lowest rung: those asked for, else a 27th of all, rounded up to a validation."""
    if search.first_rung is not None:
        return search.first_rung
    every = config.evaluation.val_every
    return min(-(-config.outer.num_outer_steps // (27 * every)) * every, config.outer.num_outer_steps)


def stages(search: Search, config: Config) -> list[int]:
    """The outer steps at which all trials wait for one another: those of pbt, and the end of a trial."""
    steps, every = config.outer.num_outer_steps, config.evaluation.val_every
    if search.scheduler != "pbt":
        return [steps]
    apart = search.move_every or -(-steps // (8 * every)) * every
    return [*range(apart, steps, apart), steps]


def check_search(config: Config, search: Search, space: Space) -> None:
    """Refuses what no search can do.

    Raises:
      ConfigError: naming the value, and what is allowed.
    """
    if search.scheduler not in SCHEDULERS:
        raise ConfigError(unknown("scheduler", search.scheduler, SCHEDULERS))
    for name, least in (("num_samples", 1), ("reduction_factor", 2), ("first_rung", 1), ("max_concurrent", 1)):
        value = getattr(search, name)
        if value is not None and not least <= value <= MOST:
            raise ConfigError(f"{name}={value} must be {least} or more, and {MOST} or less.")
    if len(config.run.name or "") > LONGEST_NAME:
        raise ConfigError(f"name={config.run.name!r} is longer than {LONGEST_NAME} letters; its trials add to it.")
    for name, scheduler in (("first_rung", "asha"), ("move_every", "pbt")):
        if getattr(search, name) is not None and search.scheduler != scheduler:
            raise ConfigError(
                f"{name}={getattr(search, name)} belongs to --scheduler {scheduler}, and this search has "
                f"{search.scheduler}. Leave it out."
            )
    every = config.evaluation.val_every
    if not every:
        raise ConfigError("val_every=0 asks for no validation, and a search judges its trials by theirs.")
    if search.first_rung is not None and search.first_rung > config.outer.num_outer_steps:
        raise ConfigError(
            f"first_rung={search.first_rung} lies behind the end of a trial, at num_outer_steps="
            f"{config.outer.num_outer_steps}."
        )
    if search.first_rung is not None and search.first_rung % every:
        raise ConfigError(
            f"first_rung={search.first_rung} must be a multiple of val_every={every}: trials are judged by validations."
        )
    if config.run.storage is not None:
        raise ConfigError(
            "--storage is for a single run so far: the trials of a search and its driver share a folder. Leave it out, "
            "and name a folder by --output-dir that all nodes see; the best trial can be trained with --storage."
        )
    if config.cluster.team[0] != config.cluster.team[1]:
        raise ConfigError(
            f"num_workers={config.cluster.num_workers}: a search divides the cluster among its trials, so each has a "
            f"fixed number of workers. Take --num-workers {config.cluster.team[0]}."
        )
    if search.scheduler == "pbt":
        _check_population(config, search, space)


def _check_population(config: Config, search: Search, space: Space) -> None:
    every, steps = config.evaluation.val_every, config.outer.num_outer_steps
    if config.cluster.team[1] > 1:
        raise ConfigError(
            f"num_workers={config.cluster.num_workers}: pbt copies the weights of trials that stand still, and those "
            "of several workers do not stop at once. Take --num-workers 1, or --scheduler asha."
        )
    if search.searcher == "tpe":
        raise ConfigError(
            "searcher='tpe' learns from trials that end early, and those of pbt do not: take random or grid."
        )
    if search.num_samples is not None and search.num_samples < 2:
        raise ConfigError(f"num_samples={search.num_samples}: pbt needs 2 trials or more, to copy one to another.")
    if search.move_every is not None and (search.move_every < 1 or search.move_every % every):
        raise ConfigError(
            f"move_every={search.move_every} must be a multiple of val_every={every}: trials are judged by validations."
        )
    if stages(search, config) == [steps]:
        raise ConfigError(
            f"num_outer_steps={steps} leaves pbt nothing to do: the first copying would come after "
            f"{search.move_every or every} steps. Lower --move-every or --val-every."
        )
    for field, domain in space.items():
        if domain.kind not in ("uniform", "log"):
            raise ConfigError(
                f"--space {field}={domain}: pbt changes values while a trial runs, so they are uniform or log ranges. "
                "Leave it out, or take --scheduler asha."
            )


def parse(config: Config, texts: Sequence[str]) -> Space:
    """The space that texts name: ``["inner_lr=log:1e-3:1"]``.

    Raises:
      ConfigError: a field that the configuration does not have, or that comes twice, bounds that are no range, values
        of another type.
    """
    space: Space = {}
    for text in texts:
        field, equals, domain = text.partition("=")
        if not equals:
            raise ConfigError(f"--space {text} is not of the form FIELD=KIND:..., as in inner_lr=log:1e-3:1.")
        if field in space:
            raise ConfigError(f"--space names {field} twice: {field}={space[field]} and {text}.")
        space[field] = _domain(config, field, domain)
    return space


def _domain(config: Config, field: str, text: str) -> Domain:
    kind, _, rest = text.partition(":")
    if kind not in get_args(Kind):
        raise ConfigError(f"--space {field}={text}: {unknown('kind of range', kind, get_args(Kind))}")
    if kind == "choice":
        values = tuple(parse_field(config, field, word) for word in rest.split(",")) if rest else ()
        if not values or len(set(map(str, values))) < len(values):
            raise ConfigError(f"--space {field}={text} must name one value or more, each once, with commas between.")
        return Domain("choice", values=values)
    words = rest.split(":")
    most = 2 if kind == "int" else 3
    if not 2 <= len(words) <= most:
        raise ConfigError(
            f"--space {field}={text} is not of the form {kind}:LOW:HIGH{'' if most == 2 else '[:POINTS]'}."
        )
    low, high = (parse_field(config, field, word) for word in words[:2])
    numbers = all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in (low, high))
    if not numbers or not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"--space {field}={text}: {field} is no finite number; name its values: {field}=choice:A,B.")
    if low >= high:
        raise ConfigError(f"--space {field}={text}: the upper bound {high:g} must lie above the lower bound {low:g}.")
    if kind == "log" and low <= 0:
        raise ConfigError(f"--space {field}={text}: a log range begins above 0.")
    if kind == "int" and not (isinstance(low, int) and isinstance(high, int)):
        raise ConfigError(f"--space {field}={text}: {field} takes any number, so its range is uniform or log.")
    if kind != "int" and isinstance(low, int):
        raise ConfigError(f"--space {field}={text}: {field} takes whole numbers, so its range is int:LOW:HIGH.")
    if len(words) == 2:
        return Domain(kind, low, high)  # type: ignore[arg-type]
    if not words[2].isdecimal() or int(words[2]) < 2:
        raise ConfigError(f"--space {field}={text}: a grid takes 2 points or more of a range, not {words[2]!r}.")
    return Domain(kind, low, high, num_points=int(words[2]))  # type: ignore[arg-type]


def sample(space: Space, seed: int, number: int) -> dict[str, Any]:
    """Values of the fields, drawn at random: a function of its arguments alone."""
    stream = random.Random(f"{seed} {number}")
    return {field: domain.at(stream.random()) for field, domain in space.items()}


def grid(space: Space) -> list[dict[str, Any]]:
    """All combinations; the last field changes fastest.

    Raises:
      ConfigError: a range without a number of points, or more combinations than a search may have.
    """
    sizes = [domain.grid_size(field) for field, domain in space.items()]
    if math.prod(sizes) > MOST:
        raise ConfigError(f"the grid has {math.prod(sizes)} points, and a search may have {MOST} trials. Take fewer.")
    columns = [domain.grid(field) for field, domain in space.items()]
    return [dict(zip(space, row, strict=True)) for row in itertools.product(*columns)]


def check_space(config: Config, space: Space) -> None:
    """Tries every field at both of its ends, and every choice.

    Raises:
      ConfigError: naming the value that the configuration cannot have.
    """
    if not space:
        raise ConfigError("the space is empty; name a field of it: --space inner_lr=log:1e-3:1.")
    fixed = [field for field in space if field in _fixed(config)]
    if fixed:
        raise ConfigError(
            f"--space {fixed[0]}=...: it must be the same for all trials, or they could not be compared. Leave it out."
        )
    selectors = {field: domain for field, domain in space.items() if field in OPTIONS}
    for chosen in grid(selectors):  # an algorithm may bring other fields than the next
        base = override(config, chosen)
        for field in space.keys() - chosen.keys():
            domain = space[field]
            for value in domain.values if domain.kind == "choice" else (domain.at(0.0), domain.at(1.0)):
                check(override(base, {field: value}))


def _fixed(config: Config) -> set[str]:
    """Fields that decide what a trial is judged on, or that are none of its own."""
    groups = (config.run, config.cluster, config.evaluation, config.task_options)
    names = {name for group in groups for name in flatten(group)} - {"num_queries"}  # of training alone
    return names | {"recipe", "tasks", "objective", "num_outer_steps", "seed", "precision"}
