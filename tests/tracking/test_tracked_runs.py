"""Runs in the embedded database, and what happens when their driver or their MLflow dies."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from distmaml.errors import RunError, TrackingError
from distmaml.segments import SegmentWriter
from distmaml.tracking.database import Tracking, experiment_id, open_tracking
from distmaml.tracking.outbox import Dataset, Outbox
from distmaml.tracking.runs import TrackedRun, sweep
from distmaml.tracking.uploader import Status, replay
from distmaml.tracking.views import seed_view

Start = Callable[..., TrackedRun]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh database; to be copied, since making one takes seconds."""
    folder = tmp_path_factory.mktemp("template")
    open_tracking(folder)
    return folder / "mlflow.db"


@pytest.fixture
def tracking(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(template, tmp_path)
    return open_tracking(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


@pytest.fixture
def start(tracking: Tracking, folder: Path) -> Iterator[Start]:
    """Starts the run; whatever is still open at the end of the test is closed."""
    started = []

    def start(params: dict[str, object] | None = None, **arguments: object) -> TrackedRun:
        options = {"tracking": tracking, "experiment": "omniglot", "name": "first", "tags": {}, **arguments}
        run = TrackedRun.start(folder, params=params or {}, poll_seconds=0.05, **options)  # type: ignore[arg-type]
        started.append(run)
        return run

    yield start
    for run in started:
        run._uploader.close(5.0)


def train(folder: Path, first: int, last: int, *, every: int = 10) -> None:
    writer = SegmentWriter(folder / "metrics", first - 1)
    for step in range(first, last + 1):
        writer.put(step, {"train/query_loss": 1 / step, "train/query_accuracy": 0.5})
        if step % every == 0:
            writer.write(step)
            writer.commit(step)


def steps(client: MlflowClient, run_id: str, key: str = "train/query_loss") -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, key)]


def the_run(tracking: Tracking, experiment: str = "omniglot") -> Run:
    """The one run of the experiment."""
    client = tracking.client()
    (run,) = client.search_runs([experiment_id(tracking, client, experiment)])
    return run


def test_every_point_arrives_exactly_once(start: Start, tracking: Tracking, folder: Path) -> None:
    run = start()
    train(folder, 1, 100)
    assert run.end("FINISHED", timeout=30)
    assert run.run_id is not None
    assert steps(tracking.client(), run.run_id) == list(range(1, 101))


def test_a_replay_adds_nothing(start: Start, tracking: Tracking, folder: Path) -> None:
    run = start()
    train(folder, 1, 100)
    run.add_metrics(100, {"best/query_accuracy": 0.9})
    run.end("FINISHED", timeout=30)
    for _ in range(2):
        (folder / "tracking" / "sent.json").unlink()  # forget what MLflow has, and send all of it
        assert replay(folder, tracking, timeout=30)
    found = the_run(tracking)
    assert steps(tracking.client(), found.info.run_id) == list(range(1, 101))
    assert steps(tracking.client(), found.info.run_id, "best/query_accuracy") == [100]
    assert found.info.status == "FINISHED"


def test_an_uploader_killed_halfway_is_taken_over(tracking: Tracking, folder: Path, tmp_path: Path) -> None:
    train(folder, 1, 4000, every=50)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from distmaml.tracking.database import open_tracking\n"
        "from distmaml.tracking.runs import TrackedRun\n"
        "TrackedRun.start(Path(sys.argv[2]), tracking=open_tracking(Path(sys.argv[1])), experiment='omniglot',\n"
        "                 name='first', params={}, tags={})\n"
        "time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(folder)])
    outbox = Outbox(folder)
    deadline = time.monotonic() + 60
    while (sent := outbox.read_sent(tracking.uri)) is None or sent.step < 100:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    child.wait()
    at_death = outbox.read_sent(tracking.uri)
    assert at_death is not None
    assert at_death.step < 4000  # otherwise nothing is shown here
    assert replay(folder, tracking, timeout=60)
    found = the_run(tracking)
    assert steps(tracking.client(), found.info.run_id) == list(range(1, 4001))
    assert found.info.status == "KILLED"


