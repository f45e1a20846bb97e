"""A run's place in MLflow, from the driver's side: MLflow opened, the run begun and ended in it, an evaluation added.

mlflow is imported when it is first needed: a mistake on the command line should not cost the second that it takes.
"""

import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distmaml import build, checkpoint, paths
from distmaml.config import Config, flatten, is_custom
from distmaml.errors import RunError, first_line
from distmaml.interrupt import Interrupt
from distmaml.progress import say
from distmaml.segments import committed_segments
from distmaml.tracking.outbox import Dataset, Outbox

log = logging.getLogger("distmaml")

LEFT_OVER_SECONDS = 20.0


def open_tracking(config: Config, *, resuming: Path | None) -> Any:
    """MLflow, with what earlier commands left to be told to it."""
    from distmaml.tracking import database
    from distmaml.tracking.runs import sweep

    output = paths.output_dir(config.run.output_dir)
    tracking = database.open_tracking(output, config.run.tracking_uri or _home_of(resuming, output))
    sweep(tracking, resuming=resuming)
    if not tracking.reachable:
        return tracking
    folders = sorted([*paths.runs(output).glob("*"), *paths.searches(output).glob("*")])
    for folder in send_left_over([folder for folder in folders if folder != resuming], tracking):
        say(f"MLflow has now got what the run {folder.name} had left to tell it.")
    return tracking


def send_left_over(folders: Sequence[Path], tracking: Any) -> list[Path]:
    """Sends what runs that are over could not, for some seconds at most; the folders whose MLflow now has all."""
    from distmaml.tracking.uploader import replay

    deadline, sent = time.monotonic() + LEFT_OVER_SECONDS, []
    for folder in folders:
        left = deadline - time.monotonic()
        if left <= 0 or not _has_unsent(folder, tracking.uri):
            continue
        try:
            if replay(folder, tracking, timeout=left):
                sent.append(folder)
        except RunError:
            continue  # its own driver is about to send it
    return sent


def status(folder: Path) -> str | None:
    """How the MLflow run of a folder ended: FINISHED, FAILED or KILLED; None where it has not."""
    return Outbox(folder).status()


def _home_of(folder: Path | None, output: Path) -> str | None:
    """The MLflow that has a run already: another one would get a second run of the same training."""
    from distmaml.tracking.database import embedded_uri

    record = None if folder is None else Outbox(folder).read_run()
    if record is None or record.tracking_uri.startswith("http"):
        return None if record is None else record.tracking_uri
    return embedded_uri(output)


def _has_unsent(folder: Path, tracking_uri: str) -> bool:
    outbox = Outbox(folder)
    try:
        record = outbox.read_run()
    except RunError:
        return False
    if record is None or record.tracking_uri != tracking_uri:
        return False
    sent = outbox.read_sent(tracking_uri)
    if sent is None:
        return True
    return bool(committed_segments(outbox.metrics, sent.step)) or any(True for _ in outbox.records(after=sent.outbox))


