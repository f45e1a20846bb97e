"""Published experiments once more: what a row is, what is refused before one is trained, and how a command goes on."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distmaml import driver, paths
from distmaml.comparison import BEGIN, END, read_rows
from distmaml.config import flatten, from_json, override
from distmaml.errors import ConfigError, DistmamlError, RunError
from distmaml.plans import Plan, Request, plans_of
from distmaml.published import PUBLISHED, Published
from distmaml.recipes import RECIPES
from distmaml.reproduction import described, listing, minutes_of, reproduce, still_rose
from distmaml.segments import Point
from distmaml.tracking.outbox import Outbox
from tests.conftest import StartJob
from tests.runs import run_serially

WAVES, GLYPHS = "sinusoid-maml-5s", "glyphs-maml-5w1s"
TINY = ("hidden_sizes=[4]", "meta_batch_size=2", "num_val_episodes=4", "num_eval_steps=5", "num_eval_queries=5")
"""Sine waves of a moment, were it not for the 600 episodes of the test."""


def paper(value: float, *, num_outer_steps: int, meta_batch_size: int, **values: Any) -> Published:
    """What a paper prints, without an interval."""
    known: dict[str, Any] = {
        "half_width": None,
        "source": "a table",
        "url": "https://arxiv.org/abs/1",
        "mode": "either",
    }
    return Published(
        value=value, num_outer_steps=num_outer_steps, meta_batch_size=meta_batch_size, **{**known, **values}
    )  # fmt: skip


def asked(*recipes: str, tasks: int | None = 24, changes: tuple[str, ...] | None = None, **values: Any) -> Request:
    return Request(recipes=recipes, tasks=tasks, changes=() if changes is None else (changes,), **values)


def plan(*recipes: str, **values: Any) -> Plan:
    (found,) = plans_of(asked(*recipes, **values))
    return found


# ---------------------------------------------------------------------------------------------------- plans


def test_a_plan_is_its_recipe_for_so_many_tasks() -> None:
    found = plan(GLYPHS, tasks=4801, data_dir=Path("data"), num_workers=3)
    # 4,801 / 8 = 600.1 steps; a twelfth and a sixtieth of 601
    expected = {"num_outer_steps": 601, "val_every": 51, "checkpoint_every": 11, "num_test_episodes": 1000, "seed": 0,
                "data_dir": Path("data"), "num_workers": 3, "inductive": True,
                "name": "reproduce-glyphs-maml-5w1s-4801-s0"}  # fmt: skip
    assert found.config == override(RECIPES[GLYPHS](), expected)
    assert (found.overrides, found.schedules) == ({}, {})


def test_a_regression_is_not_tested_inductively_and_needs_no_data() -> None:
    found = plan(WAVES, data_dir=Path("data"))
    assert found.config.evaluation.inductive is False
    assert "data_dir" not in flatten(found.config)


def test_outer_steps_follow_from_the_tasks_of_a_step() -> None:
    assert plan(GLYPHS, tasks=4800, changes=("meta_batch_size=32",)).config.outer.num_outer_steps == 150
    assert plan(GLYPHS, tasks=1).config.outer.num_outer_steps == 1


def test_what_is_set_is_in_the_run_and_wins_over_what_follows_from_the_tasks() -> None:
    found = plan(GLYPHS, tasks=4800, changes=("val_every=7", "inner_lr=0.05", "clip_norm=none", "num_filters=16"))
    flat = flatten(found.config)
    assert [flat[field] for field in ("val_every", "inner_lr", "clip_norm", "num_filters")] == [7, 0.05, None, 16]
    assert found.overrides == {"val_every": 7, "inner_lr": 0.05, "clip_norm": None, "num_filters": 16}


def test_none_is_a_name_where_a_field_has_such_a_one() -> None:
    assert plan(GLYPHS, changes=("rotations=none",)).overrides == {"rotations": "none"}
    assert plan(GLYPHS, changes=("clip_norm=none",)).overrides == {"clip_norm": None}


def test_another_model_may_be_set_with_its_own_options() -> None:
    found = plan(GLYPHS, changes=("model=mlp", "hidden_sizes=[16, 8]"))
    assert flatten(found.config)["hidden_sizes"] == (16, 8)
    assert found.overrides == {"model": "mlp", "hidden_sizes": [16, 8]}
    assert plan(GLYPHS, changes=("hidden_sizes=[16, 8]", "model=mlp")).config == found.config
    with pytest.raises(ConfigError, match="num_filters=16 for glyphs-maml-5w1s: unknown field 'num_filters'"):
        plan(GLYPHS, changes=("num_filters=16", "model=mlp"))


def names(*recipes: str, **values: Any) -> list[str]:
    return [found.name for found in plans_of(asked(*recipes, **values))]


def test_a_name_is_that_of_the_same_row_alone() -> None:
    assert names(GLYPHS, WAVES, GLYPHS, seeds=(0, 7, 0)) == [
        "reproduce-glyphs-maml-5w1s-24-s0", "reproduce-glyphs-maml-5w1s-24-s7", "reproduce-sinusoid-maml-5s-24-s0",
        "reproduce-sinusoid-maml-5s-24-s7",
    ]  # fmt: skip
    rates = ("outer_lr=0.1", "inner_lr=0.2")
    same = [names(WAVES, changes=changes) for changes in (rates, rates[::-1], ("outer_lr=1e-1", "inner_lr=2e-1"))]
    assert same[0] == same[1] == same[2]
    assert list(plan(WAVES, changes=rates).overrides) == ["inner_lr", "outer_lr"], "in one order, whatever was typed"
    others = [names(WAVES), names(WAVES, changes=rates[:1]), names(WAVES, num_test_episodes=700), same[0]]
    assert len({name for (name,) in others}) == 4
    assert names(WAVES, num_test_episodes=1000, data_dir=Path("x"), num_workers=1) == names(WAVES)


def test_what_decides_no_figure_makes_no_other_row() -> None:
    aside = plan(WAVES, changes=("log_every=3", "checkpoint_every=7", "inner_lr=0.2"))
    assert aside.name == plan(WAVES, changes=("inner_lr=0.2",)).name
    assert aside.overrides == {"inner_lr": 0.2}
    assert (aside.config.run.log_every, aside.config.run.checkpoint_every) == (3, 7)


def test_a_command_makes_its_row_and_no_other() -> None:
    many = asked(WAVES, GLYPHS, seeds=(0, 7), data_dir=Path("/home/me/data"))
    assert [found.command for found in plans_of(many)][3] == (
        "python jobs/reproduce.py glyphs-maml-5w1s --tasks 24 --seeds 7 --num-test-episodes 1000 --num-workers 2 "
        "--data-dir DIR"
    )
    assert "--set 'hidden_sizes=[4, 4]' --num" in plan(WAVES, changes=("hidden_sizes=[4, 4]",)).command
    assert "--data-dir" not in plans_of(many)[1].command, "waves are in no file"


# ------------------------------------------------------------------------------------------------ schedules


@pytest.fixture
def _plus_plus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of MAML++ whose paper has 50,000 steps of 8 tasks."""
    recipe = override(RECIPES[GLYPHS](), {"algorithm": "maml_plus_plus", "recipe": "glyphs-maml-plus-plus-5w1s"})
    recipe = override(recipe, {"annealing_steps": 5000, "first_order_steps": 101, "meta_batch_size": 8})
    monkeypatch.setitem(RECIPES, "glyphs-maml-plus-plus-5w1s", lambda: recipe)
    published = paper(99.47, num_outer_steps=50_000, meta_batch_size=8)
    monkeypatch.setitem(PUBLISHED, "glyphs-maml-plus-plus-5w1s", published)