def test_what_is_not_committed_is_not_sent(start: Start, tracking: Tracking, folder: Path) -> None:
    run = start()
    train(folder, 1, 20)
    (folder / "metrics" / "00000020-00000030.jsonl").write_text('{"step": 21, "timestamp_ms": 1, "val')
    assert run.end("FINISHED", timeout=30)
    assert run.run_id is not None
    assert steps(tracking.client(), run.run_id) == list(range(1, 21))


def test_a_damaged_segment_does_not_hold_up_the_others(start: Start, tracking: Tracking, folder: Path) -> None:
    train(folder, 1, 30)
    (folder / "metrics" / "00000010-00000020.jsonl").write_text("{")
    run = start()
    assert run.end("FINISHED", timeout=30)
    assert run.run_id is not None
    assert steps(tracking.client(), run.run_id) == [*range(1, 11), *range(21, 31)]
    assert "00000010-00000020" in (folder / "tracking" / "refused.jsonl").read_text()


def test_a_run_that_goes_on_is_the_same_run(start: Start, tracking: Tracking, folder: Path) -> None:
    first = start({"num_workers": 1, "inner_lr": 0.1})
    train(folder, 1, 20)
    first.end("KILLED", reason="interrupted", timeout=30)
    assert the_run(tracking).info.status == "KILLED"
    second = start({"num_workers": 3, "inner_lr": 0.1})
    assert second.run_id == first.run_id
    assert the_run(tracking).info.status == "RUNNING"
    train(folder, 21, 40)
    second.end("FINISHED", timeout=30)
    found = the_run(tracking)
    assert (found.info.status, found.data.tags["distmaml.reason"]) == ("FINISHED", "")
    assert steps(tracking.client(), found.info.run_id) == list(range(1, 41))
    assert found.data.params["num_workers"] == "1"
    assert found.data.tags["distmaml.changed_params"] == "num_workers: 1 -> 3"


def test_a_run_is_sent_whole_to_another_mlflow(
    start: Start, tracking: Tracking, folder: Path, template: Path, tmp_path: Path
) -> None:
    run = start({"inner_lr": 0.1})
    train(folder, 1, 20)
    run.end("FAILED", timeout=30)
    (tmp_path / "other").mkdir()
    shutil.copy(template, tmp_path / "other")
    other = open_tracking(tmp_path / "other")
    assert replay(folder, other, timeout=30)
    copy = the_run(other)
    assert copy.data.params["inner_lr"] == "0.1"
    assert copy.info.status == "FAILED"
    assert steps(other.client(), copy.info.run_id) == list(range(1, 21))


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_its_status_and_reason(start: Start, tracking: Tracking, status: Status) -> None:
    before = time.time() * 1000
    assert start().end(status, reason="because", timeout=30)
    found = the_run(tracking)
    assert found.info.status == status
    assert found.data.tags["distmaml.reason"] == "because"
    assert before - 1 <= found.info.start_time <= found.info.end_time <= time.time() * 1000


def test_parameters_are_flat_text_with_learning_rates_as_powers_of_ten(start: Start, tracking: Tracking) -> None:
    start({"inner_lr": 0.1, "outer_lr": 1e-3, "clip_norm": None, "inductive": True, "hidden_sizes": (40, 40)}).end(
        "FINISHED", timeout=30
    )
    assert the_run(tracking).data.params == {
        "inner_lr": "0.1",
        "outer_lr": "0.001",
        "log10_inner_lr": "-1",
        "log10_outer_lr": "-3",
        "clip_norm": "none",
        "inductive": "true",
        "hidden_sizes": "40 40",
    }


def test_a_run_names_its_user_its_script_and_its_data(start: Start, tracking: Tracking) -> None:
    data = Dataset("omniglot", "/data/omniglot", content_hash="ab" * 32, split_hash="cd" * 32)
    start(dataset=data, tags={"mlflow.source.type": "JOB", "mlflow.note.content": "a note"}).end("FINISHED", timeout=30)
    found = the_run(tracking)
    assert {"mlflow.user", "mlflow.source.name", "distmaml.run_uid"} <= found.data.tags.keys()
    assert found.data.tags["mlflow.source.type"] == "JOB"
    assert found.data.tags["distmaml.split_hash"] == "cd" * 32
    (entry,) = found.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("omniglot", "ab" * 18)
    assert {tag.key: tag.value for tag in entry.tags} == {
        "mlflow.data.context": "meta-train",
        "distmaml.split_hash": "cd" * 32,
    }


