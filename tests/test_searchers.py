"""Searchers: what they propose, and that it depends on what was tried alone."""

import math
from typing import Any

import pytest

from distmaml.errors import ConfigError
from distmaml.recipes.glyphs import glyphs_maml_5w1s
from distmaml.searchers import Tried, searcher
from distmaml.space import parse

CONFIG = glyphs_maml_5w1s()
SPACE = parse(
    CONFIG,
    ["inner_lr=log:0.001:1", "num_inner_steps=int:1:5", "algorithm=choice:maml,fomaml", "clip_norm=choice:none,1"],
)


def objective(values: dict[str, Any]) -> float:
    """Best at an inner_lr of 0.1 with maml."""
    off = math.log10(float(values["inner_lr"])) + 1
    return -(off * off) - float(values["algorithm"] != "maml")


def run(name: str, num_trials: int, *, mode: str = "max", sign: float = 1.0, seed: int = 0) -> list[Tried]:
    found = searcher(name, SPACE, num_trials=num_trials, seed=seed, mode=mode)
    tried: list[Tried] = []
    for number in range(found.num_trials):
        values = found.suggest(number, tried)
        tried.append(Tried(values, sign * objective(values)))
    return tried


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_values_come_from_the_space_and_both_runs_are_the_same(name: str) -> None:
    first, again = run(name, 14), run(name, 14)
    assert first == again
    assert first != run(name, 14, seed=1)
    for values, _ in first:
        assert values.keys() == SPACE.keys()
        assert 0.001 <= values["inner_lr"] <= 1
        assert values["num_inner_steps"] in range(1, 6)
        assert values["algorithm"] in ("maml", "fomaml")
        assert values["clip_norm"] in (None, 1.0)


@pytest.mark.parametrize(("mode", "sign"), [("max", 1.0), ("min", -1.0)])
def test_tpe_comes_nearer_to_the_best_than_it_began(mode: str, sign: float) -> None:
    results = [sign * result for _, result in run("tpe", 40, mode=mode, sign=sign) if result is not None]
    assert sum(results[-15:]) / 15 > sum(results[:10]) / 10 + 0.3


def test_tpe_goes_on_where_others_failed() -> None:
    found = searcher("tpe", SPACE, num_trials=20, seed=0, mode="max")
    failed = [Tried(found.suggest(number, []), None) for number in range(12)]
    assert found.suggest(12, failed).keys() == SPACE.keys()


def test_a_grid_has_as_many_trials_as_points() -> None:
    space = parse(CONFIG, ["inner_lr=log:0.01:1:3", "num_inner_steps=int:1:2"])
    found = searcher("grid", space, num_trials=None, seed=0, mode="max")
    assert found.num_trials == 6
    assert [found.suggest(number, [])["num_inner_steps"] for number in range(6)] == [1, 2] * 3
    with pytest.raises(ConfigError, match="the grid has 6 points"):
        searcher("grid", space, num_trials=5, seed=0, mode="max")