@pytest.mark.usefixtures("_plus_plus")
def test_schedules_that_count_outer_steps_shrink_with_them() -> None:
    # 48,000 tasks are 6,000 of 50,000 steps: 12 % of 5,000 are 600, and of 101 are 12.12
    found = plan("glyphs-maml-plus-plus-5w1s", tasks=48_000)
    assert found.schedules == {"annealing_steps": [5000, 600], "first_order_steps": [101, 13]}
    flat = flatten(found.config)
    assert (flat["annealing_steps"], flat["first_order_steps"]) == (600, 13)
    whole = plan("glyphs-maml-plus-plus-5w1s", tasks=400_000)
    assert whole.schedules["annealing_steps"] == [5000, 5000]


@pytest.mark.usefixtures("_plus_plus")
def test_a_schedule_that_is_off_or_that_somebody_has_set_stays_as_it_is() -> None:
    found = plan("glyphs-maml-plus-plus-5w1s", tasks=48_000, changes=("annealing_steps=7", "first_order_steps=0"))
    assert found.schedules == {}
    assert flatten(found.config)["annealing_steps"] == 7
    assert flatten(found.config)["first_order_steps"] == 0


# ----------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (GLYPHS, ("maml", "glyphs 5-way 1-shot")),
        ("omniglot-maml-5w5s", ("maml", "omniglot 5-way 5-shot")),
        (WAVES, ("maml", "sinusoid 5-shot")),
        ("image-folder-maml", ("maml", "image-folder 5-way 1-shot")),
        ("omniglot-maml-5w1s-paper", ("maml-paper", "omniglot 5-way 1-shot")),
        ("omniglot-imaml-hf-5w1s", ("imaml-hf", "omniglot 5-way 1-shot")),
        ("mini-imagenet-maml-plus-plus-5w5s", ("maml-plus-plus", "mini-imagenet 5-way 5-shot")),
        ("omniglot-prototypical-networks-20w1s", ("prototypical-networks", "omniglot 20-way 1-shot")),
        ("sinusoid-cavia-10s", ("cavia", "sinusoid 10-shot")),
    ],
)
def test_a_recipe_is_described_by_its_algorithm_and_its_setting(recipe: str, says: tuple[str, str]) -> None:
    assert described(recipe) == says


