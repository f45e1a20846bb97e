"""The same training on one worker or three, stopped and gone on, or straight through."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distmaml import build, checkpoint, loop, paths
from distmaml.config import Config, override
from distmaml.errors import ConfigError, DivergenceError, RunError
from distmaml.segments import Point, committed_segments, read_points
from distmaml.worker import LocalWorker
from tests.runs import Member, adopt, in_groups, largest_difference, pictures, tiny_store, waves

VARIANTS: dict[str, Any] = {
    "sgd": (waves, {"optimizer": "sgd", "reduction": "plain", "precision": "float64", "outer_lr": 0.05}),
    "adam": (waves, {"optimizer": "adam", "reduction": "plain", "precision": "float64"}),
    "mlp": (waves, {"reduction": "ordered", "precision": "float32"}),
    "conv4": (pictures, {"reduction": "ordered", "precision": "float32"}),
}


class CrashingWorker(LocalWorker):
    """A worker that dies in the n-th report, which is just after a checkpoint."""

    def __init__(self, reports: int) -> None:
        super().__init__()
        self.left = reports

    def report(self, metrics: Mapping[str, float]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def state_after(config: Config, step: int | None = None) -> dict[str, Tensor]:
    """Parameters and optimiser, from the checkpoint after a step, the last by default."""
    folder = paths.checkpoints(paths.run_folder(config))
    return checkpoint.load(checkpoint.path_of(folder, step or config.outer.num_outer_steps))[0]


def model_of(config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return checkpoint.load(paths.model(paths.run_folder(config)))


def points_of(config: Config) -> list[Point]:
    segments = committed_segments(paths.metrics(paths.run_folder(config)), after=-1)
    return [point for segment in segments for point in read_points(segment)]


def same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------------- one worker or three


def train_all(member: Member, configs: Mapping[str, Config], folder: Path) -> None:
    found = {}
    for name, config in configs.items():
        values = loop.train(config, member)
        scores = loop.evaluate(config, member)
        found[name] = (values, scores)
    torch.save(found, folder / f"rank-{member.rank}.pt")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each variant trained by one worker here, and by three in a process group."""
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    for folder in (alone, together):
        tiny_store(folder / "tiny.arrow")
    of_three = {name: make(together, name, **changes) for name, (make, changes) in VARIANTS.items()}
    in_groups(together / "processes", [3], train_all, of_three, together)
    ranks = [torch.load(together / f"rank-{rank}.pt", weights_only=False) for rank in range(3)]
    found = {}
    for name, (make, changes) in VARIANTS.items():
        config = make(alone, name, **changes)
        values = loop.train(config, LocalWorker())
        ours = (values, loop.evaluate(config, LocalWorker()))
        found[name] = {
            "one": config,
            "three": of_three[name],
            "ours": ours,
            "ranks": [rank[name] for rank in ranks],
        }
    return found


@pytest.mark.parametrize(("variant", "tolerance"), [("sgd", 1e-12), ("adam", 1e-7)])
def test_one_worker_equals_three_by_the_plain_reduction(compared: Any, variant: str, tolerance: float) -> None:
    runs = compared[variant]
    one, three = state_after(runs["one"]), state_after(runs["three"])
    assert largest_difference(three, one) < tolerance
    moved = largest_difference(one, {**state_after(runs["one"], 5)})
    assert moved > 1e-3  # there was something to differ in


@pytest.mark.parametrize("variant", ["mlp", "conv4"])
def test_one_worker_equals_three_to_the_last_bit_by_the_ordered_reduction(compared: Any, variant: str) -> None:
    runs = compared[variant]
    assert same_bits(state_after(runs["three"]), state_after(runs["one"]))
    assert same_bits(model_of(runs["three"])[0], model_of(runs["one"])[0])
    for rank in runs["ranks"]:
        assert rank == runs["ours"]  # metrics, best value, intervals of the test


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_worker_returns_the_same(compared: Any, variant: str) -> None:
    first, *others = compared[variant]["ranks"]
    assert all(other == first for other in others)


@pytest.mark.parametrize("variant", ["mlp", "conv4"])
def test_points_of_three_workers_are_those_of_one(compared: Any, variant: str) -> None:
    def training(config: Config) -> list[tuple[int, dict[str, float]]]:
        return [(p.step, {k: v for k, v in p.values.items() if not k.startswith("system/")}) for p in points_of(config)]

    assert training(compared[variant]["three"]) == training(compared[variant]["one"])


