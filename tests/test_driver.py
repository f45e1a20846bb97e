"""Whole runs: what they leave behind, how they end, and how they go on."""

import json
import os
import re
import shutil
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from distmaml import checkpoint, driver, launch, ray_cluster
from distmaml.config import Config, override
from distmaml.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    DataError,
    DistmamlError,
    DivergenceError,
    RunError,
    TrackingError,
)
from distmaml.recipes.glyphs import glyphs_maml_5w1s
from distmaml.recipes.sinusoid import sinusoid_maml_5s
from distmaml.segments import committed_segments, read_points
from distmaml.worker import LocalWorker, Worker
from tests.conftest import Job, StartJob

TINY = {
    "num_outer_steps": 4,
    "meta_batch_size": 2,
    "reduction_chunk": 1,
    "val_every": 2,
    "num_val_episodes": 4,
    "num_test_episodes": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "num_eval_steps": 1,
}


def sinusoid(output_dir: Path, **values: Any) -> Config:
    """A run of a moment."""
    return override(sinusoid_maml_5s(), {**TINY, "name": "sine", "output_dir": output_dir, **values})


def glyphs(output_dir: Path, **values: Any) -> Config:
    """A run of a moment that has a data set."""
    settings = {**TINY, "num_filters": 4, "num_queries": 2, "num_eval_queries": 2, "name": "glyphs", **values}
    return override(glyphs_maml_5w1s(), {**settings, "output_dir": output_dir})