def test_no_two_recipes_are_described_alike() -> None:
    assert len({described(recipe) for recipe in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize(
    ("values", "lower_is_better", "rose"),
    [
        ([10.0, 20.0, 30.0, 35.0, 38.0, 37.0], False, 2.0),  # 4 of 6 steps: 35
        ([4.0, 3.0, 2.0, 1.0, 0.75, 0.5], True, 0.5),
        ([10.0, 20.0, 30.0, None, 38.0, 37.0], False, None),
        ([10.0, 20.0, 30.0, 35.0, 38.0, None], False, None),
        ([10.0], False, None),
        ([], False, None),
    ],
)
def test_a_validation_still_rose_by_what_its_last_third_brought(
    values: list[float | None], lower_is_better: bool, rose: float | None
) -> None:
    curve = [(100 * number, value) for number, value in enumerate(values, start=1)]
    assert still_rose(curve, lower_is_better=lower_is_better) == rose


def test_minutes_are_those_of_all_starts_and_none_between_them(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.folder.mkdir()
    minute = 60_000
    outbox.append("started", 10 * minute, {})
    outbox.append("artifact", 11 * minute, {})
    outbox.append("ended", 13 * minute, {"status": "KILLED"})
    outbox.append("started", 100 * minute, {})  # its driver was killed outright after the last of these points
    points = [Point(step, minute * at, {}) for step, at in ((1, 12), (2, 101), (3, 104), (4, 201))]
    outbox.append("started", 200 * minute, {})
    outbox.append("ended", 202 * minute, {"status": "FINISHED"})
    assert minutes_of(outbox, points) == 3 + 4 + 2


# ---------------------------------------------------------------------------------------------------- whole


class Place:
    """A folder with a file for the table, and requests that write there."""

    def __init__(self, folder: Path, output_dir: Path) -> None:
        self.folder, self.output_dir = folder, output_dir
        self.table, self.results = folder / "RESULTS.md", folder / "rows"
        self.table.write_text(f"# Results\n\n{BEGIN}\n{END}\n")

    def request(self, *recipes: str, **values: Any) -> Request:
        wanted = {"changes": TINY, "num_test_episodes": 600, "num_workers": 1, **values}
        return asked(*recipes, output_dir=self.output_dir, results=self.results, table=self.table, **wanted)


@pytest.fixture
def place(tmp_path: Path, output_dir: Path) -> Place:
    return Place(tmp_path, output_dir)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is begun all the same fails the test."""
    monkeypatch.setattr(driver, "train", lambda config: pytest.fail(f"{config.run.name} was begun"))


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("recipes", "values", "message"),
    [
        ([], {}, "name one recipe or more; --list shows them"),
        (["sinusoid-mamel-5s"], {}, "unknown recipe 'sinusoid-mamel-5s'; did you mean 'sinusoid-maml-5s'"),
        ([WAVES, "x"], {}, r"unknown recipe 'x'\. Known: .*glyphs-maml-5w1s"),
        ([WAVES], {"tasks": None}, "--tasks does not say for how many tasks"),
        ([WAVES], {"tasks": 0}, "--tasks 0 must be 1 or more"),
        ([WAVES], {"num_test_episodes": 599}, "--num-test-episodes 599 must be 600 or more"),
        ([WAVES], {"seeds": ()}, "--seeds must be"),
        ([WAVES], {"seeds": (0, -1)}, "seed=-1 must be 0 or more"),
        ([WAVES], {"num_workers": 0}, "num_workers='0' must be 1 or more"),
        (
            [WAVES],
            {"changes": ("innr_lr=1",)},
            "innr_lr=1 for sinusoid.*unknown field 'innr_lr'; did you mean 'inner_lr'",
        ),
        (
            [GLYPHS, WAVES],
            {"changes": ("num_filters=8",)},
            "for sinusoid-maml-5s: unknown field .*Known: address, check",
        ),
        (
            [WAVES],
            {"changes": ("regularization=1",)},
            "for sinusoid-maml-5s: regularization is no option of maml, which has inner_lr, num_inner_steps",
        ),
        ([WAVES], {"changes": ("meta_batch_size=0",)}, "--set meta_batch_size=0 must be 1 or more"),
        ([WAVES], {"tasks": 10**400}, r"--tasks .* must be 1 or more, and 1e\+12 or less"),
        ([WAVES], {"changes": (f"inner_lr={'[' * 20_000}",)}, r"inner_lr='\[\[.* must be a number"),
        ([GLYPHS], {"changes": ("rotations=no",)}, "rotations='no' must be one of none, train, all"),
        ([WAVES], {"changes": ()}, "--set has no field=value behind it"),
        ([WAVES], {"changes": ("inner_lr",)}, "--set inner_lr must be field=value"),
        ([WAVES], {"changes": ("inner_lr=fast",)}, "inner_lr='fast' must be a number"),
        ([WAVES], {"changes": ("inner_lr=0",)}, "inner_lr=0.0 must be greater than 0"),
        ([WAVES], {"changes": ("num_outer_steps=3",)}, "num_outer_steps=3 is not possible: .* follows from --tasks"),
        ([WAVES], {"changes": ("algorithm=anil",)}, "algorithm=anil is not possible: .* follows from the recipe"),
        ([GLYPHS], {"changes": ("dataset=omniglot",)}, "dataset=omniglot is not possible: .* follows from the recipe"),
        ([GLYPHS], {"changes": ("split=maml",)}, "split=maml is not possible: .* follows from the recipe"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    place: Place, recipes: list[str], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        reproduce(place.request(*recipes, **values))
    assert not place.results.exists()


@pytest.mark.usefixtures("untrained")
def test_places_that_cannot_be_written_are_named_before_anything_is_trained(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong: list[tuple[dict[str, Any], type[DistmamlError], str]] = [
        ({"results": tmp_path / "file" / "rows"}, RunError, r"cannot write in .*file/rows .*--results"),
        ({"table": tmp_path / "none.md"}, ConfigError, r"--table .*none\.md cannot be read"),
        ({"table": tmp_path / "file"}, ConfigError, r"--table .*file does not have the lines .*Add the two"),
        ({"output_dir": tmp_path / "file" / "out"}, RunError, r"cannot write in .*--output-dir"),
    ]
    for change, error, message in wrong:
        with pytest.raises(error, match=message):
            reproduce(replace(place.request(WAVES), **change))
    (tmp_path / "images").touch()
    with pytest.raises(RunError, match=r"cannot write in .*images .*--table"):
        reproduce(place.request(WAVES))
    place.results.mkdir(exist_ok=True)
    (place.results / "old.json").write_text("{}")
    with pytest.raises(RunError, match=r"old\.json is no row"):
        reproduce(place.request(WAVES))


@pytest.fixture
def serially(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs train and are tested in this process."""
    run_serially(monkeypatch)


@pytest.mark.usefixtures("serially")
def test_a_row_holds_what_its_run_came_to(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PUBLISHED, WAVES, paper(0.35, num_outer_steps=70_000, meta_batch_size=25))
    request = place.request(WAVES, seeds=(3,))
    assert reproduce(request) == []
    (found,) = read_rows(place.results)
    assert f"{found.name}: {found.transductive['mean']:.3f} +- " in (said := capsys.readouterr().err)
    assert " mean squared error; published 0.35\n" in said
    folder = place.output_dir / "runs" / found.name
    tested = json.loads((folder / "evaluation-test.json").read_text())
    losses = tested["scores"]["transductive"]["query_loss"]
    assert (found.recipe, found.algorithm, found.setting, found.seed, found.tasks) == (
        WAVES, "maml", "sinusoid 5-shot", 3, 24,
    )  # fmt: skip
    assert (found.outer_steps, found.inner_steps, found.num_test_episodes, found.num_workers) == (12, 5, 600, 1)
    assert found.share_of_paper == pytest.approx(24 / 1_750_000)
    assert found.transductive == losses[5]
    assert found.query_loss == {"1": losses[1], "5": losses[5]}
    assert (found.inductive, found.unit) == (None, "mean squared error")
    assert [step for step, _ in found.validation] == list(range(1, 13))
    assert found.chosen_step == min(found.validation, key=lambda point: point[1] or 0.0)[0]
    assert found.minutes > 0
    assert 0 < found.cpu_seconds < 60 * found.minutes * 64
    assert found.overrides["hidden_sizes"] == [4]
    assert found.published is not None
    assert "data_dir" not in found.config
    assert (found.machine["cores"], found.machine["gpu"]) == (os.cpu_count(), None)
    assert from_json(found.config).outer == plans_of(request)[0].config.outer
    text = place.table.read_text()
    assert f"[json](rows/{found.name}.json)" in text
    assert "| maml (1) | sinusoid 5-shot | [0.35](https://arxiv.org/abs/1) |" in text
    assert (place.folder / "images" / "reproduction.png").exists()
    assert found.name.removeprefix(f"reproduce-{WAVES}-") in listing(request)


@pytest.mark.usefixtures("serially")
def test_a_row_that_fails_is_said_and_the_others_are_made(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("meta_batch_size=2", "num_val_episodes=4", "num_eval_steps=1", "num_eval_queries=5")
    (failed,) = reproduce(place.request("image-folder-maml", WAVES, changes=quick))
    assert failed.startswith("reproduce-image-folder-maml-24-")
    assert f"error: {failed}: " in capsys.readouterr().err
    assert [found.recipe for found in read_rows(place.results)] == [WAVES]
    assert failed not in place.table.read_text()


@pytest.mark.usefixtures("serially")
def test_a_row_that_is_there_is_not_made_again_and_one_whose_run_is_there_is_not_trained_again(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = place.request(WAVES)
    reproduce(request)
    (made,) = place.results.iterdir()
    before, text = made.read_bytes(), place.table.read_text()
    monkeypatch.setattr(driver, "train", lambda config: pytest.fail("trained again"))
    capsys.readouterr()
    place.table.write_text(f"# Results\n\n{BEGIN}\n{END}\n")
    assert reproduce(request) == []
    assert capsys.readouterr().err == f"{made.stem} is there: {made}\n"
    assert place.table.read_text() == text
    made.unlink()
    assert reproduce(request) == []
    assert made.read_bytes() == before
    assert "It is trained already" in capsys.readouterr().err


@pytest.mark.usefixtures("serially")
def test_a_run_whose_test_cannot_be_read_stops_no_other_row(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    request = place.request(WAVES, seeds=(0, 1))
    (first, second) = plans_of(request)
    assert reproduce(request) == []
    for row in place.results.iterdir():
        row.unlink()
    (paths.run_folder(first.config) / "evaluation-test.json").write_text("{")
    assert reproduce(request) == [first.name]
    assert [row.name for row in read_rows(place.results)] == [second.name]
    assert "evaluation-test.json, the test of a run that has ended, cannot be read" in capsys.readouterr().err


@pytest.mark.usefixtures("serially")
def test_a_run_of_other_settings_under_a_rows_name_is_not_taken_for_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    request = place.request(WAVES)
    (planned,) = plans_of(request)
    driver.train(override(planned.config, {"outer_lr": 0.5}))
    assert reproduce(request) == [planned.name]
    said = capsys.readouterr().err
    assert "trained with other settings: outer_lr=0.001 (was 0.5). Move it away, or name another --output-dir." in said


@pytest.mark.usefixtures("serially")
def test_a_row_of_other_settings_is_not_taken_for_the_same(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    request = place.request(WAVES)
    assert reproduce(request) == []
    (made,) = place.results.iterdir()
    row = json.loads(made.read_text())
    row["config"]["outer_lr"] = 0.5  # of the recipe as it was
    made.write_text(json.dumps(row))
    assert reproduce(request) == [made.stem]
    said = capsys.readouterr().err
    assert "was made with other settings: outer_lr=0.001 (was 0.5). Move it away, or name another folder" in said
    row["config"].update(outer_lr=0.001, no_such_field=1)
    made.write_text(json.dumps(row))
    assert reproduce(request) == [made.stem]
    assert "is of another version of distmaml: unknown option 'no_such_field'" in capsys.readouterr().err


@pytest.mark.usefixtures("serially")
def test_a_row_that_is_older_than_an_option_was_made_with_its_default(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reproduce(place.request(WAVES)) == []
    (made,) = place.results.iterdir()
    row = json.loads(made.read_text())
    assert row["config"].pop("clip_norm") is None
    made.write_text(json.dumps(row))
    assert reproduce(place.request(WAVES)) == []
    clipped = override(RECIPES[WAVES](), {"clip_norm": 1.0})
    monkeypatch.setitem(RECIPES, WAVES, lambda: clipped)
    assert reproduce(place.request(WAVES)) == [made.stem]
    assert "was made with other settings: clip_norm=1.0 (was None)" in capsys.readouterr().err


@pytest.mark.usefixtures("serially")
def test_a_table_that_goes_away_in_between_leaves_the_rows(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    train = driver.train

    def trained(config: Any) -> Any:
        place.table.write_text("someone else's")
        return train(config)

    monkeypatch.setattr(driver, "train", trained)
    with pytest.raises(ConfigError, match="does not have the lines"):
        reproduce(place.request(WAVES, seeds=(0, 1)))
    assert len(read_rows(place.results)) == 2


@pytest.mark.usefixtures("serially")
def test_the_same_command_goes_on_with_a_row_that_was_stopped(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distmaml.worker import LocalWorker

    request = place.request(WAVES, seeds=(0, 1))

    def report(worker: LocalWorker, metrics: dict[str, float]) -> None:
        if metrics["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalWorker, "report", report)
        patch.setattr(driver, "SAVE_SECONDS", 0.1)  # nobody will save: the one worker is gone
        with pytest.raises(KeyboardInterrupt):
            reproduce(request)
    first = plans_of(request)[0].name
    assert f"Stopped in {first}, row 1 of 2: the same command goes on with it." in capsys.readouterr().err
    assert read_rows(place.results) == []
    # What decides no figure may be another by now.
    assert reproduce(replace(request, changes=((*TINY, "log_every=3", "checkpoint_every=2"),))) == []
    assert f"{first} was stopped after 5 outer steps: it goes on." in capsys.readouterr().err
    rows = read_rows(place.results)
    assert [(found.seed, found.outer_steps) for found in rows] == [(0, 12), (1, 12)]
    assert [step for step, _ in rows[0].validation] == list(range(1, 13))
    assert "mean of 2 seeds" in place.table.read_text()


def test_the_list_has_every_recipe_and_what_its_paper_prints(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published = paper(98.7, num_outer_steps=60_000, meta_batch_size=32, half_width=0.4, mode="transductive")
    monkeypatch.setitem(PUBLISHED, "omniglot-maml-5w1s", published)
    lines = listing(Request(results=tmp_path / "none")).splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", *RECIPES]
    (line,) = [line for line in lines if line.startswith("omniglot-maml-5w1s ")]
    assert line.split() == ["omniglot-maml-5w1s", "98.7", "+-", "0.4", "transductive", "-"]


# ------------------------------------------------------------------------------------------------- with Ray


@pytest.mark.ray
def test_two_rows_are_made_by_real_workers_and_the_same_command_leaves_them_alone(
    start_job: StartJob, prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "output")
    (tmp_path / "RESULTS.md").write_text(f"{BEGIN}\n{END}\n")
    small = "num_filters=2 meta_batch_size=2 num_queries=1 num_eval_queries=1 num_val_episodes=2 num_eval_steps=1"
    options = (
        f"{GLYPHS} --tasks 8 --seeds 0 1 --num-test-episodes 600 --num-workers 1 --output-dir output --results rows "
        f"--table RESULTS.md --set {small}"
    )
    job = start_job("reproduce", *options.split(), folder=tmp_path)
    assert job.wait() == 0, job.output
    rows = read_rows(tmp_path / "rows")
    assert [(found.seed, found.outer_steps, found.unit) for found in rows] == [(0, 4, "percent"), (1, 4, "percent")]
    for found in rows:
        assert found.inductive is not None
        assert 0 <= (found.transductive["mean"] or -1) <= 100
        assert found.cpu_seconds > 0
        assert found.dataset is not None
        assert len(found.dataset["split_hash"]) >= 16
    assert rows[0].transductive != rows[1].transductive
    assert "mean of 2 seeds" in (tmp_path / "RESULTS.md").read_text()
    assert [line for line in job.output.splitlines() if line][-2:] == [
        "table    RESULTS.md",
        "picture  images/reproduction.png",
    ]

    again = start_job("reproduce", *options.split(), folder=tmp_path)
    assert again.wait() == 0, again.output
    assert [line.partition(" is there: ")[2] for line in again.output.splitlines()[:2]] == [
        f"rows/{found.name}.json" for found in rows
    ]
    assert len(again.output.splitlines()) == 4
