"""A training run's life in MLflow, as its driver sees it: start, artifacts, last metrics, end.

Nothing here waits for MLflow except the start (at most some seconds, and only where it answers) and the end (for the
time that it is given). Metrics of the training itself do not pass here: workers write them as segments.
"""

import logging
import math
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from distmaml.errors import TrackingError
from distmaml.tracking.database import Tracking
from distmaml.tracking.outbox import Dataset, Outbox, RunRecord
from distmaml.tracking.sender import sender_to
from distmaml.tracking.uploader import (
    HEARTBEAT_TAG,
    HOST_TAG,
    PROCESS_START_TAG,
    PROCESS_TAG,
    UID_TAG,
    Status,
    Uploader,
)

log = logging.getLogger(__name__)

_LEARNING_RATES = ("inner_lr", "outer_lr")


class TrackedRun:
    """One run in MLflow, from `start` to `end`, over any number of interruptions."""

    def __init__(self, outbox: Outbox, tracking: Tracking, uploader: Uploader) -> None:
        self._outbox, self._tracking, self._uploader = outbox, tracking, uploader

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        tracking: Tracking,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        dataset: Dataset | None = None,
        poll_seconds: float = 2.0,
        heartbeat_seconds: float = 60.0,
    ) -> "TrackedRun":
        """Creates the run, or goes on with the one of this folder, and starts to send what the folder gets.

        A continued run keeps its identity, name, experiment and parameters; parameters that differ now are named in
        the tag distmaml.changed_params, since MLflow's cannot be changed. Where a server cannot be reached the run is
        created when it can.

        Args:
          folder: the run's own folder; segments are expected in its metrics/.
          params: flat; None becomes "none", and learning rates are given as log10_* too, since the axes of MLflow's
            charts are linear.
          tags: added to those that MLflow finds itself (user, script, git commit and branch).
          poll_seconds: between looks for new segments, at least: the more runs this process has, the rarer.
          heartbeat_seconds: between signs of life, by which `sweep` knows a dead run.

        Raises:
          RunError: another process is busy with the run, or its record is damaged.
          TrackingError: MLflow is there and does not want the run.
        """
        texts = _param_texts(params)
        all_tags = {**resolve_tags(dict(tags)), **({"distmaml.split_hash": dataset.split_hash} if dataset else {})}
        outbox = Outbox(folder)
        outbox.claim()
        try:
            earlier = outbox.read_run()
            if earlier is None:
                record = RunRecord(
                    uuid.uuid4().hex, tracking.uri, experiment, name, texts, all_tags, dataset, _now_ms()
                )
            else:
                record = replace(earlier, tracking_uri=tracking.uri)
                changes = [
                    f"{k}: {earlier.params.get(k)} -> {v}" for k, v in texts.items() if earlier.params.get(k) != v
                ]
                all_tags["distmaml.reason"] = ""  # of the earlier end
                if changes:
                    all_tags["distmaml.changed_params"] = "; ".join(changes)
            outbox.write_run(record)
            uploader = Uploader(
                outbox,
                tracking,
                alive=True,
                new=earlier is None,
                poll_seconds=poll_seconds,
                heartbeat_seconds=heartbeat_seconds,
            )
            try:
                _connect(uploader, tracking)
            except TrackingError:
                if earlier is None:
                    outbox.forget()
                else:
                    outbox.write_run(earlier)
                raise
            outbox.append("started", _now_ms(), {})
            if earlier is not None:
                outbox.append("tags", _now_ms(), {"tags": all_tags})
            uploader.start()
        except BaseException:
            outbox.release()
            raise
        return cls(outbox, tracking, uploader)

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run; None while a server that must create it cannot be reached."""
        sent = self._uploader.sent
        return None if sent is None else sent.run_id

    @property
    def experiment_id(self) -> str | None:
        """MLflow's name of the experiment; None like `run_id`."""
        sent = self._uploader.sent
        return None if sent is None else sent.experiment_id

    @property
    def url(self) -> str | None:
        """The run's page; None for an embedded database, or while the run is not there."""
        if self._tracking.embedded or self.run_id is None:
            return None
        return f"{self._tracking.uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    def add_artifact(self, file: Path, artifact_path: str | None = None) -> None:
        """Hands over a file of the run's folder, into the folder `artifact_path` of the run's artifacts.

        The file must stay until it is sent.

        Raises:
          ValueError: the file does not lie in the run's folder.
        """
        relative = file.absolute().relative_to(self._outbox.run_folder.absolute())
        self._tell("artifact", {"file": str(relative), "artifact_path": artifact_path})

    def add_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metrics of the run as a whole (best/*, test/*), at the outer step they belong to."""
        if self._outbox.append_metrics(step, values):
            self._uploader.wake()

    def add_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        self._tell("tags", {"tags": dict(tags)})

    def end(self, status: Status, *, reason: str | None = None, timeout: float = 30.0, wait: bool = True) -> bool:
        """Ends the run and sends what is left for at most `timeout` seconds.

        Args:
          status: FINISHED, FAILED or KILLED.
          reason: becomes the tag distmaml.reason.
          wait: for that. A driver of many runs does not: the thread that sends goes on for so long, `settle` waits
            for all of them, and what was not sent by then is sent like that of any run.

        Returns:
          Whether all of it has been sent. The rest stays in the folder for `distmaml.tracking.uploader.replay`.
        """
        if reason is not None:
            self.add_tags({"distmaml.reason": reason})
        self._outbox.append("ended", _now_ms(), {"status": status})
        drained = self._uploader.close(timeout, wait=wait)
        if wait and not drained:
            log.warning(
                "Not all of the run was sent to MLflow at %s. The rest stays in %s and can be sent later.",
                self._tracking.uri,
                self._outbox.run_folder,
            )
        return drained

    def _tell(self, kind: str, content: Mapping[str, Any]) -> None:
        self._outbox.append(kind, _now_ms(), content)
        self._uploader.wake()


def settle(tracking: Tracking, timeout: float) -> bool:
    """Waits for what runs that have ended without waiting left to send; whether that was done in so many seconds."""
    return sender_to(tracking.uri).settle(timeout)


def _connect(uploader: Uploader, tracking: Tracking) -> None:
    if not tracking.reachable:
        return
    try:
        uploader.connect()
    except MlflowException as error:
        if tracking.embedded:
            raise TrackingError(
                f"The embedded MLflow database {tracking.uri} cannot be used ({error}). Look for another process that "
                "holds it and for free space, or give the tracking_uri of a server."
            ) from error
        # The uploader meets the same trouble in a moment, and says so.


def _param_texts(params: Mapping[str, Any]) -> dict[str, str]:
    texts = {key: _param_text(value) for key, value in params.items()}
    for key in _LEARNING_RATES:
        rate = params.get(key)
        if isinstance(rate, int | float) and rate > 0:
            texts[f"log10_{key}"] = f"{math.log10(rate):.6g}"
    return texts


def _param_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# ----------------------------------------------------------------------------------------- runs that died


def sweep(tracking: Tracking, *, resuming: Path | None = None, silent_seconds: float = 300.0) -> list[str]:
    """Marks runs KILLED that are still RUNNING in MLflow though their driver is gone.

    A driver is gone when its process is, where that ran on this machine, or when its last heartbeat is older than
    `silent_seconds`. A driver that only lost its connection sets its run right with the next heartbeat. Runs that this
    user may not write are left to theirs.

    Args:
      resuming: folder of a run that is about to go on, which is left alone.

    Returns:
      The ids of the marked runs; empty where MLflow cannot be reached.
    """
    if not tracking.reachable:
        return []
    own = Outbox(resuming).read_run() if resuming is not None else None
    killed = []
    try:
        client = tracking.client()
        for run in _running(client):
            reason = _death(run, silent_seconds)
            if reason is None or (own is not None and run.data.tags[UID_TAG] == own.uid):
                continue
            try:
                client.set_tag(run.info.run_id, "distmaml.reason", reason)
                client.set_terminated(run.info.run_id, "KILLED", _heartbeat_ms(run))
            except MlflowException as error:
                if error.error_code != "PERMISSION_DENIED":
                    raise
                continue  # it is somebody else's, who will see to it
            killed.append(run.info.run_id)
            log.warning("The MLflow run %r is marked KILLED: %s.", run.info.run_name, reason)
    except MlflowException as error:
        log.warning("Cannot look for dead runs in MLflow at %s (%s).", tracking.uri, str(error)[:200])
    return killed


def _running(client: MlflowClient) -> list[Run]:
    experiments, runs = [], []
    page = client.search_experiments()
    experiments.extend(page)
    while page.token:
        page = client.search_experiments(page_token=page.token)
        experiments.extend(page)
    ids = [experiment.experiment_id for experiment in experiments]
    ours = f"attributes.status = 'RUNNING' and tags.`{UID_TAG}` LIKE '%'"
    found = client.search_runs(ids, ours)
    runs.extend(found)
    while found.token:
        found = client.search_runs(ids, ours, page_token=found.token)
        runs.extend(found)
    return runs


def _heartbeat_ms(run: Run) -> int:
    return int(run.data.tags.get(HEARTBEAT_TAG, run.info.start_time))


def _death(run: Run, silent_seconds: float) -> str | None:
    """Why the driver of a run counts as gone; None while it lives."""
    tags = run.data.tags
    if tags.get(HOST_TAG) == socket.gethostname() and not _lives(int(tags[PROCESS_TAG]), tags[PROCESS_START_TAG]):
        return f"its process {tags[PROCESS_TAG]} is gone"
    silence = _now_ms() / 1000 - _heartbeat_ms(run) / 1000
    return f"no sign of life for {silence:.0f} s" if silence > silent_seconds else None


def _lives(pid: int, started: str) -> bool:
    """Whether the process lives; the kernel gives its number to others after its end, but not its start time."""
    try:
        return abs(psutil.Process(pid).create_time() - float(started)) < 2.0
    except psutil.NoSuchProcess:
        return False
