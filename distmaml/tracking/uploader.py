"""Sends what lies in a run's folder to MLflow, from the driver or, later, from anywhere.

Everything may be sent twice and is kept once. The run is looked up by its own identity before it is created; MLflow's
key of a metric point contains its time stamp and value, so a repeated point is dropped; parameters, tags and data sets
are the same when set again. What MLflow has is remembered after the fact, in ``sent.json``.

A dead server costs the training nothing: a thread (`sender`) waits and tries again. What a living one refuses for good
(a metric's name, say) is put aside in ``refused.jsonl``, alone: a refused batch is halved until the culprit is found.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
from mlflow import MlflowClient
from mlflow.entities import Dataset as MlflowDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from distmaml.errors import RunError, TrackingError
from distmaml.segments import Segment, committed_segments, read_points
from distmaml.tracking.database import Tracking, experiment_id, one_line, own_user, raise_refusal
from distmaml.tracking.outbox import Dataset, Outbox, Sent
from distmaml.tracking.sender import sender_to

log = logging.getLogger(__name__)

UID_TAG = "distmaml.run_uid"
HEARTBEAT_TAG = "distmaml.heartbeat"
HOST_TAG = "distmaml.host"
PROCESS_TAG = "distmaml.pid"
PROCESS_START_TAG = "distmaml.pid_started"

Status = Literal["FINISHED", "FAILED", "KILLED"]

_Kind = Literal["metrics", "params", "tags"]
_LIMITS: dict[_Kind, int] = {"metrics": 800, "params": 100, "tags": 100}  # of a request; a server takes 1000 in all
_ENOUGH = 400  # metrics, after which no further segment is put into a request
_ARTIFACT_TRIES = 3
# Everything else (no connection, a full disk, a login that is missing) can be put right while we wait.
_PERMANENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


class _Batch(NamedTuple):
    """What is sent at once."""

    metrics: list[Metric]
    params: list[Param]
    tags: dict[str, str]
    then: dict[str, Any] | None
    """A record of the outbox that comes after it, alone."""
    after: Sent
    """What MLflow has when it has this, but for that record."""
    last: bool
    """There is no more."""


class Uploader:
    """The one sender of one run, when it is its turn (`sender.Sender`).

    Args:
      outbox: the run's folder, claimed by the caller; the uploader gives it up when it is closed.
      tracking: where to.
      alive: a driver lives in this process, so the run is kept RUNNING and its heartbeat is sent.
      new: MLflow cannot have this run yet.
      poll_seconds: between looks at the folder, at least.
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
        new: bool = False,
        poll_seconds: float = 2.0,
        heartbeat_seconds: float = 60.0,
    ) -> None:
        record = outbox.read_run()
        if record is None:
            raise RunError(f"{outbox.run_folder} has no tracking/run.json: no run was started there.")
        self._outbox, self._tracking, self._record = outbox, tracking, record
        self._alive, self._new = alive, new
        self._poll_seconds, self._heartbeat_seconds = poll_seconds, heartbeat_seconds
        self._next_heartbeat = 0.0
        self._client: MlflowClient | None = None
        self._checked = False
        self._status: str | None = None
        self._refused = False
        self._artifact_failures = 0
        self._sent = outbox.read_sent(tracking.uri)
        self._sender = sender_to(tracking.uri)
        self._over, self._drained = threading.Event(), False
        self.closing, self.deadline = False, 0.0

    @property
    def sent(self) -> Sent | None:
        """What MLflow has; None before the run is created there."""
        return self._sent

    @property
    def folder(self) -> Path:
        """The run's folder, where all that is not sent stays."""
        return self._outbox.run_folder

    def connect(self) -> None:
        """Creates the run, or finds it and sets it to RUNNING, now and in this thread. Before `start`.

        Raises:
          TrackingError: MLflow is there and does not want the run.
          MlflowException: MLflow cannot be reached.
        """
        try:
            self._ensure_run()
            if self._is_due():
                self._log([], self._signs_of_life())
                self._set_running()
        except MlflowException as error:
            raise_refusal(self._tracking.uri, error)
            if error.error_code == "PERMISSION_DENIED":
                raise TrackingError(
                    f"The experiment {self._record.experiment!r} at {self._tracking.uri} is somebody else's, and "
                    f"{own_user()!r} may not write into it. Choose another experiment, have its owner grant EDIT, or "
                    "log in as another user by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
                ) from error
            if error.error_code in _PERMANENT:
                raise TrackingError(
                    f"MLflow at {self._tracking.uri} refuses the run {self._record.name!r} of the experiment "
                    f"{self._record.experiment!r} ({one_line(error)}). Choose another name."
                ) from error
            raise

    def start(self) -> None:
        """Begins to send, in another thread."""
        self._sender.add(self)

    def wake(self) -> None:
        """There is something new; look soon."""
        self._sender.wake(self)

    def close(self, timeout: float, *, wait: bool = True) -> bool:
        """Sends what is left for at most `timeout` seconds; False when some of it stays on disk.

        Args:
          wait: for that; otherwise it is done while others go on, and False says that it was not done at once.
        """
        self._sender.close(self, timeout)
        if wait:
            self._over.wait(timeout)
        return self._drained

    # ------------------------------------------------------------------------------- for the sender, in its thread

    def turn(self) -> float | None:
        """Sends a batch: of metrics as many as fit, and with the last of them what comes after."""
        closing = self.closing  # before the folder is looked at: what was told until now is sent
        self._ensure_run()
        batch = self._next_batch()
        signs = self._signs_of_life() if self._is_due() else {}
        self._log(batch.metrics, {**signs, **batch.tags}, batch.params)
        if signs:
            self._set_running()
        if not self._done.described:
            self._log_dataset()
        if batch.after != self._done:
            self._remember(batch.after)
        if batch.then is not None:
            self._tell(batch.then)
            self._remember(replace(self._done, outbox=self._done.outbox + 1))
        if not batch.last:
            return 0.0
        return None if closing else min(self._poll_seconds, self._heartbeat_seconds)

    def failed(self, error: Exception) -> str:
        """What MLflow has of the run is looked at anew when it is back."""
        self._checked, self._client = False, None
        return one_line(error)

    def over(self, drained: bool) -> None:
        """There are no more turns."""
        self._drained = drained
        self._outbox.release()
        self._over.set()

    def _next_batch(self) -> "_Batch":
        """What is to be sent next: segments, then the records of the outbox, in order."""
        sent = self._done
        metrics: list[Metric] = []
        tags: dict[str, str] = {}
        params = [] if sent.described else [Param(key, value) for key, value in self._record.params.items()]
        step, outbox = sent.step, sent.outbox

        def batch(*, last: bool, then: dict[str, Any] | None = None) -> _Batch:
            after = replace(sent, described=True, step=step, outbox=outbox)
            return _Batch(metrics, params, tags, then, after, last)

        for segment in committed_segments(self._outbox.metrics, after=sent.step):
            if len(metrics) >= _ENOUGH:
                return batch(last=False)
            metrics += self._metrics_of(segment)
            step = segment.end
        for record in self._outbox.records(after=sent.outbox):
            if record["kind"] == "metrics" and len(metrics) < _LIMITS["metrics"]:
                values = record["values"].items()
                metrics += [Metric(k, v, record["timestamp_ms"], record["step"]) for k, v in values]
            elif record["kind"] == "tags":
                tags.update(record["tags"])
            else:
                return batch(last=False, then=None if record["kind"] == "metrics" else record)
            outbox += 1
        return batch(last=True)

    def _metrics_of(self, segment: Segment) -> list[Metric]:
        try:
            points = read_points(segment)
        except RunError as error:
            log.error("A metric segment is damaged and not sent: %s", error)
            self._outbox.refuse({"segment": str(segment.path)}, str(error))
            return []
        return [Metric(k, v, point.timestamp_ms, point.step) for point in points for k, v in point.values.items()]

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

    def _remember(self, sent: Sent) -> None:
        self._sent = sent
        self._outbox.write_sent(sent)

    def _ensure_run(self) -> None:
        """Makes sure that this MLflow has the run, once per process; an outage in between changes nothing."""
        if self._checked:
            return
        run = None if self._new else self._find_run()
        self._new = False  # an answer that does not come may have been a yes
        if run is None:
            experiment = experiment_id(self._tracking, self._mlflow, self._record.experiment)
            run = self._mlflow.create_run(
                experiment,
                start_time=self._record.start_ms,
                run_name=self._record.name,
                tags={**self._record.tags, **self._signs_of_life(), UID_TAG: self._record.uid},
            )
            self._status = "RUNNING"
            self._next_heartbeat = time.monotonic() + self._heartbeat_seconds
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

    def _log_dataset(self) -> None:
        dataset = self._record.dataset
        if dataset is not None:
            inputs = [_dataset_input(dataset)]
            self._call({"dataset": dataset.name}, lambda: self._mlflow.log_inputs(self._done.run_id, datasets=inputs))

    def _tell(self, record: dict[str, Any]) -> None:
        """Sends one record of the outbox that is neither metrics nor tags."""
        match record["kind"]:
            case "artifact":
                self._send_artifact(record)
            case "started" if self._status != "RUNNING":
                self._mlflow.update_run(self._done.run_id, status="RUNNING")
                self._status = "RUNNING"
            case "ended":
                self._mlflow.set_terminated(self._done.run_id, record["status"], record["timestamp_ms"])
                self._status = record["status"]
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
            log.error("MLflow does not take the artifact %s (%s). It stays where it is.", file, one_line(error))
            self._outbox.refuse(record, str(error))
        self._artifact_failures = 0

    def _is_due(self) -> bool:
        return self._alive and self._status in (None, "RUNNING") and time.monotonic() >= self._next_heartbeat

    def _set_running(self) -> None:
        """Sets the status after a heartbeat: before it, others may have taken the run for dead."""
        self._mlflow.update_run(self._done.run_id, status="RUNNING")
        self._status = "RUNNING"
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

    def _log(self, metrics: list[Metric], tags: Mapping[str, str], params: Sequence[Param] = ()) -> None:
        """Sends all of this, by one request where it fits."""
        parts: dict[_Kind, list[Any]] = {
            "metrics": metrics, "params": list(params), "tags": [RunTag(key, value) for key, value in tags.items()],
        }  # fmt: skip
        if sum(map(bool, parts.values())) > 1 and all(len(items) <= _LIMITS[kind] for kind, items in parts.items()):
            try:
                self._mlflow.log_batch(self._done.run_id, **parts)
                return
            except MlflowException as error:
                if not self._is_refusal(error):
                    raise
        for kind, items in parts.items():
            self._log_all(kind, items)

    def _log_all(self, kind: _Kind, items: list[Any]) -> None:
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
