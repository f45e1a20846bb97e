"""Which configuration a search tries next. The only import of optuna."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from distmaml import space as spaces
from distmaml.errors import ConfigError, unknown
from distmaml.space import Space


class Tried(NamedTuple):
    """A configuration that has been tried."""

    values: dict[str, Any]
    """What it was."""
    result: float | None
    """The best of the selection metric; None for a trial that failed."""


class Searcher(Protocol):
    """Proposes configurations."""

    @property
    def num_trials(self) -> int:
        """How many the whole search has."""
        ...

    def suggest(self, number: int, tried: Iterable[Tried]) -> dict[str, Any]:
        """The values of trial `number`, given those that have ended, in the order in which they did."""
        ...


class RandomSearch:
    """Independent draws; what has been tried does not matter."""

    def __init__(self, space: Space, num_trials: int, seed: int) -> None:
        self.num_trials = num_trials
        self._space, self._seed = space, seed

    def suggest(self, number: int, tried: Iterable[Tried]) -> dict[str, Any]:
        return spaces.sample(self._space, self._seed, number)


class GridSearch:
    """All combinations."""

    def __init__(self, space: Space) -> None:
        self._grid = spaces.grid(space)
        self.num_trials = len(self._grid)

    def suggest(self, number: int, tried: Iterable[Tried]) -> dict[str, Any]:
        return self._grid[number]


class Tpe:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., 2011, "Algorithms for Hyper-Parameter Optimization").

    The first ten trials are random. A pruned trial counts with the best that it had come to.
    """

    def __init__(self, space: Space, num_trials: int, seed: int, *, mode: str) -> None:
        import optuna

        self.num_trials = num_trials
        self._seed, self._mode = seed, mode
        kinds = optuna.distributions
        self._distributions: dict[str, Any] = {}
        for field, domain in space.items():
            if domain.kind == "choice":
                self._distributions[field] = kinds.CategoricalDistribution(domain.values)
            elif domain.kind == "int":
                self._distributions[field] = kinds.IntDistribution(int(domain.low), int(domain.high))
            else:
                self._distributions[field] = kinds.FloatDistribution(domain.low, domain.high, log=domain.kind == "log")
        self._domains = space

    def suggest(self, number: int, tried: Iterable[Tried]) -> dict[str, Any]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A new study each time, fed with what is known: a resumed search has nothing else either.
        sampler = optuna.samplers.TPESampler(seed=(self._seed * 1_000_003 + number) % 2**32)
        study = optuna.create_study(direction="maximize" if self._mode == "max" else "minimize", sampler=sampler)
        states = optuna.trial.TrialState
        for values, result in tried:
            state = states.FAIL if result is None else states.COMPLETE
            study.add_trial(
                optuna.create_trial(params=values, distributions=self._distributions, value=result, state=state)
            )
        asked = study.ask(self._distributions).params
        return {field: _shortened(asked[field], domain) for field, domain in self._domains.items()}


def _shortened(value: Any, domain: spaces.Domain) -> Any:
    return domain.rounded(value) if isinstance(value, float) and domain.kind != "choice" else value


SEARCHERS = ("random", "grid", "tpe")


def searcher(name: str, space: Space, *, num_trials: int | None, seed: int, mode: str) -> Searcher:
    """The searcher of that name.

    Args:
      num_trials: of the search; None for a grid alone, which has as many as it has points.

    Raises:
      ConfigError: an unknown name, a grid of another size than is asked for, or of ranges without points.
    """
    if name not in SEARCHERS:
        raise ConfigError(unknown("searcher", name, SEARCHERS))
    if name == "grid":
        found = GridSearch(space)
        if num_trials is not None and num_trials != found.num_trials:
            raise ConfigError(
                f"num_samples={num_trials}, and the grid has {found.num_trials} points. Leave --num-samples out, or "
                "change the space."
            )
        return found
    wanted = 16 if num_trials is None else num_trials
    return RandomSearch(space, wanted, seed) if name == "random" else Tpe(space, wanted, seed, mode=mode)
