"""What rank 0 leaves in a run's folder: points, progress, checkpoints and the model."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distmaml import build, checkpoint, mirror, paths
from distmaml.config import Config, changes, to_json
from distmaml.errors import RunError
from distmaml.files import write_text
from distmaml.mirror import Mirror
from distmaml.segments import SegmentWriter, committed_step

PROGRESS_SECONDS = 1.0
ASKED_SECONDS = 0.5
SAVE_SECONDS = 5.0
MOST_SHARE = 0.1
"""Of the time, for checkpoints out of turn."""


class Recorder:
    """Writes the files of one training run, and puts them into its storage; on rank 0 only."""

    def __init__(self, config: Config, restored_step: int, *, shapes: Mapping[str, Any]) -> None:
        self._folder = paths.run_folder(config)
        self._origin = {
            "config": to_json(config),
            "shapes": dict(shapes),
            "dataset": build.dataset_record(config),
        }
        self._segments = SegmentWriter(paths.metrics(self._folder), restored_step)
        self._mirror = mirror.of(config)
        self._mirror.settle()
        self._shown, self._looked = 0.0, 0.0
        self._out_of_turn: Path | None = None
        self._saved, self._saving = 0.0, 0.0
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
            (self._mirror.push if last else self._mirror.push_sometimes)(paths.progress(self._folder))

    def asked_to_save(self) -> bool:
        """Whether somebody wants a checkpoint at once, by `save_now`; looks twice a second, in storage every 2 s."""
        if time.monotonic() - self._looked < ASKED_SECONDS:
            return False
        self._looked = time.monotonic()
        request = paths.save_request(self._folder)
        return request.exists() or self._mirror.has_lately(request)

    def checkpoint(
        self, step: int, tensors: Mapping[str, Tensor], document: Mapping[str, Any], *, in_turn: bool = True
    ) -> None:
        """Commits the points up to a step together with the state after it.

        Out of turn, which may be after every step until a machine is gone, only as often as it costs little, and
        the one before goes.
        """
        metrics, request = paths.metrics(self._folder), paths.save_request(self._folder)
        begun = time.monotonic()
        if not in_turn and MOST_SHARE * (begun - self._saved) < self._saving and not request.exists():
            return
        is_new = step > committed_step(metrics)
        self._segments.write(step)
        path = checkpoint.path_of(paths.checkpoints(self._folder), step)
        checkpoint.save(path, tensors, {"step": step, **self._origin, **document})
        self._mirror.push(*(metrics.glob(f"*-{step:08d}.jsonl") if is_new else ()), path)
        self._segments.commit(step)
        self._mirror.push(metrics / "committed")
        request.unlink(missing_ok=True)
        self._mirror.delete(request)
        if self._out_of_turn is not None and self._out_of_turn != path:
            self._out_of_turn.unlink(missing_ok=True)
            self._mirror.delete(self._out_of_turn)
        self._out_of_turn = None if in_turn else path
        self._saved = time.monotonic()
        self._saving = self._saved - begun

    def model(self, step: int, tensors: Mapping[str, Tensor], selection_metric: str, value: float | None) -> None:
        """Writes the result so far: meta-parameters with the configuration that makes them useful, and why these."""
        document = {"step": step, **self._origin, "selection_metric": selection_metric, "value": value}
        checkpoint.save(paths.model(self._folder), tensors, document)
        self._mirror.push(paths.model(self._folder))


class EvaluationProgress:
    """Says how far the test of a run is, to whoever watches its progress; on rank 0 only.

    Args:
      step: outer steps that the run ended after.
    """

    def __init__(self, config: Config, step: int) -> None:
        self._file, self._mirror, self._step = paths.progress(paths.run_folder(config)), mirror.of(config), step
        self._shown = time.monotonic()

    def __call__(self, share: float) -> None:
        """Says what share of the test is done, at most once a second."""
        if time.monotonic() - self._shown >= PROGRESS_SECONDS:
            self._shown = time.monotonic()
            write_text(self._file, json.dumps({"step": self._step, "tested": share}))
            self._mirror.push_sometimes(self._file)


def save_now(run: Path, *, storage: str | None = None, seconds: float = SAVE_SECONDS) -> None:
    """Asks whoever trains a run for a checkpoint at once, and waits for it: a stop then costs no steps.

    Best effort: after `seconds`, or where nobody trains, it is as it was.

    Args:
      storage: of a run that has one: rank 0 may be on another node.
    """
    request = paths.save_request(run)
    # A full disk, or storage that is away: whoever is about to end the run will go on ending it.
    with contextlib.suppress(OSError, RunError):
        there = Mirror(storage, run).hasty()
        request.touch()
        there.push(request)
        deadline = time.monotonic() + seconds
        while request.exists() and there.has(request) and time.monotonic() < deadline:
            time.sleep(0.05)
        request.unlink(missing_ok=True)
        there.delete(request)


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
