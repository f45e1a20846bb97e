"""Whole searches: what they leave behind, how they end, and how they go on."""

import itertools
import json
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from distmaml import checkpoint, loop, paths, space, study, trials, workers
from distmaml.config import Config, flatten, override, read
from distmaml.episodes import TaskBatch
from distmaml.errors import ConfigError, DistmamlError, RunError, TrackingError
from distmaml.journal import Journal
from distmaml.recipes import default_space
from distmaml.recipes.glyphs import glyphs_maml_5w1s
from distmaml.recipes.pictures import image_folder_maml
from distmaml.scoring import after_last
from distmaml.search import Trial
from distmaml.space import Search
from distmaml.tasks.images import ImageTasks
from distmaml.trial import of_trial, run_trial, take_weights, train_on
from distmaml.worker import LocalWorker
from tests.conftest import Job, StartJob
from tests.runs import Member, in_groups, pictures, run_serially, tiny_store, waves
from tests.test_driver import artifacts, logged_steps, mlflow_runs

SPACE = ("inner_lr=log:0.01:0.1", "outer_lr=log:0.001:0.03", "num_inner_steps=int:1:3")
NUM_TRIALS, NUM_STEPS = 3, 200
OPTIONS = [
    *("--name", "s", "--space", SPACE[0], "--space", SPACE[1], "--space", SPACE[2], "--num-samples", str(NUM_TRIALS)),
    *("--num-outer-steps", str(NUM_STEPS), "--val-every", "20"),
    *("--num-val-episodes", "10", "--num-test-episodes", "10"),
    *("--log-every", "20", "--use-gpu", "no"),
]


def search(output_dir: Path, **changes: Any) -> Config:
    small = {"meta_batch_size": 2, "num_inner_steps": 1, "num_val_episodes": 5, "num_test_episodes": 5}
    return waves(output_dir, "s", checkpoint_every=100, **{**small, **changes})


def best_params(output_dir: Path, number: int) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.load(paths.model(paths.runs(output_dir) / f"s-{number:03d}"))
    return tensors


# ----------------------------------------------------------------------------------- without a cluster


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is started all the same fails the test."""
    monkeypatch.setattr(workers, "cluster", lambda *_: pytest.fail("a cluster was started"))


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(
    ("options", "changes", "says"),
    [
        (Search(space=("inner_rl=log:0.1:1",)), {}, "did you mean 'inner_lr'"),
        (Search(space=("inner_lr=log:1:0.1",)), {}, "must lie above"),
        (Search(space=("inner_lr=log:0:1",)), {}, "begins above 0"),
        (Search(space=("num_workers=int:1:2",)), {}, "the same for all trials"),
        (Search(num_samples=0), {}, "num_samples=0"),
        (Search(max_concurrent=0), {}, "max_concurrent=0"),
        (Search(reduction_factor=1), {}, "reduction_factor=1"),
        (Search(first_rung=21), {}, "first_rung=21"),
        (Search(searcher="grid"), {}, "number of points"),
        (Search(), {"val_every": 0}, "val_every=0"),
        (Search(), {"selection_metric": "val/query_acuracy"}, "val/query_loss"),
    ],
)
def test_what_cannot_work_is_one_error_before_any_cluster(
    output_dir: Path, options: Search, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        study.tune(search(output_dir, **changes), options)
    assert says in str(refused.value)
    assert not (output_dir / "searches").exists()
    assert not mlflow_runs(output_dir)


@pytest.mark.usefixtures("no_cluster")
def test_a_server_that_is_away_stops_a_search_before_it_begins(output_dir: Path) -> None:
    with pytest.raises(TrackingError, match="cannot be reached"):
        study.tune(search(output_dir, tracking_uri="http://127.0.0.1:9"), Search())
    assert not (output_dir / "searches").exists()


@pytest.mark.usefixtures("no_cluster")
def test_names_that_are_taken_or_not_there_are_refused(output_dir: Path) -> None:
    config = search(output_dir)
    with pytest.raises(RunError, match="no search named 's'"):
        study.tune(override(config, {"resume": True}), Search())
    (paths.runs(output_dir) / "s-000").mkdir(parents=True)
    with pytest.raises(RunError, match="s-000"):
        study.tune(config, Search())
    (paths.runs(output_dir) / "s-000").rmdir()
    file = paths.search_file(paths.searches(output_dir) / "s")
    file.parent.mkdir(parents=True)
    file.write_text(space.to_text(config, Search(space=SPACE)))
    with pytest.raises(RunError, match="--resume"):
        study.tune(config, Search())
    with pytest.raises(RunError, match="searcher='tpe'"):
        study.tune(override(config, {"resume": True}), Search(space=SPACE, searcher="tpe"))
    with pytest.raises(RunError, match="meta_batch_size=8"):
        study.tune(override(config, {"resume": True, "meta_batch_size": 8}), Search(space=SPACE))
    file.write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        study.tune(override(config, {"resume": True}), Search(space=SPACE))


def test_every_recipe_has_a_default_space_that_its_trials_could_have(tmp_path: Path) -> None:
    for recipe in (glyphs_maml_5w1s, image_folder_maml):
        config = recipe()
        space.check_space(config, space.parse(config, default_space(config)))
    own = override(waves(tmp_path, "s"), {"algorithm": "package.module:own"})
    assert default_space(own) == ("outer_lr=log:0.0001:0.01", "meta_batch_size=choice:3,7,14")


def test_a_trial_is_a_run_that_differs_from_the_others_in_its_values_alone(tmp_path: Path) -> None:
    config = search(tmp_path, resume=True)
    trial = of_trial(config, Trial(7, {"inner_lr": 0.3, "algorithm": "anil"}))
    assert trial == override(config, {"name": "s-007", "inner_lr": 0.3, "algorithm": "anil", "resume": False})


def test_rungs_begin_at_a_validation_near_a_27th(tmp_path: Path) -> None:
    config = search(tmp_path, num_outer_steps=1000, val_every=10)
    assert space.first_rung(Search(), config) == 40
    assert space.first_rung(Search(first_rung=15), config) == 15
    assert space.first_rung(Search(), search(tmp_path, num_outer_steps=5, val_every=10)) == 5


# ------------------------------------------------------------------------- one trial after the other, here


@pytest.fixture
def serially(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials and the test of the best run in this process; everything else is as ever."""
    run_serially(monkeypatch)


