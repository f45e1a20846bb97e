"""Runs that are told to an MLflow server, which is stopped and started under them."""

import http.server
import logging
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest

from distmaml.errors import TrackingError
from distmaml.segments import SegmentWriter
from distmaml.tracking.database import experiment_id, open_tracking
from distmaml.tracking.runs import TrackedRun, settle
from distmaml.tracking.uploader import replay
from distmaml.tracking.views import seed_view
from tests.servers import Server

pytestmark = pytest.mark.ray


class Outage(NamedTuple):
    """What came of two runs: one that lived through an outage, one that began and ended in it."""

    server: Server
    through: Path
    through_id: str
    through_drained: bool
    within: Path
    within_id: str | None
    within_drained: bool
    warnings: list[str]


def train(folder: Path, first: int, last: int) -> None:
    writer = SegmentWriter(folder / "metrics", first - 1)
    for step in range(first, last + 1):
        writer.put(step, {"train/query_loss": 1 / step, "val/query_accuracy": 0.5})
        if step % 50 == 0:
            writer.write(step)
            writer.commit(step)


@pytest.fixture(scope="module")
def outage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outage]:
    output_dir = tmp_path_factory.mktemp("output")
    server = Server(tmp_path_factory.mktemp("server"))
    logger = logging.getLogger("distmaml.tracking")
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    server.start()
    try:
        through, within = output_dir / "runs" / "through", output_dir / "runs" / "within"
        common = {"experiment": "outage", "params": {"inner_lr": 0.1}, "tags": {}, "poll_seconds": 0.1}
        run = TrackedRun.start(through, tracking=open_tracking(output_dir, server.uri), name="through", **common)  # type: ignore[arg-type]
        train(through, 1, 200)
        through_id = run.run_id
        assert through_id is not None
        assert run.url == f"{server.uri}/#/experiments/{run.experiment_id}/runs/{through_id}"
        (through / "table.json").write_text("{}")
        run.add_artifact(through / "table.json", "tables")

        logger.addHandler(handler)
        server.stop()
        train(through, 201, 400)
        away = open_tracking(output_dir, server.uri)
        short = TrackedRun.start(within, tracking=away, name="within", **common)  # type: ignore[arg-type]
        train(within, 1, 100)
        within_drained = short.end("FAILED", reason="diverged", timeout=0.5)
        within_id = short.run_id
        deadline = time.monotonic() + 10
        while not any("through" in warning for warning in warnings):  # its uploader has noticed
            assert time.monotonic() < deadline
            time.sleep(0.05)

        server.start()
        train(through, 401, 600)
        drained = run.end("FINISHED", timeout=60)
        logger.removeHandler(handler)
        yield Outage(server, through, through_id, drained, within, within_id, within_drained, warnings)
    finally:
        logger.removeHandler(handler)
        server.stop()


def steps(outage: Outage, run_id: str) -> list[int]:
    client = open_tracking(outage.through, outage.server.uri).client()
    return [metric.step for metric in client.get_metric_history(run_id, "train/query_loss")]


def test_a_run_that_lives_through_an_outage_loses_nothing(outage: Outage) -> None:
    assert outage.through_drained
    assert steps(outage, outage.through_id) == list(range(1, 601))
    client = open_tracking(outage.through, outage.server.uri).client()
    run = client.get_run(outage.through_id)
    assert (run.info.status, run.data.params["inner_lr"]) == ("FINISHED", "0.1")
    assert [file.path for file in client.list_artifacts(outage.through_id, "tables")] == ["tables/table.json"]


def test_an_outage_costs_one_warning_and_its_end_one(outage: Outage) -> None:
    own = [warning for warning in outage.warnings if "within" not in warning and "cannot be reached" not in warning]
    assert [warning.partition(" at ")[0] for warning in own] == ["Cannot write to MLflow", "MLflow"]
    assert own[1].endswith("is back.")


def test_a_run_within_an_outage_is_sent_afterwards_and_once(outage: Outage) -> None:
    assert not outage.within_drained
    assert outage.within_id is None
    tracking = open_tracking(outage.within, outage.server.uri)
    for _ in range(2):
        assert replay(outage.within, tracking, timeout=60)
        (outage.within / "tracking" / "sent.json").unlink()
    client = tracking.client()
    found = client.search_runs([experiment_id(tracking, client, "outage")], "attributes.run_name = 'within'")
    assert [run.info.status for run in found] == ["FAILED"]
    assert found[0].data.tags["distmaml.reason"] == "diverged"
    assert steps(outage, found[0].info.run_id) == list(range(1, 101))


def test_a_refused_name_arrives_as_a_refusal_from_a_server_too(outage: Outage, tmp_path: Path) -> None:
    tracking = open_tracking(tmp_path, outage.server.uri)
    run = TrackedRun.start(
        tmp_path / "run", tracking=tracking, experiment="refusals", name="r", params={}, tags={}, poll_seconds=0.1
    )
    run.add_metrics(1, {"train/query_loss": 1.0, "bad=name": 2.0, "val/query_loss": float("nan")})
    assert run.end("FINISHED", timeout=30)
    metrics = tracking.client().get_run(run.run_id).data.metrics
    assert metrics.keys() == {"train/query_loss", "val/query_loss"}
    assert "bad=name" in (tmp_path / "run" / "tracking" / "refused.jsonl").read_text()