def test_a_refused_metric_does_not_take_others_with_it(start: Start, tracking: Tracking, folder: Path) -> None:
    run = start()
    writer = SegmentWriter(folder / "metrics", 0)
    for step in range(1, 301):
        writer.put(step, {"train/query_loss": 1.0} | ({"bad=name": 1.0} if step == 77 else {}))
    writer.write(300)
    writer.commit(300)
    assert run.end("FINISHED", timeout=30)
    assert run.run_id is not None
    assert steps(tracking.client(), run.run_id) == list(range(1, 301))
    (refused,) = map(json.loads, (folder / "tracking" / "refused.jsonl").read_text().splitlines())
    assert (refused["metrics"]["key"], refused["metrics"]["step"]) == ("bad=name", 77)


def test_artifacts_lie_under_the_output_directory(
    start: Start, tracking: Tracking, folder: Path, tmp_path: Path
) -> None:
    run = start()
    picture = folder / "artifacts" / "learning.png"
    picture.parent.mkdir()
    picture.write_bytes(b"picture")
    run.add_artifact(picture, "pictures")
    run.add_artifact(folder / "never_written.png")
    with pytest.raises(ValueError, match="not in the subpath"):
        run.add_artifact(tmp_path / "elsewhere.png")
    assert run.end("FINISHED", timeout=30)
    stored = tmp_path / "mlartifacts" / str(run.run_id) / "artifacts" / "pictures" / "learning.png"
    assert stored.read_bytes() == b"picture"
    assert "never_written.png" in (folder / "tracking" / "refused.jsonl").read_text()