def begin(
    config: Config,
    folder: Path,
    tracking: Any,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Any:
    """The MLflow run of a folder, begun or gone on with; whoever begins it ends it.

    Args:
      params: beside those of the configuration; likewise `tags`.
    """
    from distmaml.tracking.runs import TrackedRun

    data = build.dataset_record(config)
    return TrackedRun.start(
        folder,
        tracking=tracking,
        experiment=config.run.experiment or config.recipe,
        name=config.run.name or "",
        params={**flatten(config), **(params or {})},
        tags={"mlflow.source.type": "JOB" if "RAY_JOB_SUBMISSION_ID" in os.environ else "LOCAL", **(tags or {})},
        dataset=None
        if data is None
        else Dataset(data["name"], data["source"], data["content_hash"], data["split_hash"]),
    )


@contextmanager
def tracked(
    config: Config,
    folder: Path,
    tracking: Any,
    interrupt: Interrupt,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """The MLflow run of a folder: FINISHED, FAILED or KILLED at the end, whatever happens inside."""
    run: Any = None
    try:
        with interrupt.deferred():
            run = begin(config, folder, tracking, params=params, tags=tags)
        if run.url:
            say(f"MLflow: {run.url}")
        yield run
    except KeyboardInterrupt:
        if run is not None:
            run.end("KILLED", reason="stopped by a signal", timeout=3.0)
        raise
    except BaseException as error:
        if run is not None:
            run.end("FAILED", reason=first_line(error))
        raise
    run.end("FINISHED")


PARAMETERS = ("log10_inner_lr", "log10_outer_lr", "num_inner_steps", "meta_batch_size")
"""What runs are compared by."""


def view(
    config: Config,
    run: Any,
    tracking: Any,
    *,
    params: Sequence[str] = PARAMETERS,
    curves: Sequence[str] = (),
    of_search: bool = False,
) -> str:
    """The path of the MLflow page that compares the runs of the experiment, or the trials of a search; may be empty.

    Args:
      curves: metrics that are drawn over the outer step beside loss and accuracy.
    """
    from distmaml.tracking.views import seed_view

    if run.experiment_id is None:
        return ""
    quantity = config.evaluation.selected_quantity
    found = seed_view(
        tracking,
        run.experiment_id,
        params=params,
        best=f"best/{quantity}",
        test=f"test/{quantity}",
        curves=list(dict.fromkeys(["train/query_loss", f"train/{quantity}", f"val/{quantity}", *curves])),
        lower_is_better=config.evaluation.selection_mode == "min",
        parent_run_id=run.run_id if of_search else None,
    )
    return found or ""


def register(config: Config, model: Path, run: Any, tracking: Any) -> str | None:
    """Makes a run's model the champion of its recipe in MLflow's registry; what it is found under, if it is.

    What goes wrong there must not make a failure of a run that is done: it costs a warning.

    Args:
      config: how it was trained.
      model: its file.
      run: the MLflow run that the version is said to come from.
    """
    from distmaml.tracking import registry

    own = [name for name in (config.algorithm, config.model, config.objective) if is_custom(name)]
    if own:
        log.warning("The model is not registered: MLflow would have to run your own %s.", ", ".join(own))
        return None
    shapes = checkpoint.load(model)[1]["shapes"]
    labels = config.objective == "classification"
    try:
        registry.register(
            tracking, run.run_id, model, name=config.recipe, input_shape=shapes["input_shape"], labels=labels,
            num_outputs=shapes["num_outputs"],
        )  # fmt: skip
    except Exception as error:  # whatever MLflow's clients raise
        log.warning("The model could not be registered in MLflow (%s). All else is there.", first_line(error))
        return None
    return f"models:/{config.recipe}@{registry.ALIAS}"


def how_to_compare(tracking: Any, output: Path, view: str) -> tuple[str, ...]:
    """What opens a page of MLflow, a line each: a link, and the command that it needs.

    Args:
      output: the output folder, which has the embedded database.
      view: path of the page.
    """
    if not tracking.embedded:
        return (f"open {tracking.uri}{view}",)
    return (f"run  DISTMAML_HOME={shlex.quote(str(output))} make ui", f"open http://127.0.0.1:5000{view}")


def add_evaluation(folder: Path, tracking: Any, step: int, metrics: Mapping[str, float], files: list[Path]) -> None:
    """Adds to a run that is over, or still going on, without saying that it lives or how it ended."""
    from distmaml.tracking.uploader import replay

    outbox, now = Outbox(folder), time.time_ns() // 1_000_000
    if outbox.read_run() is None:
        return
    outbox.append_metrics(step, metrics)
    for file in files:
        outbox.append("artifact", now, {"file": str(file.relative_to(folder)), "artifact_path": "evaluation"})
    try:
        replay(folder, tracking, timeout=LEFT_OVER_SECONDS)
    except RunError:
        return  # a driver is busy with the run, and sends this too
