"""Sends what lies in a run's folder to MLflow, from a thread of the driver or, later, from anywhere.

Everything may be sent twice and is kept once. The run is looked up by its own identity before it is created; MLflow's
key of a metric point contains its time stamp and value, so a repeated point is dropped; parameters, tags and data sets
are the same when set again. What MLflow has is remembered after the fact, in ``sent.json``.

A dead server costs the training nothing: the thread waits and tries again. What a living one refuses for good (a
metric's name, say) is put aside in ``refused.jsonl``, alone: a refused batch is halved until the culprit is found.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
from mlflow import MlflowClient
from mlflow.entities import Dataset as MlflowDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from distmaml.errors import RunError, TrackingError
from distmaml.segments import committed_segments, read_points
from distmaml.tracking.database import Tracking, experiment_id
from distmaml.tracking.outbox import Dataset, Outbox, Sent

log = logging.getLogger(__name__)

UID_TAG = "distmaml.run_uid"
HEARTBEAT_TAG = "distmaml.heartbeat"
HOST_TAG = "distmaml.host"
PROCESS_TAG = "distmaml.pid"
PROCESS_START_TAG = "distmaml.pid_started"

Status = Literal["FINISHED", "FAILED", "KILLED"]

_LIMITS = {"metrics": 1000, "params": 100, "tags": 100}  # of one request, by the server
_LONGEST_WAIT = 30.0  # seconds between tries
_ARTIFACT_TRIES = 3
# Everything else (no connection, a full disk, a login that is missing) can be put right while we wait.
_PERMANENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


class Uploader:
    """The one sender of one run.

    Args:
      outbox: the run's folder, claimed by the caller; the uploader gives it up when it is closed.
      tracking: where to.
      alive: a driver lives in this process, so the run is kept RUNNING and its heartbeat is sent.
      poll_seconds: between looks at the folder.
      heartbeat_seconds: between heartbeats.

    Raises:
      RunError: no run was started in the folder.
    """

    def __init__(
        self,
        outbox: Outbox,
        tracking: Tracking,
        *,
        alive: bool,
        poll_seconds: float = 2.0,
        heartbeat_seconds: float = 30.0,
    ) -> None:
        record = outbox.read_run()
        if record is None:
            raise RunError(f"{outbox.run_folder} has no tracking/run.json: no run was started there.")
        self._outbox, self._tracking, self._record = outbox, tracking, record
        self._alive = alive
        self._poll_seconds, self._heartbeat_seconds = poll_seconds, heartbeat_seconds
        self._next_heartbeat = 0.0
        self._client: MlflowClient | None = None
        self._checked = False
        self._away, self._wait = False, 1.0
        self._ended = False
        self._refused = False
        self._artifact_failures = 0
        self._sent = outbox.read_sent(tracking.uri)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._deadline = 0.0
        self._drained = False
        self._thread = threading.Thread(target=self._work, name="mlflow-uploader", daemon=True)

    @property
    def sent(self) -> Sent | None:
        """What MLflow has; None before the run is created there."""
        return self._sent

    def connect(self) -> None:
        """Creates the run, or finds it and sets it to RUNNING, now and in this thread. Before `start`.

        Raises:
          TrackingError: MLflow is there and does not want the run.
          MlflowException: MLflow cannot be reached.
        """
        try:
            self._ensure_run()
            self._beat()
        except MlflowException as error:
            if error.error_code in (*_PERMANENT, "UNAUTHENTICATED", "PERMISSION_DENIED"):
                raise TrackingError(
                    f"MLflow at {self._tracking.uri} refuses the run {self._record.name!r} of the experiment "
                    f"{self._record.experiment!r} ({error}). Check the experiment's name and, for a server with "
                    "logins, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
                ) from error
            raise

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def wake(self) -> None:
        """There is something new; look at once."""
        self._wake.set()

    def close(self, timeout: float) -> bool:
        """Sends what is left for at most `timeout` seconds; False when some of it stays on disk."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        return self._drained

    # ------------------------------------------------------------------------------------------- thread

    def _work(self) -> None:
        try:
            while not self._drained:
                closing = self._closing.is_set()  # before the folder is looked at: what was told until now is sent
                try:
                    self._send_everything()
                except Exception as error:  # whatever it is, the thread must live, and the points are safe
                    if not self._wait_for_mlflow(error):
                        return
                    continue
                if self._away:
                    log.warning("MLflow at %s is back.", self._tracking.uri)
                self._away, self._wait = False, 1.0
                self._drained = closing
                if not closing:
                    self._wake.wait(min(self._poll_seconds, self._heartbeat_seconds))
                    self._wake.clear()
        finally:
            self._outbox.release()

    def _wait_for_mlflow(self, error: Exception) -> bool:
        """Waits before another try; False when there is no time for one."""
        if not self._away:
            log.warning(
                "Cannot write to MLflow at %s (%s). What is not sent stays in %s and is sent when it can be.",
                self._tracking.uri,
                _one_line(error),
                self._outbox.run_folder,
            )
        self._away, self._checked, self._client = True, False, None
        if not self._closing.is_set():
            self._closing.wait(self._wait)
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
            return True
        time.sleep(max(0.0, min(1.0, self._deadline - time.monotonic())))
        return time.monotonic() < self._deadline

    def _send_everything(self) -> None:
        self._ensure_run()
        self._describe()
        for segment in committed_segments(self._outbox.metrics, after=self._done.step):
            self._beat()
            try:
                points = read_points(segment)
            except ValueError as error:
                log.error("A metric segment is damaged and not sent: %s", error)
                self._outbox.refuse({"segment": str(segment.path)}, str(error))
            else:
                values = [(p.timestamp_ms, p.step, p.values) for p in points]
                self._log("metrics", [Metric(k, v, ms, step) for ms, step, vs in values for k, v in vs.items()])
            self._remember(step=segment.end)
        for record in self._outbox.records(after=self._done.outbox):
            self._beat()
            self._tell(record)
            self._remember(outbox=self._done.outbox + 1)
        self._beat()

    # -------------------------------------------------------------------------------------------- MLflow

    @property
    def _mlflow(self) -> MlflowClient:
        if self._client is None:
            self._client = self._tracking.client()
        return self._client

    @property
    def _done(self) -> Sent:
        assert self._sent is not None  # _ensure_run comes first
        return self._sent

    def _remember(self, **changes: Any) -> None:
        self._sent = replace(self._done, **changes)
        self._outbox.write_sent(self._sent)

    def _ensure_run(self) -> None:
        """Makes sure that this MLflow has the run, once per process; an outage in between changes nothing."""
        if self._checked:
            return
        run = self._find_run()
        if run is None:
            experiment = experiment_id(self._tracking, self._mlflow, self._record.experiment)
            run = self._mlflow.create_run(
                experiment,
                start_time=self._record.start_ms,
                run_name=self._record.name,
                tags={**self._record.tags, **self._signs_of_life(), UID_TAG: self._record.uid},
            )
        if run.info.lifecycle_stage == "deleted":
            raise TrackingError(_deleted(run))
        if self._sent is None or self._sent.run_id != run.info.run_id:
            self._sent = Sent(self._tracking.uri, run.info.run_id, run.info.experiment_id)
        self._checked = True

    def _find_run(self) -> Run | None:
        if self._sent is not None:  # its experiment may have another name by now
            try:
                return self._mlflow.get_run(self._sent.run_id)
            except MlflowException as error:
                if error.error_code not in _PERMANENT:
                    raise
        experiment = self._mlflow.get_experiment_by_name(self._record.experiment)
        if experiment is None:
            return None
        tagged = f"tags.`{UID_TAG}` = '{self._record.uid}'"
        runs = self._mlflow.search_runs([experiment.experiment_id], tagged, run_view_type=ViewType.ALL, max_results=1)
        return runs[0] if runs else None

    def _describe(self) -> None:
        if self._done.described:
            return
        self._log("params", [Param(key, value) for key, value in self._record.params.items()])
        dataset = self._record.dataset
        if dataset is not None:
            inputs = [_dataset_input(dataset)]
            self._call({"dataset": dataset.name}, lambda: self._mlflow.log_inputs(self._done.run_id, datasets=inputs))
        self._remember(described=True)

    def _tell(self, record: dict[str, Any]) -> None:
        """Sends one record of the outbox."""
        client, run_id = self._mlflow, self._done.run_id
        match record["kind"]:
            case "artifact":
                self._send_artifact(record)
            case "metrics":
                values = record["values"].items()
                self._log("metrics", [Metric(k, v, record["timestamp_ms"], record["step"]) for k, v in values])
            case "tags":
                self._log("tags", [RunTag(key, value) for key, value in record["tags"].items()])
            case "started":
                client.update_run(run_id, status="RUNNING")
                self._ended = False
            case "ended":
                client.set_terminated(run_id, record["status"], record["timestamp_ms"])
                self._ended = True
            case "torn":
                self._outbox.refuse(record, "a line of outbox.jsonl that a crash has torn")

    def _send_artifact(self, record: dict[str, Any]) -> None:
        """Sends a file, or puts it aside: artifacts have a store of their own, which must not hold up all the rest."""
        file = self._outbox.run_folder / record["file"]
        if not file.is_file():
            self._outbox.refuse(record, "the file does not exist")
            return
        try:
            self._mlflow.log_artifact(self._done.run_id, str(file), record["artifact_path"])
        except Exception as error:  # whatever that store's client raises
            self._find_run()  # raises where it is MLflow itself that is away
            self._artifact_failures += 1
            if self._artifact_failures < _ARTIFACT_TRIES:
                raise
            log.error("MLflow does not take the artifact %s (%s). It stays where it is.", file, _one_line(error))
            self._outbox.refuse(record, str(error))
        self._artifact_failures = 0

    def _beat(self) -> None:
        """Shows that the driver lives. Sets the status too: during an outage others may have taken it for dead."""
        if not self._alive or self._ended or time.monotonic() < self._next_heartbeat:
            return
        self._log("tags", [RunTag(key, value) for key, value in self._signs_of_life().items()])
        self._mlflow.update_run(self._done.run_id, status="RUNNING")
        self._next_heartbeat = time.monotonic() + self._heartbeat_seconds

    def _signs_of_life(self) -> dict[str, str]:
        if not self._alive:
            return {}
        return {
            HEARTBEAT_TAG: str(time.time_ns() // 1_000_000),
            HOST_TAG: socket.gethostname(),
            PROCESS_TAG: str(os.getpid()),
            PROCESS_START_TAG: str(psutil.Process().create_time()),
        }

    def _log(self, kind: Literal["metrics", "params", "tags"], items: list[Any]) -> None:
        for first in range(0, len(items), _LIMITS[kind]):
            self._log_batch(kind, items[first : first + _LIMITS[kind]])

    def _log_batch(self, kind: str, items: list[Any]) -> None:
        def send() -> None:
            self._mlflow.log_batch(self._done.run_id, **{kind: items})

        if len(items) == 1:
            self._call({kind: dict(items[0])}, send)
            return
        try:
            send()
        except MlflowException as error:
            if not self._is_refusal(error):
                raise
            self._log_batch(kind, items[: len(items) // 2])
            self._log_batch(kind, items[len(items) // 2 :])

    def _call(self, what: dict[str, Any], send: Callable[[], None]) -> None:
        """Sends one thing, or puts it aside where MLflow will never take it."""
        try:
            send()
        except MlflowException as error:
            if not self._is_refusal(error):
                raise
            if not self._refused:
                log.error("MLflow refuses %s (%s). All it refuses is kept in %s.", what, error, self._outbox.folder)
            self._refused = True
            self._outbox.refuse(what, str(error))

    def _is_refusal(self, error: MlflowException) -> bool:
        """Whether MLflow refuses what is said about the run, and not the run because it is no longer there."""
        if error.error_code not in _PERMANENT:
            return False
        run = self._find_run()
        return run is not None and run.info.run_id == self._done.run_id and run.info.lifecycle_stage == "active"


def replay(run_folder: Path, tracking: Tracking, *, timeout: float) -> bool:
    """Sends what a run that is over left behind; False when some of it stays, after `timeout` seconds.

    A run that never came to say how it ended was killed, and is marked so. Sending all of it again is harmless, and
    sending it to another MLflow copies the run.

    Raises:
      RunError: there is no run in the folder, or a process is still busy with it.
    """
    outbox = Outbox(run_folder)
    outbox.claim()
    try:
        uploader = Uploader(outbox, tracking, alive=False)
        if not outbox.has_ended():
            outbox.append("ended", _last_sign(outbox), {"status": "KILLED"})
        uploader.start()
    except BaseException:
        outbox.release()
        raise
    return uploader.close(timeout)


def _last_sign(outbox: Outbox) -> int:
    """When the run last wrote something, in milliseconds since 1970."""
    files = [*outbox.metrics.glob("*"), *outbox.folder.glob("*.json*")]
    return int(max(file.stat().st_mtime for file in files) * 1000)


def _dataset_input(dataset: Dataset) -> DatasetInput:
    entity = MlflowDataset(
        name=dataset.name,
        digest=dataset.content_hash[:36],  # no longer ones are taken
        source_type="local",
        source=json.dumps({"uri": dataset.source}),
        profile=json.dumps({"content_hash": dataset.content_hash, "split_hash": dataset.split_hash}),
    )
    tags = [InputTag("mlflow.data.context", "meta-train"), InputTag("distmaml.split_hash", dataset.split_hash)]
    return DatasetInput(entity, tags)


def _deleted(run: Run) -> str:
    return (
        f"The MLflow run {run.info.run_name!r} has been deleted. Restore it (mlflow runs restore --run-id "
        f"{run.info.run_id}), or start under another name."
    )


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