def test_an_artifact_store_that_fails_does_not_hold_up_the_end(
    start: Start, tracking: Tracking, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mlartifacts").touch()  # where a folder is wanted
    run = start()
    run.add_artifact(folder / "tracking" / "run.json")
    assert run.end("FINISHED", timeout=30)
    assert the_run(tracking).info.status == "FINISHED"
    assert "run.json" in (folder / "tracking" / "refused.jsonl").read_text()


def test_last_metrics_told_again_after_a_crash_are_logged_once(start: Start, tracking: Tracking) -> None:
    run = start()
    run.add_metrics(100, {"test/query_accuracy": 0.9, "test/query_loss": float("nan")})
    run.end("KILLED", timeout=30)
    again = start()
    again.add_metrics(100, {"test/query_accuracy": 0.9, "test/query_loss": float("nan"), "best/query_accuracy": 0.95})
    again.end("FINISHED", timeout=30)
    client, run_id = tracking.client(), str(run.run_id)
    assert steps(client, run_id, "test/query_accuracy") == [100]
    assert steps(client, run_id, "test/query_loss") == [100]
    assert steps(client, run_id, "best/query_accuracy") == [100]


def test_a_torn_line_of_the_outbox_hides_no_other(start: Start, tracking: Tracking, folder: Path) -> None:
    run = start()
    with (folder / "tracking" / "outbox.jsonl").open("a") as file:
        file.write('{"kind": "metr')
    assert run.end("FINISHED", reason="done", timeout=30)
    assert the_run(tracking).data.tags["distmaml.reason"] == "done"


def test_two_drivers_cannot_have_one_run(start: Start, tracking: Tracking, folder: Path) -> None:
    start()
    with pytest.raises(RunError, match="in use by another process"):
        replay(folder, tracking, timeout=1)


def test_a_start_that_mlflow_refuses_leaves_the_name_free(start: Start, tracking: Tracking) -> None:
    client = tracking.client()
    client.delete_experiment(experiment_id(tracking, client, "gone"))
    with pytest.raises(TrackingError, match="has been deleted"):
        start(experiment="gone")
    start(experiment="omniglot").end("FINISHED", timeout=30)
    assert the_run(tracking).info.status == "FINISHED"


def test_a_run_stays_one_when_its_experiment_gets_another_name(start: Start, tracking: Tracking, folder: Path) -> None:
    train(folder, 1, 10)
    start().end("FINISHED")
    experiment = tracking.client().get_experiment_by_name("omniglot")
    tracking.client().rename_experiment(experiment.experiment_id, "first tries")
    train(folder, 11, 20)
    start().end("FINISHED")
    (run,) = tracking.client().search_runs([experiment.experiment_id])
    assert len(tracking.client().get_metric_history(run.info.run_id, "train/query_loss")) == 20
    assert tracking.client().get_experiment_by_name("omniglot") is None


def test_a_deleted_run_is_not_quietly_gone_on_with(start: Start, tracking: Tracking, folder: Path) -> None:
    run = start()
    run.end("KILLED", timeout=30)
    tracking.client().delete_run(run.run_id)
    with pytest.raises(TrackingError, match="mlflow runs restore"):
        start()
    assert Outbox(folder).has_ended(), "how it ended stays known"


# --------------------------------------------------------------------------------------------------- death


def test_a_run_whose_process_is_gone_is_marked_killed(tracking: Tracking, folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from distmaml.tracking.database import open_tracking\n"
        "from distmaml.tracking.runs import TrackedRun\n"
        "TrackedRun.start(Path(sys.argv[2]), tracking=open_tracking(Path(sys.argv[1])), experiment='omniglot',\n"
        "                 name='first', params={}, tags={})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(folder)])
    assert child.returncode == -signal.SIGKILL
    dead = the_run(tracking)
    assert dead.info.status == "RUNNING"
    assert sweep(tracking, resuming=folder) == []
    assert sweep(tracking) == [dead.info.run_id]
    swept = the_run(tracking)
    assert swept.info.status == "KILLED"
    assert "is gone" in swept.data.tags["distmaml.reason"]
    assert sweep(tracking) == []


def test_a_living_run_is_not_swept(start: Start, tracking: Tracking) -> None:
    start()
    assert sweep(tracking) == []
    assert the_run(tracking).info.status == "RUNNING"


def a_run_elsewhere(tracking: Tracking, host: str, pid: int, pid_started: float, silent_seconds: float) -> str:
    client = tracking.client()
    tags = {
        "distmaml.run_uid": "0",
        "distmaml.host": host,
        "distmaml.pid": str(pid),
        "distmaml.pid_started": str(pid_started),
        "distmaml.heartbeat": str(int((time.time() - silent_seconds) * 1000)),
    }
    return str(client.create_run(experiment_id(tracking, client, "omniglot"), tags=tags).info.run_id)


def test_a_recycled_process_number_is_not_taken_for_the_driver(tracking: Tracking) -> None:
    own_start = psutil.Process().create_time()
    run_id = a_run_elsewhere(tracking, socket.gethostname(), os.getpid(), own_start - 3600, silent_seconds=0)
    assert sweep(tracking) == [run_id]


def test_a_run_of_another_host_lives_as_long_as_its_heart_beats(tracking: Tracking) -> None:
    a_run_elsewhere(tracking, "another-host", 1, 0.0, silent_seconds=200)
    silent = a_run_elsewhere(tracking, "another-host", 1, 0.0, silent_seconds=400)
    assert sweep(tracking) == [silent]
    end_ms = tracking.client().get_run(silent).info.end_time
    assert time.time() * 1000 - end_ms == pytest.approx(400_000, abs=30_000)  # it ended with its last sign of life


def test_other_people_s_runs_are_not_swept(tracking: Tracking) -> None:
    client = tracking.client()
    client.create_run(experiment_id(tracking, client, "omniglot"))
    assert sweep(tracking, silent_seconds=0) == []


def test_a_run_taken_for_dead_comes_back_with_its_next_heartbeat(start: Start, tracking: Tracking) -> None:
    run = start(heartbeat_seconds=0.1)
    tracking.client().set_terminated(run.run_id, "KILLED")
    deadline = time.monotonic() + 10
    while the_run(tracking).info.status != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------ a server that hangs


def test_nothing_waits_for_a_server_that_hangs(
    start: Start, folder: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        run = start(tracking=Tracking(f"http://127.0.0.1:{server.getsockname()[1]}", reachable=False))
        artifact = folder / "table.json"
        artifact.write_text("{}")
        writer = SegmentWriter(folder / "metrics", 0)
        longest = 0.0
        for step in range(1, 501):
            before = time.monotonic()
            writer.put(step, {"train/query_loss": 1.0})
            longest = max(longest, time.monotonic() - before)
        writer.write(500)
        writer.commit(500)
        before = time.monotonic()
        run.add_artifact(artifact)
        assert longest < 0.1
        assert time.monotonic() - before < 0.5
        before = time.monotonic()
        assert not run.end("FINISHED", timeout=1.5)
        assert time.monotonic() - before < 3
        assert run.run_id is None
    assert replay(folder, tracking, timeout=30)  # the embedded database stands in for the server
    found = the_run(tracking)
    assert found.info.status == "FINISHED"
    assert steps(tracking.client(), found.info.run_id) == list(range(1, 501))
    assert [f.path for f in tracking.client().list_artifacts(found.info.run_id)] == ["table.json"]


# --------------------------------------------------------------------------------------------------- views


def test_the_view_compares_runs_by_the_wanted_charts(tracking: Tracking) -> None:
    client = tracking.client()
    experiment = experiment_id(tracking, client, "omniglot")
    for _ in range(2):  # the second writes over the first
        link = seed_view(
            tracking,
            experiment,
            params=["log10_inner_lr", "log10_outer_lr", "num_inner_steps"],
            best="best/query_accuracy",
            test="test/query_accuracy",
            curves=["train/query_loss", "train/query_accuracy", "val/query_accuracy"],
        )
    assert link is not None
    assert link.startswith(f"/#/experiments/{experiment}/runs?")
    assert "viewStateShareKey=distmaml" in link
    tags = client.get_experiment(experiment).tags
    (text,) = [value for key, value in tags.items() if key.startswith("mlflow.sharedViewState.")]
    state = view_state(text)
    charts = [(c["type"], c.get("metricKey") or c["selectedMetrics"]) for c in state["compareRunCharts"]]
    assert charts == [
        ("PARALLEL", ["best/query_accuracy"]),
        ("BAR", "best/query_accuracy"),
        ("BAR", "test/query_accuracy"),
        ("LINE", "train/query_loss"),
        ("LINE", "train/query_accuracy"),
        ("LINE", "val/query_accuracy"),
    ]
    assert state["compareRunCharts"][0]["selectedParams"] == ["log10_inner_lr", "log10_outer_lr", "num_inner_steps"]
    assert [section["name"] for section in state["compareRunSections"]] == ["Comparison", "train", "val"]
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`best/query_accuracy`", False)


def test_the_view_of_a_search_has_its_trials_alone_and_a_contour(tracking: Tracking) -> None:
    client = tracking.client()
    experiment = experiment_id(tracking, client, "search")
    options: dict[str, Any] = {"best": "best/query_loss", "test": "test/query_loss", "curves": ["val/query_loss"]}
    link = seed_view(
        tracking, experiment, params=["log10_inner_lr", "log10_outer_lr", "algorithm"], lower_is_better=True,
        parent_run_id="0123456789abcdef", **options,
    )  # fmt: skip
    assert link is not None
    assert link.endswith("viewStateShareKey=distmaml-01234567")
    state = view_state(client.get_experiment(experiment).tags["mlflow.sharedViewState.distmaml-01234567"])
    assert [chart["type"] for chart in state["compareRunCharts"]] == ["PARALLEL", "CONTOUR", "BAR", "LINE"]
    contour = state["compareRunCharts"][1]
    assert [contour[axis]["key"] for axis in ("xaxis", "yaxis", "zaxis")] == [
        *("log10_inner_lr", "log10_outer_lr", "best/query_loss"),
    ]
    assert state["searchFilter"] == "tags.`mlflow.parentRunId` = '0123456789abcdef'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`best/query_loss`", True)
    assert "metrics.`test/query_loss`" not in state["selectedColumns"]
    for params in ([], ["outer_lr"]):  # nothing to draw a contour over
        assert seed_view(tracking, experiment, params=params, parent_run_id="0123456789abcdef", **options)
        state = view_state(client.get_experiment(experiment).tags["mlflow.sharedViewState.distmaml-01234567"])
        assert "CONTOUR" not in [chart["type"] for chart in state["compareRunCharts"]]


def view_state(tag: str) -> dict[str, Any]:
    packed = json.loads(tag)["state"].removeprefix("deflate;")
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return state


def test_a_view_that_cannot_be_written_stops_nothing(tracking: Tracking) -> None:
    many = [f"train/metric_{number}" for number in range(5000)]
    assert seed_view(tracking, "1", params=[], best="best/a", test="test/a", curves=many) is None
    assert seed_view(tracking, "404", params=[], best="best/a", test="test/a", curves=[]) is None