@pytest.fixture
def locally(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one worker runs in this process; everything else of the driver is as ever."""

    @contextmanager
    def connect(address: str | None, *, num_cpus: int, environment: object) -> Iterator[Mapping[str, float]]:
        yield {"CPU": float(num_cpus)}

    def fit(loop: Callable[[Config, Worker], Any], config: Config, **_: Any) -> Any:
        return loop(config, LocalWorker())

    monkeypatch.setattr(ray_cluster, "connect", connect)
    monkeypatch.setattr(launch, "fit", fit)
    torch.set_num_threads(1)


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is started all the same fails the test."""

    def connect(address: str | None, *, num_cpus: int, environment: object) -> None:
        pytest.fail("a cluster was started")

    monkeypatch.setattr(ray_cluster, "connect", connect)


def mlflow_runs(output_dir: Path) -> list[Any]:
    """All runs of the embedded database."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def logged_steps(output_dir: Path, run: Any, key: str) -> list[int]:
    """The steps of all points of a metric, duplicates too."""
    from mlflow import MlflowClient

    history = MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}").get_metric_history(run.info.run_id, key)
    return sorted(metric.step for metric in history)


def artifacts(output_dir: Path, run: Any) -> set[str]:
    root = output_dir / "mlartifacts" / run.info.run_id / "artifacts"
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


# ---------------------------------------------------------------------------------------- what a run leaves


@pytest.mark.usefixtures("locally")
def test_a_run_is_one_finished_mlflow_run_with_all_that_belongs_to_it(output_dir: Path) -> None:
    outcome = driver.train(glyphs(output_dir))

    (run,) = mlflow_runs(output_dir)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "glyphs"
    assert run.data.params["inner_lr"] == "0.4"
    assert run.data.params["num_filters"] == "4"
    assert {
        *("train/query_loss", "val/query_accuracy", "val/query_accuracy_step_0", "best/query_accuracy"),
        *("test/query_accuracy", "test_inductive/query_accuracy", "system/tasks_per_second"),
    } <= set(run.data.metrics)
    assert logged_steps(output_dir, run, "train/query_loss") == [1, 2, 3, 4]
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == "glyphs"
    assert len(run.data.tags["distmaml.split_hash"]) >= 16
    assert artifacts(output_dir, run) == {
        *(
            "config.json",
            "model/model.safetensors",
            "evaluation/evaluation-test.json",
            "evaluation/evaluation-test.csv",
        ),
        *("pictures/learning_curve.png", "pictures/adaptation_curve.png", "pictures/episode.png"),
    }
    record = json.loads((outcome.folder / "evaluation-test.json").read_text())
    assert record["num_episodes"] == 4
    assert record["overrides"]["num_filters"] == 4
    assert "inner_lr" not in record["overrides"], "that of the recipe"
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", record["commit"])
    assert record["dataset"]["content_hash"].startswith(data.dataset.digest)
    mean = record["scores"]["transductive"]["query_accuracy"][-1]["mean"]
    assert run.data.metrics["test/query_accuracy"] == pytest.approx(mean)


@pytest.mark.usefixtures("locally")
def test_an_evaluation_joins_the_run_that_it_is_about(output_dir: Path) -> None:
    config = sinusoid(output_dir)
    driver.train(config)
    found, files = driver.evaluate(override(config, {"num_test_episodes": 6}), split="test", step=2)

    stem = f"evaluation-test-6-episodes-{config.evaluation.num_eval_steps}-steps-at-2"
    assert found.step == 2
    with pytest.raises(ConfigError, match=r"step=77 has no checkpoint; there are those of 2, 4\."):
        driver.evaluate(config, split="test", step=77)
    assert [file.name for file in files] == [f"{stem}.json", f"{stem}.csv"]
    (run,) = mlflow_runs(output_dir)
    assert run.info.status == "FINISHED"
    assert f"evaluation/{stem}.json" in artifacts(output_dir, run)
    assert logged_steps(output_dir, run, "evaluation_test/query_loss") == [2]
    assert len(logged_steps(output_dir, run, "test/query_loss")) == 1, "the score of the result is still the only one"


@pytest.mark.usefixtures("locally")
def test_a_picture_that_fails_does_not_make_a_failure_of_the_run(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(*_: Any) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr("distmaml.report.draw", draw)
    outcome = driver.train(sinusoid(output_dir))
    assert outcome.scores is not None
    assert "The pictures could not be drawn (ValueError: no such font" in caplog.text
    assert [run.info.status for run in mlflow_runs(output_dir)] == ["FINISHED"]


@pytest.mark.usefixtures("locally")
def test_a_run_keeps_to_the_pictures_that_it_began_with(output_dir: Path, tmp_path: Path) -> None:
    for number, name in enumerate(["cat", "dog"]):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(15):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{index}.png")
    pets = {"dataset": "image_folder", "data_dir": tmp_path / "pets", "split_by": "samples", "num_ways": 2}
    config = glyphs(output_dir, **pets, image_size=8, num_queries=1, num_eval_queries=1)
    driver.train(config)
    (tmp_path / "pets" / "cat" / "15.png").symlink_to(tmp_path / "pets" / "cat" / "0.png")
    longer = driver.train(override(config, {"resume": True, "num_outer_steps": 6}))
    assert longer.metrics["step"] == 6
    shutil.rmtree(tmp_path / "pets")
    found, _ = driver.evaluate(config, split="val", step=4)
    assert found.step == 4


# ------------------------------------------------------------------------------------- names and resumption


@pytest.mark.usefixtures("locally")
def test_a_run_goes_on_in_the_mlflow_that_has_it(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sinusoid(output_dir)
    driver.train(config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    outcome = driver.train(override(config, {"resume": True, "num_outer_steps": 6}))
    assert outcome.compare[0] == f"run  DISTMAML_HOME={output_dir} make ui"
    (run,) = mlflow_runs(output_dir)
    assert logged_steps(output_dir, run, "train/query_loss") == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("locally")
def test_workers_without_work_are_told_of(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver.train(sinusoid(output_dir, num_workers=3))
    assert "3 workers, but a step has 2 chunks of 1 task: the others have nothing to do" in capsys.readouterr().err


@pytest.mark.usefixtures("locally")
@pytest.mark.parametrize(("tested", "is_told"), [(2, True), (3, False)])
def test_a_test_of_fewer_steps_than_the_training_is_told_of(
    tested: int, is_told: bool, output_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.train(sinusoid(output_dir, num_inner_steps=3, num_eval_steps=tested))
    said = "maml trains by 3 inner steps, and is validated and tested after 2; --num-eval-steps 3 tests"
    assert (said in capsys.readouterr().err) == is_told


@pytest.mark.usefixtures("locally")
def test_a_finished_run_is_neither_repeated_nor_silently_continued(output_dir: Path) -> None:
    config = sinusoid(output_dir)
    driver.train(config)
    with pytest.raises(RunError, match=r"exists in .*4 outer steps long.*--resume.*--name"):
        driver.train(config)
    with pytest.raises(RunError, match=r"finished its 4 outer steps.*--num-outer-steps"):
        driver.train(override(config, {"resume": True}))
    with pytest.raises(RunError, match=r"cannot go on with inner_lr=0\.5 \(was 0\.01\)"):
        driver.train(override(config, {"resume": True, "inner_lr": 0.5, "num_outer_steps": 6}))
    assert len(mlflow_runs(output_dir)) == 1


@pytest.mark.usefixtures("locally")
def test_a_finished_run_goes_on_when_more_steps_are_asked_for(output_dir: Path) -> None:
    driver.train(sinusoid(output_dir))
    longer = driver.train(sinusoid(output_dir, resume=True, num_outer_steps=6, num_workers=2))

    (run,) = mlflow_runs(output_dir)
    assert run.info.status == "FINISHED"
    assert logged_steps(output_dir, run, "train/query_loss") == [1, 2, 3, 4, 5, 6]
    straight = driver.train(sinusoid(output_dir, name="straight", num_outer_steps=6))
    assert_same_result(longer.folder, straight.folder, step=6)


@pytest.mark.usefixtures("locally")
def test_a_run_that_was_killed_in_its_test_is_tested_when_resumed(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(config: Config, worker: Worker, *, tell: object) -> None:
        raise KeyboardInterrupt

    config = sinusoid(output_dir)
    with monkeypatch.context() as patch:
        patch.setattr("distmaml.loop.evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            driver.train(config)
    assert [run.info.status for run in mlflow_runs(output_dir)] == ["KILLED"]
    outcome = driver.train(override(config, {"resume": True}))
    assert outcome.scores is not None
    assert [run.info.status for run in mlflow_runs(output_dir)] == ["FINISHED"]


@pytest.mark.usefixtures("locally")
def test_the_same_command_goes_on_with_a_run_that_was_stopped_and_another_does_not(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(worker: LocalWorker, metrics: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    config = sinusoid(output_dir)
    with monkeypatch.context() as patch:
        patch.setattr(LocalWorker, "report", report)
        patch.setattr(driver, "SAVE_SECONDS", 0.1)  # nobody will save: the one worker is gone
        with pytest.raises(KeyboardInterrupt):
            driver.train(config)
    with pytest.raises(RunError, match=r"2 outer steps long, and it is over or has other settings\. Go on .*--resume"):
        driver.train(override(config, {"seed": 5}))
    capsys.readouterr()
    outcome = driver.train(override(config, {"num_workers": 3}))
    assert "sine was stopped after 2 outer steps: it goes on." in capsys.readouterr().err
    straight = driver.train(sinusoid(output_dir, name="straight"))
    assert_same_result(outcome.folder, straight.folder, step=4)
    assert sorted(run.info.run_name for run in mlflow_runs(output_dir)) == ["sine", "straight"]
    with pytest.raises(RunError, match="it is over or has other settings"):
        driver.train(config)


@pytest.mark.usefixtures("locally")
def test_a_run_that_stopped_early_says_so_when_it_is_resumed(output_dir: Path) -> None:
    # outer_lr is so small that the loss of validation is the same, hence never better than the first
    config = sinusoid(output_dir, num_outer_steps=40, patience=1, outer_lr=1e-30)
    outcome = driver.train(config)
    assert outcome.metrics["step"] == 4
    with pytest.raises(RunError, match=r"stopped early after 4 outer steps.*--patience"):
        driver.train(override(config, {"resume": True}))
    assert driver.train(override(config, {"resume": True, "patience": 2})).metrics["step"] == 6


@pytest.mark.usefixtures("locally")
def test_a_run_without_a_checkpoint_starts_anew_under_its_name(output_dir: Path) -> None:
    with pytest.raises(DivergenceError):
        driver.train(sinusoid(output_dir, outer_lr=1e30))  # a slip of the hand
    driver.train(sinusoid(output_dir))
    runs = mlflow_runs(output_dir)
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]
    assert {run.data.params["outer_lr"] for run in runs} == {"1e+30", "0.001"}


@pytest.mark.usefixtures("locally")
def test_a_run_whose_checkpoints_are_all_damaged_is_not_deleted(output_dir: Path) -> None:
    outcome = driver.train(sinusoid(output_dir))
    for file in (outcome.folder / "checkpoints").iterdir():
        file.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged"):
            driver.train(sinusoid(output_dir, resume=True, num_outer_steps=6))
        with pytest.raises(RunError, match=r"'sine' exists in .*--name"):
            driver.train(sinusoid(output_dir))
    assert (outcome.folder / "model.safetensors").exists()


@pytest.mark.usefixtures("locally")
def test_a_run_in_use_is_not_touched(output_dir: Path) -> None:
    from distmaml.tracking.outbox import Outbox

    folder = output_dir / "runs" / "sine"
    outbox = Outbox(folder)
    outbox.claim()
    (folder / "config.json").write_text("{}")
    try:
        with pytest.raises(RunError, match=r"in use by another process"):
            driver.train(sinusoid(output_dir))
    finally:
        outbox.release()
    assert (folder / "config.json").read_text() == "{}"


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.usefixtures("locally")
def test_a_run_that_diverges_has_failed_with_a_reason_and_keeps_its_last_checkpoint(output_dir: Path) -> None:
    changes = {"num_outer_steps": 40, "checkpoint_every": 1, "optimizer": "sgd", "val_every": 0, "outer_lr": 1e18}
    config = sinusoid(output_dir, **changes)
    with pytest.raises(DivergenceError, match=r"no longer finite at outer step \d+.*learning rate"):
        driver.train(config)
    (run,) = mlflow_runs(output_dir)
    assert run.info.status == "FAILED"
    assert "no longer finite at outer step" in run.data.tags["distmaml.reason"]
    folder = output_dir / "runs" / "sine" / "checkpoints"
    newest = checkpoint.newest(folder)
    assert newest is not None
    tensors, _ = checkpoint.load(checkpoint.path_of(folder, newest))
    assert all(tensor.isfinite().all() for name, tensor in tensors.items() if name.startswith("meta_params/"))


@pytest.mark.usefixtures("locally")
def test_parameters_that_overflow_are_never_a_checkpoint(output_dir: Path) -> None:
    """The loss of the first step is fine, and so is its gradient."""
    config = sinusoid(output_dir, checkpoint_every=1, outer_lr=1e38, optimizer="sgd", val_every=0)
    with pytest.raises(DivergenceError, match="parameter_norm is no longer finite at outer step 1"):
        driver.train(config)
    assert not list((output_dir / "runs" / "sine").glob("**/*.safetensors"))


@pytest.mark.usefixtures("locally")
def test_the_next_command_sends_what_a_run_had_left(output_dir: Path) -> None:
    driver.train(sinusoid(output_dir))
    # As after an outage for the whole run: MLflow knows nothing of it.
    with closing(sqlite3.connect(output_dir / "mlflow.db")) as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table}")
        database.commit()
    assert not mlflow_runs(output_dir)
    (output_dir / "runs" / "sine" / "tracking" / "sent.json").unlink()

    driver.train(sinusoid(output_dir, name="next"))
    assert {run.info.run_name: run.info.status for run in mlflow_runs(output_dir)} == {
        "sine": "FINISHED",
        "next": "FINISHED",
    }
    (left,) = [run for run in mlflow_runs(output_dir) if run.info.run_name == "sine"]
    assert logged_steps(output_dir, left, "train/query_loss") == [1, 2, 3, 4]


@pytest.mark.usefixtures("locally")
@pytest.mark.slow
def test_a_run_without_mlflow_ends_well(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distmaml.tracking.runs import TrackedRun

    original = TrackedRun.end
    monkeypatch.setattr(TrackedRun, "end", lambda self, status, **_: original(self, status, timeout=1.0))
    config = sinusoid(output_dir, tracking_uri="http://127.0.0.1:9")
    outcome = driver.train(config)
    assert outcome.scores is not None
    assert outcome.compare[0].startswith("open http://127.0.0.1:9")
    kept = [p.step for s in committed_segments(outcome.folder / "metrics", -1) for p in read_points(s)]
    assert sorted({*kept}) == [1, 2, 3, 4], "the points wait in the run's folder"
    assert not (outcome.folder / "tracking" / "sent.json").exists()
    driver.evaluate(override(config, {"tracking_uri": None}), split="test", step=None)
    assert not mlflow_runs(output_dir), "the server has the run, or will; here it would be a second one"


# -------------------------------------------------------------------------------------------- before the start


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_ways": 500}, DataError, "num_ways=500 asks for more classes"),
        ({"objective": "regression"}, ConfigError, r"returns \[5, 5\] for targets \[5\]; broadcasting"),
        ({"rotations": "all"}, ConfigError, "rotations='all' does not suit glyphs"),
        ({"selection_metric": "val/query_loss"}, ConfigError, "would pick the worst model. Add --selection-mode min"),
        ({"selection_metric": "val/f1"}, ConfigError, "selection_metric='val/f1' is not among"),
        ({"selection_metric": "val/f1", "val_every": 0}, ConfigError, "selection_metric='val/f1' is not among"),
        ({"address": "127.0.0.1:9"}, ClusterError, "no Ray cluster at 127.0.0.1:9"),
        ({"use_gpu": "yes"}, ConfigError, "no GPU on this machine"),
        ({"tracking_uri": "postgresql://db"}, TrackingError, "is not the address of an MLflow server"),
        ({"tracking_uri": "http://[::1"}, TrackingError, "is not the address of an MLflow server"),
        ({"tracking_uri": "http://host:99999999"}, TrackingError, "is not the address of an MLflow server"),
        ({"name": "a/b"}, ConfigError, "may hold only letters"),
        ({"name": "\u6f22" * 50}, ConfigError, "longer than the 100 bytes"),
        ({"num_workers": 100_000}, ConfigError, r"num_workers=100000 is more than this machine can carry: \d+"),
        ({"num_inner_steps": 10**8}, ConfigError, "num_inner_steps=100000000 must be 10000 or less"),
        ({"num_eval_steps": 10**8}, ConfigError, "num_eval_steps=100000000 must be 10000 or less"),
        ({"selection_metric": "val/query_accuracy_step_2"}, ConfigError, "each also with _step_0 to _step_1"),
        ({"patience": 3, "val_every": 0}, ConfigError, "patience=3 counts validations"),
        ({"dataset": "s3://key:secret@b/x.arrow?scheme=http"}, ConfigError, "holds a key.*AWS_ACCESS_KEY_ID"),
        ({"dataset": "omniglott"}, ConfigError, r"did you mean 'omniglot'.*\.arrow.*package\.module:attribute"),
        ({"output_dir": Path("~nosuchuser/x")}, RunError, "~nosuchuser/x: Could not determine home directory"),
        ({"data_dir": Path("~nosuchuser/x")}, RunError, "~nosuchuser/x: Could not determine home directory"),
        ({"resume": True}, RunError, "no run named 'glyphs'"),
        ({"resume": True, "name": None}, ConfigError, "--resume needs the --name"),
    ],
)
def test_what_can_be_known_before_is_said_before_a_cluster_starts(
    output_dir: Path, values: dict[str, Any], error: type[DistmamlError], message: str
) -> None:
    if values.get("use_gpu") == "yes" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(error, match=message) as caught:
        driver.train(override(glyphs(output_dir), values))
    assert "secret" not in str(caught.value)
    assert not (output_dir / "runs" / "glyphs" / "config.json").exists(), "another try may take the name"
    assert not mlflow_runs(output_dir)


@pytest.mark.usefixtures("no_cluster")
def test_an_output_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write in .*file/here.*--output-dir"):
        driver.train(sinusoid(tmp_path / "file" / "here"))


@pytest.mark.usefixtures("locally")
def test_a_worker_that_does_not_see_the_runs_folder_says_so_before_it_trains(output_dir: Path) -> None:
    """As where every node has its own disk under that path."""
    config = sinusoid(output_dir)
    with pytest.raises(RunError, match=r"does not see the run in .*runs/sine .*No such file.*--output-dir"):
        driver.train_and_test(config, LocalWorker())
    driver.train(config)
    with pytest.raises(RunError, match=r"has another run of that name in .*--output-dir"):
        driver.train_and_test(override(config, {"seed": 5}), LocalWorker())


@pytest.mark.usefixtures("no_cluster")
def test_an_output_folder_without_room_is_named(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
    with pytest.raises(RunError, match=r"1 MiB of free space"):
        driver.train(sinusoid(output_dir))


# ------------------------------------------------------------------------------------------------ with Ray

WAVES = '''
import time
from distmaml.tasks.sinusoid import SinusoidTasks

class Waves(SinusoidTasks):
    """Sine waves that come slowly, so that there is time to kill somebody."""

    def __init__(self, *, split, seed):
        super().__init__(split=split, seed=seed, num_shots=5, num_queries=5)

    def sample(self, indices):
        time.sleep(0.05 if self.split == "train" else 0)
        return super().sample(indices)
'''


class Waves:
    """Commands over tasks of the user's own, in the working directory, and what they leave."""

    def __init__(self, start_job: StartJob, folder: Path, prepared: Path) -> None:
        self.folder, self._start_job = folder, start_job
        self.output_dir = Path(shutil.copytree(prepared, folder / "output"))
        (folder / "waves.py").write_text(WAVES)

    def train(self, name: str, *arguments: str) -> Job:
        options = (
            f"--tasks waves:Waves --output-dir {self.output_dir} --name {name} --meta-batch-size 4 --reduction-chunk 2 "
            "--num-outer-steps 60 --val-every 20 --num-val-episodes 4 --num-test-episodes 4 --checkpoint-every 10 "
            "--log-every 5 --num-eval-steps 1"
        )
        return self._start_job("train", "sinusoid-maml-5s", *options.split(), *arguments, folder=self.folder)

    def run(self, name: str) -> Path:
        return self.output_dir / "runs" / name

    def steps(self, name: str) -> list[int]:
        return checkpoint.steps(self.run(name) / "checkpoints")

    def mlflow_run(self, name: str) -> Any:
        """The one MLflow run of a name."""
        (run,) = [run for run in mlflow_runs(self.output_dir) if run.info.run_name == name]
        return run

    def assert_complete(self, name: str) -> None:
        """One finished MLflow run, with each point once."""
        run = self.mlflow_run(name)
        assert run.info.status == "FINISHED"
        assert logged_steps(self.output_dir, run, "train/query_loss") == list(range(5, 61, 5))
        assert logged_steps(self.output_dir, run, "val/query_loss") == [20, 40, 60]

    def assert_nothing_of_ray_is_left(self, job: Job) -> None:
        end = time.monotonic() + 5
        while job.ray_processes() and time.monotonic() < end:
            time.sleep(0.2)
        assert job.ray_processes() == []
        assert not (self.output_dir / "ray").exists()


@pytest.fixture(scope="module")
def waves(start_job: StartJob, tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Waves:
    return Waves(start_job, tmp_path_factory.mktemp("waves"), prepared)


@pytest.fixture(scope="module")
def undisturbed(waves: Waves) -> Job:
    """The run that all the others are held against; on one worker, where they have two."""
    job = waves.train("undisturbed", "--num-workers", "1")
    assert job.wait() == 0, job.output
    return job


def assert_same_result(one: Path, other: Path, *, step: int) -> None:
    """The last checkpoints hold the same bits."""
    files = [checkpoint.path_of(folder / "checkpoints", step).read_bytes() for folder in (one, other)]
    left, right = map(safetensors.torch.load, files)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.ray
def test_a_run_prints_what_a_user_wants_to_see_and_no_more(waves: Waves, undisturbed: Job) -> None:
    lines = [line for line in undisturbed.output.splitlines() if line]
    progress = [line for line in lines if re.match(r"step \d+/60", line)]
    assert progress
    assert len(set(progress)) == len(progress)
    others = [line for line in lines if line not in progress]
    patterns = (
        r"1 worker on .*",
        r"Test on .*",
        r" *inner step .*",
        r"0 \(before\) .*",
        r" *1 .*",
        r"model .*",
        r"pictures .*",
        r"compare   run  DISTMAML_HOME=.* make ui",
        r"          open http://127\.0\.0\.1:5000/#/experiments/.*viewStateShareKey=distmaml",
    )
    assert len(others) == len(patterns), undisturbed.output
    for line, pattern in zip(others, patterns, strict=True):
        assert re.fullmatch(pattern, line), undisturbed.output
    waves.assert_complete("undisturbed")
    waves.assert_nothing_of_ray_is_left(undisturbed)


@pytest.mark.ray
def test_pictures_of_ones_own_train_by_a_relative_path(start_job: StartJob, prepared: Path, tmp_path: Path) -> None:
    """Cats and dogs: two folders, divided by samples. Workers have another working directory than the command."""
    for number, name in enumerate(["cat", "dog"]):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(50):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{index}.jpg")
    shutil.copytree(prepared, tmp_path / "output")
    options = (
        "--data-dir pets --image-size 16 --split-by samples --num-ways 2 --num-shots 5 --num-queries 5 "
        "--num-eval-queries 5 --num-outer-steps 2 --meta-batch-size 2 --num-val-episodes 2 --name pets "
        "--num-test-episodes 2 --num-filters 4 --output-dir output"
    )
    job = start_job("train", "image-folder-maml", *options.split(), folder=tmp_path)
    assert job.wait() == 0, job.output
    assert "Test on 2 episodes of the test pictures of classes that training has seen (split_by samples):" in job.output
    assert "http://127.0.0.1:5000/#/experiments/" in job.output

    wanted = ["--run", "pets", "--num-episodes", "4", "--output-dir", "output"]
    scored = start_job("evaluate", *wanted, folder=tmp_path)
    assert scored.wait() == 0, scored.output
    lines = scored.output.splitlines()
    seen = "the test pictures of classes that training has seen (split_by samples)"
    assert lines[0] == f"pets after 2 outer steps, 4 episodes of {seen}:"
    assert len([line for line in lines if "+-" in line]) == 11  # before adaptation and after each of 10 steps
    written = [Path(line) for line in lines if line.endswith((".json", ".csv"))]
    assert json.loads(written[0].read_text())["num_episodes"] == 4

    (tmp_path / "new").mkdir()
    shutil.copy(tmp_path / "pets" / "dog" / "7.jpg", tmp_path / "new" / "who.jpg")
    wanted = ["--model", "output/runs/pets", "--support", "pets", "--query", "new"]
    adapted = start_job("adapt", *wanted, folder=tmp_path)
    assert adapted.wait() == 0, adapted.output
    header, row = (tmp_path / "predictions.csv").read_text().splitlines()
    assert header == "picture,label,cat,dog"
    picture, label, *probabilities = row.split(",")
    assert (picture, label) == ("who.jpg", "cat" if float(probabilities[0]) >= 0.5 else "dog")
    assert sum(map(float, probabilities)) == pytest.approx(1.0, abs=2e-4)
    assert f"who.jpg: {label}" in adapted.output


def end_seconds() -> float:
    """How long a stopped run may take to end: 10 s, where nobody else wants the processors."""
    return 10 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_in_order(waves: Waves, number: signal.Signals) -> None:
    name = number.name.lower()
    job = waves.train(name, "--num-workers", "1")
    job.wait_for(lambda: 10 in waves.steps(name))
    begun = time.monotonic()
    job.signal(number)
    time.sleep(0.5)
    if job.process.poll() is None:
        job.signal(number)  # an impatient user
    assert job.wait(seconds=120) == 130, job.output
    assert time.monotonic() - begun < end_seconds()
    assert job.output.splitlines()[-1].startswith("stopped"), job.output
    assert not re.search("Traceback|Error", job.output), job.output
    assert waves.steps(name)
    assert waves.mlflow_run(name).info.status == "KILLED"
    waves.assert_nothing_of_ray_is_left(job)


@pytest.mark.ray
def test_a_signal_ends_a_run_whose_cluster_is_just_starting(waves: Waves) -> None:
    job = waves.train("hasty", "--num-workers", "1")
    job.wait_for(lambda: job.running("gcs_server"))
    begun = time.monotonic()
    job.signal(signal.SIGINT)
    assert job.wait(seconds=120) == 130, job.output
    assert time.monotonic() - begun < end_seconds()
    assert not re.search("Traceback|Error", job.output), job.output
    assert waves.mlflow_run("hasty").info.status == "KILLED"
    waves.assert_nothing_of_ray_is_left(job)


@pytest.mark.ray
def test_a_run_that_diverges_on_workers_is_stopped_and_not_tried_again(waves: Waves) -> None:
    wrong = "--outer-lr 1e18 --optimizer sgd --val-every 0 --checkpoint-every 1"
    job = waves.train("steep", "--num-workers", "2", *wrong.split())
    assert job.wait() == 2, job.output
    lines = job.output.splitlines()
    assert lines[-1].startswith("error: "), job.output
    assert "no longer finite at outer step" in lines[-1]
    assert not re.search("Traceback|Ray", job.output), job.output
    run = waves.mlflow_run("steep")
    assert run.info.status == "FAILED"
    assert "no longer finite" in run.data.tags["distmaml.reason"]
    assert Counter(waves.steps("steep")), "the last good checkpoint is kept"
    waves.assert_nothing_of_ray_is_left(job)