def test_training_lowers_the_validation_loss(compared: Any) -> None:
    losses = [p.values["val/query_loss"] for p in points_of(compared["adam"]["one"]) if "val/query_loss" in p.values]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------- stop and go on


def crash_after(reports: int, config: Config) -> None:
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, CrashingWorker(reports))


@pytest.mark.parametrize("variant", ["mlp", "conv4"])
def test_stopping_and_going_on_is_the_same_to_the_last_bit(tmp_path: Path, variant: str) -> None:
    """With Adam's state, the best value, and a cosine whose length is that of the whole run."""
    make, changes = VARIANTS[variant]
    tiny_store(tmp_path / "tiny.arrow")
    changes = {**changes, "schedule": "cosine", "checkpoint_every": 5}
    straight, stopped = make(tmp_path, "straight", **changes), make(tmp_path, "stopped", **changes)
    expected = loop.train(straight, LocalWorker())
    crash_after(1, stopped)
    crash_after(2, stopped)
    found = loop.train(stopped, LocalWorker())
    assert found == expected
    assert same_bits(state_after(stopped), state_after(straight))
    assert same_bits(model_of(stopped)[0], model_of(straight)[0])
    assert model_of(stopped)[1]["step"] == model_of(straight)[1]["step"]


def fragile(folder: Path, name: str, **changes: Any) -> Config:
    """Fails once in the middle between two checkpoints, at outer step 13 of 20."""
    config = waves(folder, name, **changes)
    arguments = {"fails_at": 13 * 7 + 3, "while_there": str(folder / f"{name}-fails")}
    return override(config, {"tasks": "tests.runs:FragileWaves", "task_arguments": arguments})


def test_a_crash_between_checkpoints_loses_nothing_and_logs_nothing_twice(tmp_path: Path) -> None:
    straight, crashed = fragile(tmp_path, "straight"), fragile(tmp_path, "crashed")
    expected = loop.train(straight, LocalWorker())
    (tmp_path / "crashed-fails").touch()
    with pytest.raises(OSError, match="the disk with the tasks is gone"):
        loop.train(crashed, LocalWorker())
    assert checkpoint.steps(paths.checkpoints(paths.run_folder(crashed))) == [5, 10]
    assert max(point.step for point in points_of(crashed)) == 10  # 11 to 13 were never committed
    assert loop.train(crashed, LocalWorker()) == expected
    assert same_bits(state_after(crashed), state_after(straight))
    for key, steps in {"train/query_loss": list(range(1, 21)), "val/query_loss": [5, 10, 15, 20]}.items():
        found = [(p.step, p.values[key]) for p in points_of(crashed) if key in p.values]
        assert [step for step, _ in found] == steps
        assert found == [(p.step, p.values[key]) for p in points_of(straight) if key in p.values]


def test_a_truncated_checkpoint_goes_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    straight, damaged = waves(tmp_path, "straight"), waves(tmp_path, "damaged")
    loop.train(straight, LocalWorker())
    crash_after(3, damaged)
    newest = checkpoint.path_of(paths.checkpoints(paths.run_folder(damaged)), 15)
    newest.write_bytes(newest.read_bytes()[:-100])
    loop.train(damaged, LocalWorker())
    assert "Going back to the checkpoint of step 10: newer ones are damaged" in caplog.text
    assert same_bits(state_after(damaged), state_after(straight))
    assert same_bits(state_after(damaged, 15), state_after(straight, 15))
    steps = [point.step for point in points_of(damaged) if "train/query_loss" in point.values]
    assert steps == list(range(1, 21))


def test_going_on_after_the_end_changes_nothing(tmp_path: Path) -> None:
    config = waves(tmp_path, "done", num_outer_steps=5)
    ended = loop.train(config, LocalWorker())
    before = state_after(config)
    again = loop.train(config, LocalWorker())
    assert same_bits(state_after(config), before)
    assert (again["step"], again["best/query_loss"]) == (5.0, ended["best/query_loss"])


# ------------------------------------------------------------------------------------- the end of a run


