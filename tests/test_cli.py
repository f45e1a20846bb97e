"""The command line says what a configuration can say, and refuses the rest in one line."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distmaml.cli import guarded, parse_recipe, parse_search
from distmaml.config import Config, as_recipe, flatten, override
from distmaml.errors import ConfigError, RunError
from distmaml.limits import check
from distmaml.recipes import RECIPES
from distmaml.space import Search, to_text


def parse(*arguments: str) -> Config:
    return parse_recipe(arguments, prog="jobs/train.py", description="Trains.")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is printed where an option is refused; tyro exits with status 2."""
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    return re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().err)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_options_is_itself(name: str) -> None:
    assert parse(name) == RECIPES[name]()


@pytest.mark.parametrize("name", RECIPES)
def test_options_have_flat_names_in_every_recipe(name: str) -> None:
    rates = {"inner_lr": 0.3} if "inner_lr" in flatten(RECIPES[name]()) else {}
    words = "--num-outer-steps 7 --name x --seed 3 --clip-norm 2.5 --num-workers 2 --patience 4"
    arguments = (words + " --inner-lr 0.3" if rates else words).split()
    found = parse(name, *arguments, "--no-inductive", "--output-dir", "somewhere", "--schedule", "linear")
    expected = {**rates, "num_outer_steps": 7, "name": "x", "seed": 3, "clip_norm": 2.5, "num_workers": 2,
                "patience": 4, "inductive": False, "schedule": "linear"}  # fmt: skip
    flat = flatten(found)
    assert {n: flat[n] for n in expected} == expected
    assert str(flat["output_dir"]) == "somewhere"
    check(found)


def test_another_algorithm_keeps_the_rates_of_the_recipe_and_of_the_command_line() -> None:
    assert parse("glyphs-maml-5w1s", "--algorithm", "anil") == override(
        RECIPES["glyphs-maml-5w1s"](), {"algorithm": "anil"}
    )
    found = parse("glyphs-maml-5w1s", "--algorithm", "anil", "--inner-lr", "0.07")
    assert (found.algorithm, flatten(found)["inner_lr"]) == ("anil", 0.07)


def test_another_model_brings_its_options() -> None:
    found = parse("glyphs-maml-5w1s", "--model", "mlp", "--hidden-sizes", "16", "8")
    assert flatten(found)["hidden_sizes"] == (16, 8)
    assert parse("glyphs-maml-5w1s", "--model=mlp").model == "mlp"


def test_other_tasks_keep_what_both_know() -> None:
    found = parse("sinusoid-maml-5s", "--num-shots", "10", "--algorithm", "fomaml")
    assert (flatten(found)["num_shots"], found.algorithm) == (10, "fomaml")


def test_a_users_own_model_gets_its_arguments() -> None:
    found = parse(
        "sinusoid-maml-5s", "--model", "mine.nets:make", "--model-arguments", "width", "32", "deep", "True", "kind", "x"
    )
    assert found.model == "mine.nets:make"
    assert flatten(found)["model_arguments"] == {"width": 32, "deep": True, "kind": "x"}
    assert parse("sinusoid-maml-5s", "--model", "mine.nets:make").model == "mine.nets:make"


def test_an_unknown_recipe_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'glyphs-maml-5w2s'; did you mean 'glyphs-maml-5w1s'"):
        parse("glyphs-maml-5w2s")


def test_an_unknown_algorithm_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown algorithm 'anill'; did you mean 'anil'"):
        parse("glyphs-maml-5w1s", "--algorithm", "anill")


def test_an_unknown_option_is_named_with_a_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "glyphs-maml-5w1s", "--inner-lrr", "0.1")
    assert "--inner-lrr" in said
    assert "--inner-lr " in said


def test_an_option_of_another_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--num-filters" in refused(capsys, "glyphs-maml-5w1s", "--model", "mlp", "--num-filters", "3")


@pytest.mark.parametrize(("option", "value"), [("--num-ways", "five"), ("--schedule", "cosin"), ("--inner-lr", "fast")])
def test_a_value_of_the_wrong_type_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    said = refused(capsys, "glyphs-maml-5w1s", option, value)
    assert option in said
    assert value in said


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_recipe(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in RECIPES)


