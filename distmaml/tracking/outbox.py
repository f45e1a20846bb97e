"""What a driver has to tell MLflow about a run, as files in the run's folder.

    RUN/tracking/run.json        who the run is: written when it is first started (RunRecord)
    RUN/tracking/outbox.jsonl    what it says beside its metric segments, in order: artifacts, last metrics, tags, ends
    RUN/tracking/sent.json       how much of all that MLflow has (Sent)
    RUN/tracking/refused.jsonl   what MLflow refused for good, with its reason
    RUN/tracking/lock            held by the one process that is busy with the run

Imports no mlflow: a run can be written down while no MLflow can be reached, and be sent from here later by anyone.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distmaml import paths
from distmaml.errors import RunError
from distmaml.files import write_text


@dataclass(frozen=True)
class Dataset:
    """The class store that a run learns from, as MLflow shows it."""

    name: str
    """Name of the data set."""
    source: str
    """Where the store lies: path or URI."""
    content_hash: str
    """Hash of its content, hexadecimal; its first 36 digits are MLflow's digest."""
    split_hash: str
    """Hash of the division into training, validation and test."""


@dataclass(frozen=True)
class RunRecord:
    """Who a run is. Everything that MLflow needs to create it, at any later time."""

    uid: str
    """Identity of the training run: MLflow has at most one run with this tag, whoever creates it."""
    tracking_uri: str
    """Where the run was last tracked."""
    experiment: str
    """Name of the MLflow experiment."""
    name: str
    """Name of the MLflow run."""
    params: dict[str, str]
    tags: dict[str, str]
    dataset: Dataset | None
    start_ms: int
    """Start of the run in milliseconds since 1970."""


@dataclass(frozen=True)
class Sent:
    """How much of a run MLflow has. Written after the fact: what is not in here may be there all the same."""

    tracking_uri: str
    """The database or server that this is about; another one has nothing yet."""
    run_id: str
    """MLflow's own name of the run."""
    experiment_id: str
    described: bool = False
    """Parameters and data set are there."""
    step: int = -1
    """Segments that end at this step or before are there."""
    outbox: int = 0
    """So many records of the outbox are there."""


class Outbox:
    """The files of one run's folder. Records are appended by the driver and read by the uploader."""

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder
        self.folder = run_folder / "tracking"
        self.metrics = paths.metrics(run_folder)
        self._lock = FileLock(self.folder / "lock", thread_local=False)  # taken by the driver, freed by its uploader

    def claim(self) -> None:
        """Makes this process the one that is busy with the run; the claim ends with the process at the latest.

        Raises:
          RunError: another process has claimed it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=5)  # somebody who only sends what was left over is done soon
        except Timeout:
            raise RunError(
                f"The run in {self.run_folder} is in use by another process, which holds {self.folder / 'lock'}. Wait "
                "for it or stop it, or give another name."
            ) from None

    def release(self) -> None:
        """Gives up the claim."""
        self._lock.release()

    def read_run(self) -> RunRecord | None:
        """The run's record; None for a run that was never started.

        Raises:
          RunError: the record is damaged.
        """
        path = self.folder / "run.json"
        try:
            fields = json.loads(path.read_text())
            dataset = fields.pop("dataset")
            return RunRecord(**fields, dataset=Dataset(**dataset) if dataset else None)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{path} is damaged ({error!r}). It says which MLflow run this is; restore it, or start the run "
                "under another name."
            ) from error

    def write_run(self, record: RunRecord) -> None:
        """Writes the run's record."""
        write_text(self.folder / "run.json", json.dumps(dataclasses.asdict(record), indent=1))

    def forget(self) -> None:
        """Undoes a first start: no run was created."""
        for name in ("run.json", "outbox.jsonl"):
            (self.folder / name).unlink(missing_ok=True)

    def append(self, kind: str, timestamp_ms: int, content: Mapping[str, Any]) -> None:
        """Adds a record to what is to be told: artifact, metrics, tags, started or ended."""
        line = json.dumps({"kind": kind, "timestamp_ms": timestamp_ms, **content})
        with (self.folder / "outbox.jsonl").open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a crash or a full disk has torn the last line; do not glue to it
                    file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def append_metrics(self, step: int, values: Mapping[str, float]) -> bool:
        """Adds metrics of the run as a whole, without those that it holds already; whether any were new."""
        floats = {key: float(value) for key, value in values.items()}
        told = {
            (key, record["step"], str(value))
            for record in self.records()
            if record["kind"] == "metrics"
            for key, value in record["values"].items()
        }
        new = {key: value for key, value in floats.items() if (key, step, str(value)) not in told}
        if new:
            self.append("metrics", time.time_ns() // 1_000_000, {"step": step, "values": new})
        return bool(new)

    def records(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """The records behind the first `after`. A torn line counts as the empty record."""
        try:
            content = (self.folder / "outbox.jsonl").read_bytes()
        except FileNotFoundError:
            return
        for line in content.split(b"\n")[:-1][after:]:
            try:
                yield json.loads(line)
            except ValueError:
                yield {"kind": "torn"}

    def has_ended(self) -> bool:
        """Whether the last thing that the run said about itself is how it ended."""
        return self.status() is not None

    def status(self) -> str | None:
        """How the run ended: FINISHED, FAILED or KILLED; None where it has not, or goes on."""
        last = [r for r in self.records() if r["kind"] in ("started", "ended")][-1:]
        return next((str(r["status"]) for r in last if r["kind"] == "ended"), None)

    def read_sent(self, tracking_uri: str) -> Sent | None:
        """What a database or server has of this run; None for nothing, or nothing that is known."""
        try:
            sent = Sent(**json.loads((self.folder / "sent.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None  # everything is sent once more, and MLflow keeps one of each
        return sent if sent.tracking_uri == tracking_uri else None

    def write_sent(self, sent: Sent) -> None:
        """Remembers what MLflow has. Not forced to the disk, once a batch: what a power cut takes is sent again."""
        part = self.folder / "sent.json.part"
        try:
            part.write_text(json.dumps(dataclasses.asdict(sent)))
            part.replace(self.folder / "sent.json")
        except OSError:
            part.unlink(missing_ok=True)  # half a file, of a full disk
            raise

    def refuse(self, what: Mapping[str, Any], reason: str) -> None:
        """Keeps what MLflow will never take, and why."""
        with (self.folder / "refused.jsonl").open("a") as file:
            file.write(json.dumps({"reason": reason, **what}) + "\n")
