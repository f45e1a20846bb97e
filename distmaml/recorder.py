"""What rank 0 leaves in a run's folder: points, progress, checkpoints and the model."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distmaml import build, checkpoint, paths
from distmaml.config import Config, changes, to_json
from distmaml.errors import RunError
from distmaml.files import write_text
from distmaml.segments import SegmentWriter

PROGRESS_SECONDS = 1.0
ASKED_SECONDS = 0.5
SAVE_SECONDS = 5.0


class Recorder:
    """Writes the files of one training run; on rank 0 only."""

    def __init__(self, config: Config, restored_step: int, *, shapes: Mapping[str, Any]) -> None:
        self._folder = paths.run_folder(config)
        self._origin = {
            "config": to_json(config),
            "shapes": dict(shapes),
            "dataset": build.dataset_record(config),
        }
        self._segments = SegmentWriter(paths.metrics(self._folder), restored_step)
        self._shown, self._looked = 0.0, 0.0
        self._latest: dict[str, float] = {}

    def points(self, step: int, values: Mapping[str, float]) -> None:
        """Buffers metrics; they count from the next checkpoint on."""
        self._segments.put(step, values)
        self._latest.update(values)

    def progress(self, step: int, *, last: bool) -> None:
        """Says how far the run is: at the end, and before that at most once a second."""
        if last or time.monotonic() - self._shown >= PROGRESS_SECONDS:
            self._shown = time.monotonic()
            write_text(paths.progress(self._folder), json.dumps({"step": step, **self._latest}))

    def asked_to_save(self) -> bool:
        """Whether somebody wants a checkpoint at once, by `save_now`; looks twice a second."""
        if time.monotonic() - self._looked < ASKED_SECONDS:
            return False
        self._looked = time.monotonic()
        return paths.save_request(self._folder).exists()

    def checkpoint(self, step: int, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        """Commits the points up to a step together with the state after it."""
        self._segments.write(step)
        path = checkpoint.path_of(paths.checkpoints(self._folder), step)
        checkpoint.save(path, tensors, {"step": step, **self._origin, **document})
        self._segments.commit(step)
        paths.save_request(self._folder).unlink(missing_ok=True)

    def model(self, step: int, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        """Writes the result so far: meta-parameters with the configuration that makes them useful."""
        checkpoint.save(paths.model(self._folder), tensors, {"step": step, **self._origin, **document})


def save_now(run: Path, *, seconds: float = SAVE_SECONDS) -> None:
    """Asks whoever trains a run for a checkpoint at once, and waits for it: a stop then costs no steps.

    Best effort: after `seconds`, or where nobody trains, it is as it was.
    """
    request = paths.save_request(run)
    with contextlib.suppress(OSError):  # a full disk: whoever is about to end the run will go on ending it
        request.touch()
        deadline = time.monotonic() + seconds
        while request.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        request.unlink(missing_ok=True)


def file_of(run: Path, step: int | None) -> Path:
    """The best model of a run, or its checkpoint after an outer step."""
    return paths.model(run) if step is None else checkpoint.path_of(paths.checkpoints(run), step)


def check_origin(document: Mapping[str, Any], config: Config) -> None:
    """Refuses to go on from a checkpoint that other settings or other data have made.

    Raises:
      RunError: naming what differs.
    """
    check_settings(document["config"], config)
    check_data(document, config)


def check_settings(before: Mapping[str, Any], config: Config) -> None:
    """Refuses to go on with a run under other settings, where they decide its result.

    Args:
      before: what `config.to_json` gave of the earlier ones.

    Raises:
      RunError: naming what differs.
    """
    differences = changes(before, config)
    if differences:
        raise RunError(
            f"the run {config.run.name!r} cannot go on with {', '.join(differences)}. Take the old values or another "
            "--name."
        )


def check_data(document: Mapping[str, Any], config: Config) -> None:
    """Refuses data that are not those that a checkpoint or a model was trained on: classes could change their split.

    Raises:
      RunError: naming both hashes.
    """
    before, now = document["dataset"] or {}, build.dataset_record(config) or {}
    for key in ("content_hash", "split_hash"):
        if before.get(key) != now.get(key):
            raise RunError(
                f"the run {config.run.name!r} was trained on data with {key} {str(before.get(key))[:12]}, and now "
                f"it is {str(now.get(key))[:12]}. Bring the old store back, or train again under another --name."
            )