def test_an_experiment_that_a_server_refuses_is_an_error_at_the_start(outage: Outage, tmp_path: Path) -> None:
    tracking = open_tracking(tmp_path, outage.server.uri)
    with pytest.raises(TrackingError, match="refuses the run"):
        TrackedRun.start(tmp_path / "run", tracking=tracking, experiment="x" * 600, name="r", params={}, tags={})


def requests_after(log: Path, offset: int) -> Counter[str]:
    """What the server was asked, from a place in its log on."""
    return Counter(re.findall(r"/mlflow/(\S+?)[? ].*HTTP/1", log.read_text()[offset:]))


def test_a_run_costs_a_handful_of_requests_however_many_segments_it_has(outage: Outage, tmp_path: Path) -> None:
    tracking = open_tracking(tmp_path, outage.server.uri)
    experiment_id(tracking, tracking.client(), "cheap")
    offset = len(outage.server.log.read_text())
    run = TrackedRun.start(
        tmp_path / "run", tracking=tracking, experiment="cheap", name="r", params={"inner_lr": 0.1}, tags={},
        poll_seconds=60.0,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (tmp_path / "run" / "tracking" / "sent.json").exists():  # it has had its first turn
        assert time.monotonic() < deadline
        time.sleep(0.01)
    train(tmp_path / "run", 1, 200)
    run.add_tags({"distmaml.trial_state": "finished"})
    assert run.end("FINISHED", reason="done", timeout=30)
    asked = requests_after(outage.server.log, offset)
    assert asked == {
        "experiments/get-by-name": 1,
        "runs/create": 1,
        "runs/log-batch": asked["runs/log-batch"],
        "runs/update": 1,
    }
    assert asked["runs/log-batch"] <= 3  # parameters, metrics with tags; two where the tags came in between
    found = tracking.client().get_run(run.run_id)
    assert (found.data.tags["distmaml.trial_state"], found.data.tags["distmaml.reason"]) == ("finished", "done")
    assert len(tracking.client().get_metric_history(run.run_id, "train/query_loss")) == 200


def test_runs_that_do_not_wait_at_their_end_are_sent_all_the_same(outage: Outage, tmp_path: Path) -> None:
    tracking = open_tracking(tmp_path, outage.server.uri)
    runs = []
    threads = threading.active_count()
    for number in range(20):
        folder = tmp_path / f"run-{number}"
        runs.append(TrackedRun.start(folder, tracking=tracking, experiment="many", name="r", params={}, tags={}))
        train(folder, 1, 50)
    assert threading.active_count() == threads + 1
    begun = time.monotonic()
    for run in runs:
        run.end("FINISHED", timeout=60, wait=False)
    took = time.monotonic() - begun
    assert settle(tracking, 60)
    assert took < 0.5 * (time.monotonic() - begun)  # they were sent behind our back
    client = tracking.client()
    assert {client.get_run(run.run_id).info.status for run in runs} == {"FINISHED"}
    assert {len(client.get_metric_history(run.run_id, "train/query_loss")) for run in runs} == {50}


class _Swallowing(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a server, and loses the answer to the first that creates a run."""

    server_uri = ""
    lost: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = urllib.request.Request(
            f"{self.server_uri}{self.path}", body or None, {"Content-Type": "application/json"}, method=self.command
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, content = error.code, error.read()
        if self.path.endswith("/runs/create") and not self.lost:
            self.lost.append(self.path)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        pass


def test_a_run_whose_creation_is_not_answered_is_not_created_again(outage: Outage, tmp_path: Path) -> None:
    _Swallowing.server_uri = outage.server.uri
    _Swallowing.lost.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Swallowing) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            tracking = open_tracking(tmp_path, f"http://127.0.0.1:{proxy.server_address[1]}")
            run = TrackedRun.start(tmp_path / "run", tracking=tracking, experiment="lost", name="r", params={}, tags={})
            assert run.run_id is None
            train(tmp_path / "run", 1, 50)
            assert run.end("FINISHED", timeout=30)
        finally:
            proxy.shutdown()
            thread.join()
    assert len(_Swallowing.lost) == 1  # or nothing is shown here
    direct = open_tracking(tmp_path, outage.server.uri)
    (found,) = direct.client().search_runs([experiment_id(direct, direct.client(), "lost")])
    assert (found.info.run_id, found.info.status) == (run.run_id, "FINISHED")


def test_a_view_is_kept_by_a_server(outage: Outage) -> None:
    tracking = open_tracking(outage.through, outage.server.uri)
    experiment = experiment_id(tracking, tracking.client(), "outage")
    link = seed_view(
        tracking, experiment, params=["inner_lr"], best="best/query_loss", test="test/query_loss",
        curves=["train/query_loss"], lower_is_better=True,
    )  # fmt: skip
    assert link is not None
    with urllib.request.urlopen(f"{outage.server.uri}{link}", timeout=10) as page:
        assert page.status == 200
