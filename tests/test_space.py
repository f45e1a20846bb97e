"""Search spaces: what they hold, what they draw, and what they refuse."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distmaml.config import Config, override
from distmaml.errors import ConfigError
from distmaml.recipes.glyphs import glyphs_maml_5w1s
from distmaml.space import Search, check_search, check_space, grid, parse, read, sample, stages, to_text

CONFIG = glyphs_maml_5w1s()
RATES = ["inner_lr=log:0.001:1", "outer_lr=log:0.0001:0.01"]
FOUR = (
    "inner_lr=log:0.001:1",
    "weight_decay=uniform:0:0.5",
    "num_inner_steps=int:1:5",
    "algorithm=choice:maml,fomaml",
)


def test_texts_are_a_space_and_a_space_is_its_texts() -> None:
    written = (*FOUR, "outer_lr=log:0.0001:0.01:3", "clip_norm=choice:none,10.0")
    space = parse(CONFIG, written)
    assert tuple(f"{field}={domain}" for field, domain in space.items()) == written
    assert space["clip_norm"].values == (None, 10.0)


def test_a_log_range_gives_every_power_of_ten_as_often_as_the_next() -> None:
    domain = parse(CONFIG, FOUR)["inner_lr"]
    assert [domain.at(i / 3) for i in range(4)] == pytest.approx([0.001, 0.01, 0.1, 1.0], rel=1e-3)
    drawn = [sample({"inner_lr": domain}, 0, number)["inner_lr"] for number in range(3000)]
    decades = Counter(min(math.floor(math.log10(rate)), -1) for rate in drawn)
    assert all(abs(decades[d] - 1000) < 4 * math.sqrt(3000 * 2 / 9) for d in (-3, -2, -1))  # four sigma


def test_whole_numbers_and_choices_are_drawn_alike_and_both_ends_are_among_them() -> None:
    space = parse(CONFIG, FOUR)
    drawn = [sample(space, 1, number) for number in range(2000)]
    assert Counter(d["num_inner_steps"] for d in drawn).keys() == {1, 2, 3, 4, 5}
    assert all(
        abs(n - 400) < 4 * math.sqrt(2000 * 4 / 25) for n in Counter(d["num_inner_steps"] for d in drawn).values()
    )
    assert all(abs(n - 1000) < 4 * math.sqrt(500) for n in Counter(d["algorithm"] for d in drawn).values())
    assert all(0 <= d["weight_decay"] <= 0.5 for d in drawn)
    assert (space["num_inner_steps"].at(0.0), space["num_inner_steps"].at(1.0)) == (1, 5)


def test_a_configuration_is_a_function_of_seed_and_number() -> None:
    space = parse(CONFIG, FOUR)
    assert sample(space, 0, 7) == sample(space, 0, 7)
    assert len({str(sample(space, seed, number)) for seed in range(3) for number in range(50)}) == 150


def test_a_value_drawn_can_be_typed_on_a_command_line() -> None:
    space = parse(CONFIG, FOUR)
    for number in range(100):
        for value in sample(space, 0, number).values():
            assert len(str(value)) <= 10


def test_a_grid_is_the_product_with_the_last_field_fastest() -> None:
    space = parse(CONFIG, ["inner_lr=log:0.01:1:3", "num_inner_steps=int:1:2", "clip_norm=choice:none,1"])
    rows = [(row["inner_lr"], row["num_inner_steps"], row["clip_norm"]) for row in grid(space)]
    assert rows == [(rate, steps, clip) for rate in (0.01, 0.1, 1.0) for steps in (1, 2) for clip in (None, 1.0)]


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("inner_rl", "log:1e-3:1", "did you mean 'inner_lr'"),
        ("inner_lr", "lgo:1e-3:1", "did you mean 'log'"),
        ("inner_lr", "log:1:1e-3", "must lie above"),
        ("inner_lr", "log:0:1", "begins above 0"),
        ("inner_lr", "log:0.1", "LOW:HIGH"),
        ("inner_lr", "log:a:b", "'a'"),
        ("inner_lr", "log:0.1:inf", "inf"),
        ("inner_lr", "log:0.1:1:1", "2 points or more"),
        ("inner_lr", "int:1:5", "uniform or log"),
        ("num_inner_steps", "uniform:1:5", "int:LOW:HIGH"),
        ("num_inner_steps", "int:1.5:5", "1.5"),
        ("num_inner_steps", "int:1:5:3", "LOW:HIGH"),
        ("algorithm", "uniform:1:2", "choice"),
        ("algorithm", "choice:", "one value or more"),
        ("algorithm", "choice:maml,maml", "each once"),
        ("optimizer", "choice:adam,adan", "adan"),
    ],
)
def test_what_is_no_range_is_refused_with_the_way_out(field: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(CONFIG, [f"{field}={text}"])
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ([], "empty"),
        (["num_outer_steps=int:1:5"], "be the same for all trials"),
        (["num_workers=int:1:5"], "be the same for all trials"),
        (["selection_metric=choice:a,b"], "be the same for all trials"),
        (["num_ways=choice:2,5"], "be the same for all trials"),
        (["data_dir=choice:/a,/b"], "be the same for all trials"),
        (["seed=int:0:5"], "be the same for all trials"),
        (["inner_lr=uniform:-1:1"], "inner_lr=-1"),
        (["num_inner_steps=int:0:3"], "num_inner_steps=0"),
        (["algorithm=choice:maml,mmal"], "did you mean 'maml'"),
    ],
)
def test_values_that_a_run_could_not_have_are_refused_before_any_trial(space: Any, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_space(CONFIG, parse(CONFIG, space))
    assert says in str(refused.value)


def test_a_field_that_only_one_of_the_algorithms_has_is_refused() -> None:
    other: Config = override(CONFIG, {"algorithm": "package.module:own"})
    with pytest.raises(ConfigError, match="inner_lr"):
        check_space(other, parse(CONFIG, ["inner_lr=log:0.1:1"]))


@pytest.mark.parametrize(("texts", "says"), [(["inner_lr"], "FIELD=KIND"), (["outer_lr=log:1e-4:1"] * 2, "twice")])
def test_a_field_comes_once_and_with_what_it_may_be(texts: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(CONFIG, texts)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"storage": "s3://bucket/x"}, r"--storage is for a single run.*--output-dir that all nodes see"),
        ({"num_workers": "2:8"}, r"num_workers=2:8: .* Take --num-workers 2"),
    ],
)
def test_what_a_search_cannot_do_yet_is_refused(changes: dict[str, Any], says: str) -> None:
    config = override(CONFIG, {"num_outer_steps": 100, "val_every": 10, **changes})
    with pytest.raises(ConfigError, match=says):
        check_search(config, Search(), parse(config, RATES))


def test_a_grid_of_a_range_asks_for_its_points() -> None:
    with pytest.raises(ConfigError, match=r"inner_lr=log:0\.1:1:5"):
        grid(parse(CONFIG, ["inner_lr=log:0.1:1"]))


@pytest.mark.parametrize(
    ("changes", "options", "space", "says"),
    [
        ({"num_workers": 2}, {}, RATES, "num_workers=2"),
        ({}, {"searcher": "tpe"}, RATES, "searcher='tpe'"),
        ({}, {"num_samples": 1}, RATES, "num_samples=1"),
        ({}, {"move_every": 15}, RATES, "move_every=15 must be a multiple of val_every=10"),
        ({}, {"move_every": 0}, RATES, "move_every=0"),
        ({}, {"move_every": 100}, RATES, "nothing to do"),
        ({"val_every": 100}, {}, RATES, "--val-every"),
        ({}, {}, [*RATES, "num_inner_steps=int:1:3"], "num_inner_steps=int:1:3"),
        ({}, {}, [*RATES, "algorithm=choice:maml,anil"], "algorithm=choice:maml,anil"),
    ],
)
def test_what_a_population_cannot_do_is_refused(
    changes: dict[str, Any], options: dict[str, Any], space: list[str], says: str
) -> None:
    config = override(CONFIG, {"num_outer_steps": 100, "val_every": 10})
    check_search(config, Search(scheduler="pbt"), parse(config, RATES))
    config = override(config, changes)
    with pytest.raises(ConfigError) as refused:
        check_search(config, Search(scheduler="pbt", **options), parse(config, space))
    assert says in str(refused.value)


def test_a_population_meets_at_validations_about_an_eighth_apart() -> None:
    config = override(CONFIG, {"num_outer_steps": 1000, "val_every": 10})
    assert stages(Search(scheduler="asha"), config) == [1000]
    assert stages(Search(scheduler="pbt"), config) == [130, 260, 390, 520, 650, 780, 910, 1000]
    assert stages(Search(scheduler="pbt", move_every=500), config) == [500, 1000]


@pytest.mark.parametrize(
    ("options", "name", "says"),
    [
        ({"move_every": 10}, "s", "move_every=10 belongs to --scheduler pbt"),
        ({"scheduler": "none", "first_rung": 10}, "s", "first_rung=10 belongs to --scheduler asha"),
        ({"first_rung": 15}, "s", "first_rung=15 must be a multiple of val_every=10"),
        ({"num_samples": 10**9}, "s", "num_samples=1000000000"),
        ({"scheduler": "ahsa"}, "s", "did you mean 'asha'"),
        ({}, 94 * "s", "longer than 93"),
    ],
)
def test_what_no_search_can_do_is_refused(options: dict[str, Any], name: str, says: str) -> None:
    config = override(CONFIG, {"num_outer_steps": 100, "val_every": 10, "name": name})
    with pytest.raises(ConfigError) as refused:
        check_search(config, Search(**options), parse(config, RATES))
    assert says in str(refused.value)


def test_a_grid_that_no_memory_could_hold_is_refused_before_it_is_made() -> None:
    space = parse(CONFIG, ["inner_lr=log:0.001:1:100000", "outer_lr=log:0.0001:0.01:100000"])
    with pytest.raises(ConfigError, match="10000000000 points"):
        grid(space)


@pytest.mark.parametrize(
    "damage",
    [
        {"num_samples": 4.5},
        {"search_seed": "x"},
        {"space": [5]},
        {"space": 5},
        {"scheduler": None},
        {"searcher": "foo"},
        {"unheard": 1},
    ],
)
def test_the_file_of_a_search_that_somebody_has_changed_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    file = tmp_path / "search.json"
    file.write_text(to_text(CONFIG, Search(space=tuple(RATES), num_samples=4)))
    assert read(file) == (CONFIG, Search(space=tuple(RATES), num_samples=4))
    record = json.loads(file.read_text())
    record["search"].update(damage)
    file.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"search\.json is damaged"):
        read(file)
    file.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"search\.json is damaged"):
        read(file)