@pytest.mark.usefixtures("serially")
def test_the_best_trial_is_tested_drawn_registered_and_left_as_a_recipe(output_dir: Path) -> None:
    tiny_store(output_dir / "tiny.arrow")
    config = pictures(output_dir, "s", num_outer_steps=4, val_every=2)
    options = Search(space=("inner_lr=log:0.001:0.5", "outer_lr=log:0.0001:0.1"), num_samples=4, searcher="tpe")
    found = study.tune(config, options)
    parent = next(run for run in mlflow_runs(output_dir) if run.info.run_name == "s")
    assert parent.data.tags["distmaml.best_trial"] == found.config.run.name == f"s-{found.best.number:03d}"
    assert {
        *("search.json", "champion.json", "evaluation/evaluation-test.json", "evaluation/evaluation-test.csv"),
        *("pictures/best_so_far.png", "pictures/budget.png", "pictures/learning_rates.png"),
        "pictures/parallel_coordinates.html",
    } <= artifacts(output_dir, parent)
    assert found.registered == "models:/glyphs-maml-5w1s@champion"
    recipe = read(paths.champion(found.folder))
    assert found.best.values.items() <= flatten(recipe).items()
    assert (recipe.outer.num_outer_steps, recipe.run.name) == (800, None)
    assert found.scores is not None
    assert parent.data.metrics["test/query_accuracy"] == after_last(found.scores["transductive"]["query_accuracy"]).mean


@pytest.mark.usefixtures("serially")
def test_where_every_trial_fails_the_search_does(output_dir: Path) -> None:
    with pytest.raises(DistmamlError, match=r"none of the 2 trials came to a result: .* no longer finite"):
        study.tune(search(output_dir), Search(space=("outer_lr=choice:1e30,2e30",), searcher="grid"))
    runs = mlflow_runs(output_dir)
    assert [run.info.status for run in runs] == ["FAILED"] * 3
    assert all("no longer finite" in run.data.tags["distmaml.reason"] for run in runs)


@pytest.mark.usefixtures("serially")
def test_more_samples_go_on_from_those_that_are_done(output_dir: Path) -> None:
    config, options = search(output_dir), Search(space=SPACE, num_samples=2)
    study.tune(config, options)
    written = {file: file.read_bytes() for file in paths.runs(output_dir).glob("s-00*/model.safetensors")}
    found = study.tune(override(config, {"resume": True}), replace(options, num_samples=4))
    assert [trial.number for trial in found.trials] == [0, 1, 2, 3]
    assert all(file.read_bytes() == content for file, content in written.items())
    assert len(mlflow_runs(output_dir)) == 5