def test_patience_stops_the_run_and_a_stopped_run_stays_stopped(tmp_path: Path) -> None:
    """Parameters that do not move are best at the first validation; two more without a better one end the run."""
    config = waves(tmp_path, "patient", optimizer="sgd", outer_lr=1e-30, val_every=3, patience=2)
    assert loop.train(config, LocalWorker())["step"] == 9
    assert checkpoint.steps(paths.checkpoints(paths.run_folder(config))) == [5, 9]
    assert model_of(config)[1]["step"] == 3
    assert loop.train(config, LocalWorker())["step"] == 9
    assert checkpoint.steps(paths.checkpoints(paths.run_folder(config))) == [5, 9]
    assert [point.step for point in points_of(config) if "val/query_loss" in point.values] == [3, 6, 9]
    assert (paths.metrics(paths.run_folder(config)) / "committed").read_text() == "9\n"


def test_patience_counts_on_over_a_crash(tmp_path: Path) -> None:
    config = waves(tmp_path, "patient", optimizer="sgd", outer_lr=1e-30, val_every=3, patience=2)
    crash_after(1, config)  # after step 5, one validation
    assert loop.train(config, LocalWorker())["step"] == 9


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint_before_it(tmp_path: Path) -> None:
    config = waves(tmp_path, "diverges", num_outer_steps=10)
    loop.train(config, LocalWorker())
    before = state_after(config)
    longer = override(config, {"num_outer_steps": 20, "inner_lr": 1e30})
    adopt(longer)
    with pytest.raises(DivergenceError, match=r"query_loss.* no longer finite at outer step 11\..*--inner-lr"):
        loop.train(longer, LocalWorker())
    folder = paths.checkpoints(paths.run_folder(config))
    assert checkpoint.newest(folder) == 10
    assert same_bits(state_after(config), before)
    assert all(bool(tensor.isfinite().all()) for tensor in before.values())


def test_a_validation_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    """Many more inner steps at a large rate than in training diverge in validation alone."""
    changes = {"val_every": 3, "checkpoint_every": 3, "inner_lr": 1.0, "num_inner_steps": 1, "num_eval_steps": 200}
    config = waves(tmp_path, "nan", num_outer_steps=3, **changes)
    first = loop.train(config, LocalWorker())
    assert math.isnan(first["val/query_loss"])
    assert (paths.run_folder(config) / "model.safetensors").exists()  # a run always leaves a model
    crashed = waves(tmp_path, "later", num_outer_steps=6, **changes)
    crash_after(1, crashed)
    mended = override(crashed, {"num_eval_steps": 1})
    with pytest.raises(RunError, match=r"cannot go on with num_eval_steps=1 \(was 200\)"):
        loop.train(mended, LocalWorker())
    adopt(mended)
    found = loop.train(mended, LocalWorker())
    assert found["best/query_loss"] == found["val/query_loss"]
    assert math.isfinite(found["best/query_loss"])


def test_a_run_that_stops_early_without_a_good_validation_still_leaves_a_model(tmp_path: Path) -> None:
    changes = {"val_every": 3, "inner_lr": 1.0, "num_inner_steps": 1, "num_eval_steps": 200, "patience": 1}
    config = waves(tmp_path, "hopeless", num_outer_steps=20, **changes)
    found = loop.train(config, LocalWorker())
    assert found["step"] == 3
    assert "best/query_loss" not in found
    assert model_of(config)[1]["step"] == 3


def test_without_validation_the_model_is_that_of_the_last_step(tmp_path: Path) -> None:
    config = waves(tmp_path, "blind", num_outer_steps=4, val_every=0)
    found = loop.train(config, LocalWorker())
    assert "best/query_loss" not in found
    tensors, document = model_of(config)
    assert document["step"] == 4
    last = {
        name.removeprefix("meta_params/"): t
        for name, t in state_after(config).items()
        if name.startswith("meta_params/")
    }
    assert same_bits(tensors, last)


def test_the_model_is_that_of_the_best_validation(tmp_path: Path) -> None:
    config = waves(tmp_path, "best", outer_lr=0.3, val_every=5)
    found = loop.train(config, LocalWorker())
    losses = {p.step: p.values["val/query_loss"] for p in points_of(config) if "val/query_loss" in p.values}
    best = min(losses, key=lambda step: losses[step])
    tensors, document = model_of(config)
    assert (document["step"], document["value"], found["best/query_loss"]) == (best, losses[best], losses[best])
    told = {p.step: p.values["best/query_loss"] for p in points_of(config) if "best/query_loss" in p.values}
    assert told == {step: loss for step, loss in losses.items() if loss == min(losses[s] for s in losses if s <= step)}
    assert torch.equal(tensors["head.weight"], state_after(config, best)["meta_params/head.weight"])


