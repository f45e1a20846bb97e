"""A configuration goes through JSON and overrides unharmed, and what cannot work is refused by name."""

import ast
import dataclasses
import itertools
import json
import math
import os
import re
import typing
from pathlib import Path
from typing import Any, cast

import pytest

from distmaml import config as module
from distmaml import limits, options
from distmaml.config import Cluster, Config, Evaluation, Outer, Run, flatten, from_json, override, to_json
from distmaml.errors import ConfigError
from distmaml.limits import check
from distmaml.options import OPTIONS
from distmaml.recipes import RECIPES

CUSTOM = {"algorithm": "mine:algorithm", "model": "mine:model", "tasks": "mine:tasks"}
COMBINATIONS = [
    dict(zip(OPTIONS, names, strict=True))
    for names in itertools.product(*([*table, CUSTOM[selector]] for selector, (table, _) in OPTIONS.items()))
]
"""Every selection of algorithm, model and tasks, with a user's own among them."""


def through_json(config: Config) -> Config:
    return from_json(json.loads(json.dumps(to_json(config))))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_through_json_unharmed_and_passes_its_checks(name: str) -> None:
    config = RECIPES[name]()
    assert config.recipe == name
    assert through_json(config) == config
    check(config)


@pytest.mark.parametrize("selection", COMBINATIONS, ids=lambda s: "-".join(s.values()))
def test_every_combination_goes_through_json_and_has_flat_names_that_are_unique(selection: dict[str, str]) -> None:
    config = override(Config(), selection)
    assert through_json(config) == config

    def names(part: Any) -> list[str]:
        found: list[str] = []
        for entry in dataclasses.fields(part):
            value = getattr(part, entry.name)
            found += names(value) if dataclasses.is_dataclass(value) else [entry.name]
        return found

    assert sorted(names(config)) == sorted(flatten(config))


def test_overrides_of_every_type_go_through_json() -> None:
    values = {
        "model": "mlp", "hidden_sizes": (7, 8), "output_dir": Path("/tmp/x"), "clip_norm": 2.0, "patience": 3,
        "schedule": "linear", "inductive": False, "name": "a", "data_dir": None, "inner_lr": 0.25,
    }  # fmt: skip
    config = override(Config(), values)
    assert {name: flatten(config)[name] for name in values} == values
    assert through_json(config) == config
    mine = override(
        Config(), {"model": "mine:net", "model_arguments": {"width": 3, "deep": True, "kind": "x", "rate": 0.5}}
    )
    assert through_json(mine) == mine


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_ways", "5"),
        ("num_ways", 5.0),
        ("num_ways", True),
        ("inner_lr", "0.1"),
        ("schedule", "cosin"),
        ("patience", "x"),
        ("algorithm", None),
        ("tasks", ["sinusoid"]),
        ("inner_lr", 10**400),
        ("num_outer_steps", 10**30),
        ("hidden_sizes", [[1], 2]),
        ("model_arguments", {"width": None}),
        ("name", "\ud800"),
        ("data_dir", "a\0b"),
        ("model_arguments", {"\0": 1}),
    ],
)
def test_json_of_the_wrong_type_is_refused(name: str, value: Any) -> None:
    selected = {"hidden_sizes": {"model": "mlp"}, "model_arguments": {"model": "mine:net"}}.get(name, {})
    with pytest.raises(ConfigError, match=re.escape(f"{name}=")):
        from_json({**to_json(override(Config(), selected)), name: value})


def test_what_an_error_shows_of_a_value_is_one_short_line() -> None:
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    for value in (deep, ["\n" * 1000] * 1000, 10**400, {"x" * 1000: 1}):
        with pytest.raises(ConfigError) as caught:
            from_json({"num_ways": value})
        assert len(str(caught.value)) < 120
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=r"num_outer_steps=1000000000"):
        from_json({"num_outer_steps": 10**30})


def test_a_path_that_is_not_unicode_goes_through_json() -> None:
    config = override(Config(), {"data_dir": Path(os.fsdecode(b"caf\xe9"))})
    assert through_json(config) == config


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"{", b"[" * 5000, b"\xff\xfe\xfd", b'{"seed": ' + b"9" * 5000 + b"}", b'{"a": 1}' + b" " * 2**20],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.json .* Take another one"):
        module.read(tmp_path / "x.json")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        module.read(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "right"), [("inner_lrr", "inner_lr"), ("num_way", "num_ways"), ("outer-lr", "outer_lr")]
)
def test_an_unknown_option_gets_the_nearest_name(wrong: str, right: str) -> None:
    expected = f"unknown option '{wrong}'; did you mean '{right}'"
    with pytest.raises(ConfigError, match=expected):
        override(Config(), {wrong: 1})
    with pytest.raises(ConfigError, match=expected):
        from_json({wrong: 1})