@pytest.mark.usefixtures("serially")
def test_no_trial_takes_an_episode_of_the_test_split(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_store(output_dir / "tiny.arrow")
    sample, splits = ImageTasks.sample, {"trial": set[str](), "driver": set[str]()}
    now = ["driver"]

    def watched(self: ImageTasks, indices: Sequence[int]) -> TaskBatch:
        splits[now[0]].add(self.split)
        return sample(self, indices)

    def of_a_trial(*arguments: Any) -> None:
        now[0] = "trial"
        run_trial(*arguments)
        now[0] = "driver"

    monkeypatch.setattr(ImageTasks, "sample", watched)
    monkeypatch.setattr(study, "run_trial", of_a_trial)
    config = pictures(output_dir, "s", num_outer_steps=2, val_every=2)
    study.tune(config, Search(space=("outer_lr=choice:0.01,0.02",), searcher="grid"))
    assert splits["trial"] == {"train", "val"}
    assert "test" in splits["driver"]


def interrupted(config: Config, options: Search, patch: pytest.MonkeyPatch, *, num_reports: int) -> None:
    """Runs a search until its driver is stopped at a report: the checkpoint is there, and the journal knows nothing."""
    heard, count = trials.Trials.reported, itertools.count()

    def dying(self: trials.Trials, trial: Trial, metrics: Mapping[str, float]) -> None:
        if next(count) == num_reports:
            raise KeyboardInterrupt
        heard(self, trial, metrics)

    with patch.context() as patched:
        patched.setattr(trials.Trials, "reported", dying)
        with pytest.raises(KeyboardInterrupt):
            study.tune(config, options)
    assert "RUNNING" not in {run.info.status for run in mlflow_runs(config.run.output_dir or Path())}


def train_and_keep_reports(member: Member, config: Config, folder: Path) -> None:
    reports: list[Mapping[str, float]] = []
    member.report = reports.append  # type: ignore[method-assign, assignment]
    train_on(config, member, after=5)
    torch.save(reports, folder / f"{member.world_size}-{member.rank}.pt")


@pytest.mark.slow
def test_workers_report_again_what_those_before_them_may_not_have_come_to_report(tmp_path: Path) -> None:
    undisturbed, config = (
        override(search(folder), {"checkpoint_every": 5}) for folder in (tmp_path / "undisturbed", tmp_path)
    )
    expected: list[Mapping[str, float]] = []
    loop.train(undisturbed, LocalWorker(tell=expected.append))
    loop.train(override(config, {"num_outer_steps": 15}), LocalWorker())  # killed before any of its reports was heard
    in_groups(tmp_path / "processes", [2], train_and_keep_reports, config, tmp_path)
    first, second = (torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2))
    metric = config.evaluation.selection_metric
    assert [each["step"] for each in first] == [10, 15, 20]
    assert [each[metric] for each in first] == [each[metric] for each in expected[1:]]
    assert len(second) == 3, "Ray Train waits until every worker has reported"