def test_an_unknown_selection_metric_lists_what_there_is(tmp_path: Path) -> None:
    config = waves(tmp_path, "unknown", val_every=1, selection_metric="val/query_accuracy")
    with pytest.raises(ConfigError, match=r"'val/query_accuracy' is not among the metrics: .*val/query_loss"):
        loop.train(config, LocalWorker())


# ------------------------------------------------------------------------------------- evaluation


def test_evaluation_of_a_step_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    config = waves(tmp_path, "evaluated")
    loop.train(config, LocalWorker())
    step = model_of(config)[1]["step"]
    assert loop.evaluate(config, LocalWorker(), step=step) == loop.evaluate(config, LocalWorker())
    assert loop.evaluate(config, LocalWorker(), step=5) != loop.evaluate(config, LocalWorker(), step=20)


def test_data_that_changed_since_the_training_are_not_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_store(tmp_path / "tiny.arrow")
    config = pictures(tmp_path, "tiny", num_outer_steps=1, val_every=0)
    loop.train(config, LocalWorker())
    record = {**(build.dataset_record(config) or {}), "content_hash": "0" * 64}
    monkeypatch.setattr(build, "dataset_record", lambda _: record)
    with pytest.raises(RunError, match=r"trained on data with content_hash .*, and now it is 000000000000"):
        loop.evaluate(config, LocalWorker())


def test_evaluation_of_the_validation_split_repeats_the_training_runs_figures(tmp_path: Path) -> None:
    config = waves(tmp_path, "evaluated", num_outer_steps=5)
    values = loop.train(config, LocalWorker())
    found = loop.evaluate(config, LocalWorker(), split="val", step=5).scores["transductive"]["query_loss"]
    assert {k: interval.mean for k, interval in found.items()} == {
        k: values[f"val/query_loss_step_{k}"] for k in range(3)
    }
    assert values["val/query_loss"] == values["val/query_loss_step_2"]


# ------------------------------------------------------------------------------------ checkpoints out of turn


class LeavingWorker(LocalWorker):
    """A worker whose machine says before some steps that it will go, and then goes."""

    def __init__(self, *, says_so_before: range, goes_before: int) -> None:
        super().__init__()
        self.step, self.says_so_before, self.goes_before = -1, says_so_before, goes_before

    def leaving(self) -> bool:
        self.step += 1
        if self.step == self.goes_before:
            raise KeyboardInterrupt
        time.sleep(0.1)  # as long as a step that matters
        return self.step in self.says_so_before


def test_a_machine_that_says_that_it_goes_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmaml.recorder.MOST_SHARE", 1e9)  # however long a checkpoint takes beside other work
    undisturbed, left = waves(tmp_path, "undisturbed"), waves(tmp_path, "left")
    loop.train(undisturbed, LocalWorker())
    with pytest.raises(KeyboardInterrupt):
        loop.train(left, LeavingWorker(says_so_before=range(11, 14), goes_before=14))
    folder = paths.checkpoints(paths.run_folder(left))
    assert checkpoint.steps(folder) == [5, 10, 14], "after the last step that was done, and no more of them"
    loop.train(left, LocalWorker())
    assert same_bits(state_after(left), state_after(undisturbed))
    assert [point.step for point in points_of(left)] == [point.step for point in points_of(undisturbed)]


def test_a_checkpoint_can_be_asked_for_from_another_process(tmp_path: Path) -> None:
    config = waves(tmp_path, "asked", checkpoint_every=20)
    folder, request = paths.checkpoints(paths.run_folder(config)), paths.save_request(paths.run_folder(config))
    seen: set[int] = set()

    class Asking(LocalWorker):
        def leaving(self) -> bool:
            time.sleep(0.1)  # as long as a step that matters
            seen.update(checkpoint.steps(folder))
            if not seen and folder.parent.exists():
                request.touch()
            return False

    loop.train(config, Asking())
    assert len(seen) == 1, "asked once, saved once"
    assert min(seen) < 20
    assert checkpoint.steps(folder) == [20], "the one out of turn is gone when there is another"
    assert not request.exists()