@pytest.mark.parametrize(
    ("selector", "wrong", "right"),
    [("algorithm", "mamel", "maml"), ("model", "conv", "conv4"), ("tasks", "sinus", "sinusoid")],
)
def test_an_unknown_name_of_a_table_gets_the_nearest(selector: str, wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown {selector} '{wrong}'; did you mean '{right}'"):
        override(Config(), {selector: wrong})
    with pytest.raises(ConfigError, match=f"did you mean '{right}'"):
        check(dataclasses.replace(Config(), **cast(Any, {selector: wrong})))


def test_an_option_of_another_algorithm_names_those_of_this_one() -> None:
    expected = "regularization is no option of maml, which has inner_lr, num_inner_steps"
    with pytest.raises(ConfigError, match=expected):
        override(Config(), {"regularization": 1.0})
    with pytest.raises(ConfigError, match=expected):
        module.parse_field(Config(), "regularization", "1")
    with pytest.raises(ConfigError, match=expected):
        from_json({"algorithm": "maml", "regularization": 1.0})


def test_another_algorithm_or_task_keeps_the_values_that_both_know() -> None:
    config = override(Config(), {"inner_lr": 0.3, "num_inner_steps": 2, "num_shots": 4, "num_queries": 7})
    changed = override(config, {"algorithm": "anil", "tasks": "sinusoid", "num_eval_queries": 9})
    flat = flatten(changed)
    assert [flat[n] for n in ("inner_lr", "num_inner_steps", "num_shots", "num_queries", "num_eval_queries")] == [
        0.3, 2, 4, 7, 9,
    ]  # fmt: skip
    assert "num_ways" not in flat


def test_an_override_leaves_the_original_as_it_was() -> None:
    config = Config()
    override(config, {"inner_lr": 0.3, "model": "mlp"})
    assert config == Config()


def test_every_field_has_a_docstring_under_it() -> None:
    trees = [ast.parse(Path(str(file.__file__)).read_text()) for file in (module, options)]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {"Config", "InnerLoop", "Outer"} <= {cls.name for cls in classes}
    for cls in classes:
        for entry, after in itertools.pairwise([*cls.body, None]):
            if isinstance(entry, ast.AnnAssign):
                described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert described, f"{cls.name}.{ast.unparse(entry.target)} has no docstring"


POSITIVE = [
    "num_inner_steps", "num_filters", "image_size", "num_shots", "num_queries", "num_eval_queries", "num_outer_steps",
    "meta_batch_size", "reduction_chunk", "num_eval_steps", "log_every", "checkpoint_every", "num_val_episodes",
    "patience",
]  # fmt: skip


def test_every_number_has_its_limits() -> None:
    kinds = [kind for table, custom in OPTIONS.values() for kind in (*table.values(), custom)]
    groups = [*kinds, Outer, Evaluation, Run, Cluster]
    hints = {name: str(hint) for kind in groups for name, hint in typing.get_type_hints(kind).items()}
    numbers = {name for name, hint in hints.items() if re.search(r"\b(int|float)\b", hint) and "dict" not in hint}
    assert numbers - limits.POSITIVE - limits.NOT_NEGATIVE - limits.POSITIVE_RATES == {
        "final_lr_fraction", "hidden_sizes", "num_workers",  # which are looked at one by one
    }  # fmt: skip
    assert not limits.POSITIVE & limits.NOT_NEGATIVE | limits.POSITIVE_RATES & (limits.POSITIVE | limits.NOT_NEGATIVE)


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_one_is_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} must be 1 or more"):
        check(override(Config(), {name: value}))


@pytest.mark.parametrize("value", [0, -1, "0", "x", "", "2:", ":2", "8:2", "0:2", "1:2:3", "1.5", "-1:2"])
def test_a_number_of_workers_that_is_none_is_refused(value: int | str) -> None:
    with pytest.raises(ConfigError, match=f"num_workers='{value}' must be 1 or more, or LEAST:MOST"):
        check(override(Config(), {"num_workers": value}))


@pytest.mark.parametrize(("value", "team"), [(1, (1, 1)), ("3", (3, 3)), ("2:8", (2, 8)), ("2:2", (2, 2))])
def test_a_number_of_workers_may_be_a_range(value: int | str, team: tuple[int, int]) -> None:
    config = override(Config(), {"num_workers": value})
    check(config)
    assert config.cluster.team == team
    assert from_json(to_json(config)) == config


RATES = ["inner_lr", "outer_lr", "clip_norm", "gpus_per_worker", "collective_timeout", "node_timeout"]


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
def test_a_rate_that_is_not_positive_and_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} must be greater than 0 and finite"):
        check(override(Config(), {name: value}))


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_imaml_without_a_pull_is_sent_to_maml(value: float) -> None:
    with pytest.raises(ConfigError, match=r"regularization=.* and finite\. iMAML divides by it; .* --algorithm maml\."):
        check(override(Config(), {"algorithm": "imaml", "regularization": value}))
    with pytest.raises(ConfigError, match=r"regularization=inf must be greater than 0 and finite\.$"):
        check(override(Config(), {"algorithm": "imaml", "regularization": math.inf}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("val_every", -1), ("num_test_episodes", -5), ("max_failures", -1), ("seed", -1), ("weight_decay", -0.1),
     ("weight_decay", math.nan), ("weight_decay", math.inf)],
)  # fmt: skip
def test_a_negative_value_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} must be 0 or more"):
        check(override(Config(), {name: value}))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_final_share_outside_zero_and_one_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="final_lr_fraction"):
        check(override(Config(), {"final_lr_fraction": value}))


@pytest.mark.parametrize("value", [1, 0])
def test_fewer_than_two_ways_are_refused(value: int) -> None:
    with pytest.raises(ConfigError, match=f"num_ways={value}"):
        check(override(Config(), {"num_ways": value}))


def test_an_empty_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_sizes"):
        check(override(Config(), {"model": "mlp", "hidden_sizes": (4, 0)}))


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "a b", "a\n", "a\\b", "~x", "a:b", "%2e"])
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="may hold only letters, digits"):
        check(override(Config(), {"name": name}))


@pytest.mark.parametrize("name", ["a", "glyphs-maml_5w.1s", "2024-01-01", "straße", None])
def test_a_plain_name_is_accepted(name: str | None) -> None:
    check(override(Config(), {"name": name}))