@pytest.mark.usefixtures("serially")
def test_a_trial_that_was_pruned_when_its_driver_died_stays_so(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, options = search(output_dir), Search(space=SPACE, num_samples=3)
    interrupted(config, options, monkeypatch, num_reports=6)  # the second of four of trial 1
    monkeypatch.setattr(study, "pruned", lambda *_: frozenset({1}))
    study.tune(override(config, {"resume": True}), options)
    known = journal(output_dir).trials
    assert [(trial.state, trial.step) for trial in known.values()] == [
        ("finished", 20),
        ("pruned", 10),
        ("finished", 20),
    ]
    run = next(run for run in mlflow_runs(output_dir) if run.info.run_name == "s-001")
    assert (run.info.status, run.data.tags["distmaml.pruned_at"]) == ("FINISHED", "10")


@pytest.mark.usefixtures("serially")
def test_a_trial_that_ended_when_its_driver_died_is_told_so(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, options = search(output_dir), Search(space=SPACE, num_samples=2)

    def dying(self: trials.Trials, known: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trials.Trials, "_end_run", dying)
        patched.setattr(trials.Trials, "interrupted", lambda self: [run.end("KILLED") for run in self._runs.values()])
        with pytest.raises(KeyboardInterrupt):
            study.tune(config, options)
    study.tune(override(config, {"resume": True}), options)
    assert {run.info.status for run in mlflow_runs(output_dir)} == {"FINISHED"}
    assert num_starts(paths.journal(paths.searches(output_dir) / "s"), 0) == 1  # not run again


@pytest.mark.usefixtures("serially")
def test_a_lost_trial_is_tried_again_by_a_resumption_and_a_failed_one_is_not(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, options = search(output_dir), Search(space=("outer_lr=choice:0.01,0.02,1e30",), searcher="grid")
    over = Journal.over

    def losing(self: Journal, number: int, state: Any, reason: str | None) -> None:
        over(self, number, *(("lost", "the disk is full") if number == 1 else (state, reason)))

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "over", losing)
        study.tune(config, options)
    assert "1 trial could not be trained to the end, 001 since the disk is full. --resume s" in capsys.readouterr().err
    states = {run.info.run_name: run.info.status for run in mlflow_runs(output_dir)}
    assert states == {"s": "FINISHED", "s-000": "FINISHED", "s-001": "FAILED", "s-002": "FAILED"}
    study.tune(override(config, {"resume": True}), options)
    assert [t.state for t in journal(output_dir).trials.values()] == ["finished", "finished", "failed"]
    states = {run.info.run_name: run.info.status for run in mlflow_runs(output_dir)}
    assert states == {"s": "FINISHED", "s-000": "FINISHED", "s-001": "FINISHED", "s-002": "FAILED"}


@pytest.mark.usefixtures("serially")
def test_a_search_that_learns_from_its_trials_goes_on_with_what_it_has_learnt(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, options = search(output_dir), Search(space=SPACE, num_samples=3, searcher="tpe", scheduler="none")
    interrupted(config, options, monkeypatch, num_reports=6)
    before = journal(output_dir)
    study.tune(override(config, {"resume": True}), options)
    after = journal(output_dir)
    assert [trial.state for trial in after.trials.values()] == ["finished"] * 3
    assert after.trials[0].results == before.trials[0].results
    assert [trial.values for trial in after.trials.values()][:2] == [trial.values for trial in before.trials.values()]
    assert num_starts(paths.journal(paths.searches(output_dir) / "s"), 0) == 1


# -------------------------------------------------------------------------------- population-based training

POPULATION = Search(
    space=("inner_lr=log:0.01:0.1", "outer_lr=log:0.001:0.03"), num_samples=4, scheduler="pbt", move_every=10
)


@pytest.fixture(scope="module")
def population_alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A population of four that move twice, undisturbed."""
    folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("population") / "output"))
    with pytest.MonkeyPatch.context() as patch:
        run_serially(patch)
        study.tune(search(folder, num_outer_steps=30), POPULATION)
    return folder


def same_results(folder: Path, expected: Path) -> None:
    found, wanted = journal(folder), journal(expected)
    assert found.moves == wanted.moves
    for number, trial in wanted.trials.items():
        assert found.trials[number].results == trial.results
        assert found.trials[number].values == trial.values
        model, reference = best_params(folder, number), best_params(expected, number)
        assert all(torch.equal(model[name], reference[name]) for name in reference)


def test_a_population_trains_to_its_end_and_its_worst_go_on_from_its_best(population_alone: Path) -> None:
    known = journal(population_alone)
    assert {trial.state for trial in known.trials.values()} == {"finished"}
    assert list(known.moves) == [10, 20]
    (first,), (second,) = known.moves.values()
    for step, move in ((10, first), (20, second)):
        at_step = {number: dict(trial.results)[step] for number, trial in known.trials.items()}
        assert move.donor == min(at_step, key=lambda n: at_step[n])
        assert move.trial == max(at_step, key=lambda n: at_step[n])
    (own, document), (donors, _) = (
        checkpoint.load(checkpoint.path_of(paths.checkpoints(paths.runs(population_alone) / f"s-{number:03d}"), 20))
        for number in (second.trial, second.donor)
    )
    assert all(torch.equal(own[name], donors[name]) for name in donors)
    assert document["config"]["outer_lr"] == second.values["outer_lr"]
    best = min(value for step, value in known.trials[second.trial].results if step <= 20)
    assert document["best"] == best  # its own


def test_what_a_population_changes_is_logged_as_metrics_and_what_it_began_with_as_parameters(
    population_alone: Path,
) -> None:
    known = journal(population_alone)
    client = MlflowClient(f"sqlite:///{population_alone / 'mlflow.db'}")
    for run in mlflow_runs(population_alone):
        assert run.info.status == "FINISHED"
        if run.info.run_name == "s":
            continue
        trial = known.trials[int(run.data.params["trial"])]
        assert float(run.data.params["outer_lr"]) == trial.first_values["outer_lr"]
        assert "distmaml.changed_params" not in run.data.tags
        history = client.get_metric_history(run.info.run_id, "hparam/outer_lr")
        assert [point.step for point in history] == [0, 10, 20]
        assert (history[0].value, history[-1].value) == (trial.first_values["outer_lr"], trial.values["outer_lr"])
        assert logged_steps(population_alone, run, "val/query_loss") == list(range(5, 31, 5))
    assert (paths.artifacts(paths.searches(population_alone) / "s") / "population.png").exists()


@pytest.mark.usefixtures("serially")
@pytest.mark.parametrize("num_reports", [3, 9, 16])
@pytest.mark.slow
def test_a_population_whose_driver_dies_goes_on_to_the_same_end(
    output_dir: Path, population_alone: Path, monkeypatch: pytest.MonkeyPatch, num_reports: int
) -> None:
    config = search(output_dir, num_outer_steps=30)
    interrupted(config, POPULATION, monkeypatch, num_reports=num_reports)
    study.tune(override(config, {"resume": True}), POPULATION)
    same_results(output_dir, population_alone)
    assert len(mlflow_runs(output_dir)) == 5


@pytest.mark.usefixtures("serially")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.slow
def test_a_population_whose_driver_dies_between_two_stages_goes_on_to_the_same_end(
    output_dir: Path, population_alone: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:

    def dying(*arguments: Any, **named: Any) -> None:
        if after:
            take_weights(*arguments, **named)
        raise KeyboardInterrupt

    config = search(output_dir, num_outer_steps=30)
    monkeypatch.setattr(trials, "take_weights", dying)
    with pytest.raises(KeyboardInterrupt):
        study.tune(config, POPULATION)
    monkeypatch.setattr(trials, "take_weights", take_weights)
    with pytest.raises(RunError, match="num_samples=5"):
        study.tune(override(config, {"resume": True}), replace(POPULATION, num_samples=5))
    study.tune(override(config, {"resume": True}), POPULATION)
    same_results(output_dir, population_alone)


@pytest.mark.usefixtures("serially")
def test_a_trial_that_diverges_leaves_its_population(output_dir: Path) -> None:
    space = ("inner_lr=log:0.01:1e30:2", "outer_lr=log:0.001:0.01:2")
    options = replace(POPULATION, space=space, searcher="grid", num_samples=None)
    study.tune(search(output_dir, num_outer_steps=30), options)
    states = [trial.state for trial in journal(output_dir).trials.values()]
    assert sorted(states) == ["failed", "failed", "finished", "finished"]
    moved = {move.trial for moves in journal(output_dir).moves.values() for move in moves}
    assert moved
    assert all(journal(output_dir).trials[number].state == "finished" for number in moved)


# ------------------------------------------------------------------------------------------ on a cluster


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, start_job: StartJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """A random search, all of whose trials are trained to the end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, finished(start_job, folder, "sinusoid-maml-5s", *OPTIONS, "--scheduler", "none")


def finished(start_job: StartJob, folder: Path, *arguments: str, status: int = 0) -> Job:
    job = start_job("tune", *arguments, "--output-dir", str(folder), folder=folder)
    assert job.wait(seconds=600) == status, job.output
    return job


def journal(folder: Path) -> Journal:
    return Journal(paths.journal(paths.searches(folder) / "s"))


def num_starts(file: Path, number: int) -> int:
    """How often a driver started a trial."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return sum(line["kind"] == "started" and line["trial"] == number for line in lines)


@pytest.mark.ray
def test_a_search_is_a_run_with_its_trials_below_it(undisturbed: tuple[Path, Job]) -> None:
    folder, job = undisturbed
    runs = {run.info.run_name: run for run in mlflow_runs(folder)}
    assert runs.keys() == {"s", *(f"s-{n:03d}" for n in range(NUM_TRIALS))}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent, children = runs.pop("s"), list(runs.values())
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {child.data.tags["distmaml.trial_state"] for child in children} == {"finished"}
    assert [runs[f"s-{n:03d}"].data.params["trial"] for n in range(NUM_TRIALS)] == ["0", "1", "2"]
    assert parent.data.params["space_inner_lr"] == "log:0.01:0.1"
    assert parent.data.params["searcher"] == "random"
    keys = [(set(child.data.params), set(child.data.metrics)) for child in children]
    assert all(found == keys[0] for found in keys)
    assert "log10_inner_lr" in keys[0][0]
    assert len({child.data.params["inner_lr"] for child in children}) == NUM_TRIALS
    for child in children:
        assert logged_steps(folder, child, "val/query_loss") == list(range(20, NUM_STEPS + 1, 20))
    best = min(child.data.metrics["best/query_loss"] for child in children)
    assert parent.data.metrics["best/query_loss"] == best
    assert "Traceback" not in job.output
    assert "Warning" not in job.output


@pytest.mark.ray
def test_no_trial_sees_the_test_split_and_the_best_is_tested_once(undisturbed: tuple[Path, Job]) -> None:
    folder, job = undisturbed
    tested = [run.info.run_name for run in mlflow_runs(folder) if any(k.startswith("test") for k in run.data.metrics)]
    assert tested == ["s"]
    record = json.loads((folder / "searches" / "s" / "evaluation-test.json").read_text())
    best = min(journal(folder).trials.values(), key=lambda trial: trial.best("min") or 0.0)
    assert record["run"] == f"s-{best.number:03d}"
    recipe = read(paths.champion(folder / "searches" / "s"))
    assert best.values.items() <= flatten(recipe).items()
    assert (recipe.outer.num_outer_steps, recipe.run.name) == (70_000, None)
    assert f"train.py --recipe-file {paths.champion(folder / 'searches' / 's')}" in job.output


@pytest.mark.faults
def test_a_search_whose_trial_is_killed_and_then_its_driver_goes_on_to_the_same_end(
    undisturbed: tuple[Path, Job], start_job: StartJob, tmp_path: Path
) -> None:
    reference, _ = undisturbed
    job = start_job(
        "tune", "sinusoid-maml-5s", *OPTIONS, "--scheduler", "none", "--output-dir", str(tmp_path), folder=tmp_path
    )
    file = paths.journal(paths.searches(tmp_path) / "s")
    job.wait_for(lambda: file.exists() and b'"reported"' in file.read_bytes())
    killed = job.running("ImplicitFunc")
    assert 1 <= len(killed) <= 2
    for process in killed:
        process.kill()
    job.wait_for(lambda: b'"ended"' in file.read_bytes())
    job.signal(signal.SIGKILL)
    job.end()
    before = journal(tmp_path)
    assert 1 <= len(before.ended) < NUM_TRIALS
    assert {before.trials[number].state for number in before.ended} == {"finished"}
    finished(start_job, tmp_path, "--resume", "s")
    after, expected = journal(tmp_path), journal(reference)
    for number in range(NUM_TRIALS):
        assert after.trials[number].results == expected.trials[number].results
        assert after.trials[number].values == expected.trials[number].values
        found, wanted = best_params(tmp_path, number), best_params(reference, number)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(num_starts(file, number) == 1 for number in before.ended)  # not run again
    runs = mlflow_runs(tmp_path)
    assert sorted(run.info.run_name for run in runs) == ["s", *(f"s-{n:03d}" for n in range(NUM_TRIALS))]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if run.info.run_name != "s":
            assert logged_steps(tmp_path, run, "val/query_loss") == list(range(20, NUM_STEPS + 1, 20))


@pytest.mark.faults
def test_a_population_whose_driver_is_killed_comes_to_the_end_of_one_that_was_trained_here(
    start_job: StartJob, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*OPTIONS[:6], *OPTIONS[8:], "--scheduler", "pbt", "--move-every", "100"]
    folder, here = tmp_path / "killed", Path(shutil.copytree(prepared, tmp_path / "here"))
    folder.mkdir()
    job = start_job("tune", "sinusoid-maml-5s", *options, "--output-dir", str(folder), folder=folder)
    file = paths.journal(paths.searches(folder) / "s")
    job.wait_for(lambda: file.exists() and b'"moved"' in file.read_bytes())
    job.signal(signal.SIGKILL)
    job.end()
    resumed = finished(start_job, folder, "--resume", "s")
    assert "Traceback" not in job.output + resumed.output
    config, search_options = study.settings_of("s", folder)
    run_serially(monkeypatch)
    study.tune(override(config, {"output_dir": here, "resume": False}), search_options)
    same_results(folder, here)
    assert len(journal(folder).moves[100]) == 1
    runs = mlflow_runs(folder)
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    assert all("hparam/inner_lr" in run.data.metrics for run in runs if run.info.run_name != "s")


@pytest.mark.faults
def test_halving_prunes_and_a_trial_that_diverges_fails_alone_whatever_becomes_of_the_driver(
    start_job: StartJob, tmp_path: Path
) -> None:
    rates = ("--space", "outer_lr=choice:0.01,1e30", "--searcher", "grid", "--space", "inner_lr=log:0.001:0.1:3")
    options = [*OPTIONS[:2], *rates, *OPTIONS[10:], "--first-rung", "20", "--output-dir", str(tmp_path)]
    killed = start_job("tune", "sinusoid-maml-5s", *options, folder=tmp_path)
    file = paths.journal(paths.searches(tmp_path) / "s")
    killed.wait_for(lambda: file.exists() and b'"pruned"' in file.read_bytes())
    killed.signal(signal.SIGKILL)
    killed.end()
    before = journal(tmp_path)
    job = finished(start_job, tmp_path, "--resume", "s")
    trials = journal(tmp_path).trials
    assert all(num_starts(file, number) == 1 for number in before.ended)
    assert all(trials[number].values == trial.values for number, trial in before.trials.items())
    assert sorted(trials) == list(range(6))
    diverged = [trial for trial in trials.values() if trial.values["outer_lr"] == 1e30]
    assert [trial.state for trial in diverged] == ["failed"] * 3
    assert all("no longer finite" in (trial.reason or "") for trial in diverged)
    rest = [trial for trial in trials.values() if trial.values["outer_lr"] != 1e30]
    assert {trial.state for trial in rest} == {"finished", "pruned"}
    assert any(trial.state == "finished" and trial.step == NUM_STEPS for trial in rest)
    runs = {run.info.run_name: run for run in mlflow_runs(tmp_path)}
    for trial in trials.values():
        run = runs[f"s-{trial.number:03d}"]
        assert run.info.status == ("FAILED" if trial.state == "failed" else "FINISHED")
        if trial.state == "pruned":
            assert run.data.tags["distmaml.pruned_at"] == str(trial.step)
    assert "Traceback" not in killed.output + job.output


@pytest.mark.ray
def test_ctrl_c_ends_a_search_in_order(start_job: StartJob, tmp_path: Path) -> None:
    job = start_job("tune", "sinusoid-maml-5s", *OPTIONS, "--output-dir", str(tmp_path), folder=tmp_path)
    file = paths.journal(paths.searches(tmp_path) / "s")
    job.wait_for(lambda: file.exists() and b'"reported"' in file.read_bytes())
    job.signal(signal.SIGINT)
    assert job.wait(seconds=20) == 130
    assert "--resume s goes on" in job.output
    assert "RUNNING" not in {run.info.status for run in mlflow_runs(tmp_path)}
    end = time.monotonic() + 20
    while job.ray_processes():  # one that was just being started sees by itself that it is alone
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.faults
def test_a_trial_of_two_workers_one_of_which_is_killed_gives_what_a_trial_of_one_gives(
    undisturbed: tuple[Path, Job], start_job: StartJob, tmp_path: Path
) -> None:
    reference, _ = undisturbed
    one = [word if word != str(NUM_TRIALS) else "1" for word in OPTIONS]
    options = [*one, "--scheduler", "none", "--num-workers", "2", "--output-dir", str(tmp_path)]
    job = start_job("tune", "sinusoid-maml-5s", *options, folder=tmp_path)
    file = paths.journal(paths.searches(tmp_path) / "s")
    job.wait_for(lambda: file.exists() and b'"step": 60' in file.read_bytes())
    job.workers()[-1].kill()
    assert job.wait(seconds=600) == 0, job.output
    found = journal(tmp_path).trials[0]
    assert found.state == "finished"
    assert found.results == journal(reference).trials[0].results  # sums are ordered
    assert len(mlflow_runs(tmp_path)) == 2