def test_help_of_a_recipe_lists_the_options_of_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("sinusoid-maml-5s", "--help")
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "--hidden-sizes" in said
    assert "--num-filters" not in said


def test_an_error_on_purpose_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise ConfigError("inner_lr=0 must be more.")

    assert guarded(main) == 2
    assert capsys.readouterr().err == "error: inner_lr=0 must be more.\n"


_INTERRUPTED = """
from distmaml.cli import guarded
def main():
    raise KeyboardInterrupt
guarded(main)
"""


def test_an_interrupt_is_status_130_and_one_line() -> None:
    ended = subprocess.run([sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr == "stopped\n"


def test_a_bug_keeps_its_traceback() -> None:
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(main)


# ----------------------------------------------------------------------------- recipe files and searches


def search(*arguments: str) -> tuple[Config, Search]:
    return parse_search(arguments, prog="jobs/tune.py", description="Searches.")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_file_is_a_recipe(tmp_path: Path, name: str) -> None:
    changed = {"inner_lr": 0.25, "algorithm": "anil", "clip_norm": 2.0}
    config = override(RECIPES[name](), {**changed, "name": "x", "num_workers": 3, "output_dir": tmp_path})
    (tmp_path / "best.json").write_text(json.dumps(as_recipe(config)))
    found = parse("--recipe-file", str(tmp_path / "best.json"), "--outer-lr", "0.5")
    assert found == override(RECIPES[name](), {**changed, "outer_lr": 0.5})


def test_a_recipe_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"inner_rl": 0.1}')
    for words, says in (
        (["--recipe-file"], "needs a file"),
        (["--recipe-file", str(tmp_path / "none.json")], "cannot be read"),
        (["--recipe-file", str(tmp_path / "other.json")], "did you mean 'inner_lr'"),
    ):
        with pytest.raises(ConfigError, match=says):
            parse(*words)


def test_options_of_a_search_stand_among_those_of_its_trials() -> None:
    config, options = search(
        "sinusoid-maml-5s", "--space", "inner_lr=log:1e-3:1.0", "--num-workers", "2", "--space", "outer_lr=log:1e-3:1",
        "--num-samples", "32", "--max-concurrent", "2", "--scheduler", "none", "--searcher", "tpe", "--seed", "4",
    )  # fmt: skip
    assert options == Search(
        space=("inner_lr=log:1e-3:1.0", "outer_lr=log:1e-3:1"), num_samples=32, max_concurrent=2, scheduler="none",
        searcher="tpe",
    )  # fmt: skip
    assert config == override(RECIPES["sinusoid-maml-5s"](), {"num_workers": 2, "seed": 4})
    assert search("glyphs-maml-5w1s") == (RECIPES["glyphs-maml-5w1s"](), Search())


def test_a_search_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    config = override(RECIPES["sinusoid-maml-5s"](), {"name": "s", "output_dir": tmp_path, "inner_lr": 0.3})
    options = Search(space=("outer_lr=log:0.001:1",), num_samples=3)
    (tmp_path / "searches" / "s").mkdir(parents=True)
    (tmp_path / "searches" / "s" / "search.json").write_text(to_text(config, options))
    found = search("--resume", "s", "--output-dir", str(tmp_path), "--max-concurrent", "1")
    assert found == (override(config, {"resume": True}), replace(options, max_concurrent=1))
    with pytest.raises(RunError, match="There are: s"):
        search("--resume", "t", "--output-dir", str(tmp_path))
    with pytest.raises(ConfigError, match="needs the name"):
        search("--resume")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--algorithm anil --regularization 1",
            "--regularization is no option of anil, which has --inner-lr, --num-inner",
        ),
        ("--no-learned-rates", "--no-learned-rates is no option of maml, which has --inner-lr, --num-inner-steps"),
        ("--algorithm matching_networks --inner-lr=1", "is no option of matching_networks, which has none"),
    ],
)
def test_an_option_of_another_algorithm_names_those_of_this_one(arguments: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse("glyphs-maml-5w1s", *arguments.split())
