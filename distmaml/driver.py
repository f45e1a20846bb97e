"""The life of one training run: checks before the start, the MLflow run, the workers, signals, and the end."""

import csv
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distmaml import build, checkpoint, launch, loop, paths, pictures
from distmaml.adapter import load
from distmaml.config import Config, ImageTasks, check, flatten, from_json, is_custom, to_json
from distmaml.errors import ConfigError, DistmamlError, RunError
from distmaml.files import write_text
from distmaml.outer import chunk_sum
from distmaml.segments import committed_segments, read_points
from distmaml.trees import tree_index, tree_to
from distmaml.worker import Worker

log = logging.getLogger("distmaml")

MAY_CHANGE = {
    "num_outer_steps", "patience", "num_val_episodes", "num_test_episodes", "inductive", "name", "output_dir", "resume",
    "tracking_uri", "experiment", "log_every", "checkpoint_every", "num_workers", "use_gpu", "gpus_per_worker", "address",
    "max_failures", "data_dir",
}  # fmt: skip
"""Fields that may differ between a run and its resumption. The number of workers may only where the sums are ordered
or nobody counts on bits, which is the user's to know."""


class Outcome(NamedTuple):
    """What a run came to."""

    name: str
    folder: Path
    metrics: dict[str, float]
    scores: dict[str, dict[str, list[Any]]]


def train(config: Config) -> Outcome:
    """Trains, tests and tracks one run, from the first check to the last picture.

    Raises:
      DistmamlError: whatever is wrong, before the cluster starts where that can be known.
    """
    config = _named(config)
    check(config)
    folder = paths.run_folder(config)
    _check_folder(config, folder)
    _rehearse(config)
    from distmaml.tracking.database import open_tracking
    from distmaml.tracking.runs import sweep

    output = paths.output_dir(config.run.output_dir)
    tracking = open_tracking(output, config.run.tracking_uri)
    sweep(tracking, resuming=folder)
    config = replace(config, run=replace(config.run, output_dir=output))
    write_text(folder / "config.json", json.dumps(to_json(config), indent=2))
    with _tracked(config, folder, tracking) as run:
        num_cpus = max(config.cluster.num_workers, os.cpu_count() or 1)
        with launch.cluster(config.cluster.address, num_cpus=num_cpus) as resources, _signals():
            _say(f"{config.cluster.num_workers} workers on {resources.get('CPU', 0):g} CPUs and "
                 f"{resources.get('GPU', 0):g} GPUs; the run lies in {folder}")  # fmt: skip
            with _Progress(config, folder):
                metrics, tested = launch.fit(
                    train_and_test,
                    config,
                    name=config.run.name or "",
                    storage_path=output / "ray" / f"{config.run.name}-{time.time_ns() // 1_000_000}",
                    num_workers=config.cluster.num_workers,
                    gpus_per_worker=_gpus_per_worker(config, resources),
                    max_failures=config.cluster.max_failures,
                )
        step = int(metrics["step"])
        run.add_metrics(step, {key: value for key, value in metrics.items() if key.startswith("best/")})
        scores: dict[str, dict[str, list[Any]]] = {}
        if tested is not None:
            scores = tested["modes"]
            run.add_metrics(step, test_metrics(scores))
            for file in write_evaluation(config, folder, "test", tested):
                run.add_artifact(file, "evaluation")
        for picture in draw(config, folder, scores):
            run.add_artifact(picture, "pictures")
        run.add_artifact(paths.model(folder), "model")
        run.add_artifact(folder / "config.json", None)
    return Outcome(config.run.name or "", folder, metrics, scores)


def train_and_test(config: Config, worker: Worker) -> tuple[dict[str, float], dict[str, Any] | None]:
    """What each worker of a run does."""
    metrics = loop.train(config, worker)
    return metrics, loop.evaluate(config, worker) if config.evaluation.num_test_episodes else None


def evaluate(config: Config, *, split: str, step: int | None) -> dict[str, Any]:
    """Scores a finished run, or one of its checkpoints, on workers of their own; writes and tracks the result."""
    check(config)
    folder = paths.run_folder(config)
    checkpoint.load(paths.model(folder) if step is None else checkpoint.path_of(paths.checkpoints(folder), step))
    with launch.cluster(config.cluster.address, num_cpus=max(config.cluster.num_workers, os.cpu_count() or 1)) as has:
        with _signals():
            found = launch.fit(
                _Evaluation(split, step),
                config,
                name=f"{config.run.name}-{split}",
                storage_path=paths.output_dir(config.run.output_dir) / "ray" / f"evaluation-{time.time_ns() // 1_000_000}",
                num_workers=config.cluster.num_workers,
                gpus_per_worker=_gpus_per_worker(config, has),
                max_failures=0,
            )
    return found


class _Evaluation(NamedTuple):
    split: str
    step: int | None

    def __call__(self, config: Config, worker: Worker) -> dict[str, Any]:
        return loop.evaluate(config, worker, split=self.split, step=self.step)


# ------------------------------------------------------------------------------------ before the start


def _named(config: Config) -> Config:
    if config.run.name is not None:
        return config
    if config.run.resume:
        raise ConfigError("--resume needs the --name of the run to go on with.")
    return replace(config, run=replace(config.run, name=f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"))


def _check_folder(config: Config, folder: Path) -> None:
    """A run is new, or it is resumed with the settings it began with."""
    earlier = folder / "config.json"
    if not config.run.resume:
        if earlier.exists():
            done = checkpoint.steps(paths.checkpoints(folder))
            raise RunError(
                f"a run named {config.run.name!r} exists in {folder}, {done[-1] if done else 0} outer steps long. Go on with it "
                "by --resume, or choose another --name."
            )
    else:
        if not earlier.exists():
            raise RunError(f"there is no run named {config.run.name!r} in {folder.parent} to resume.")
        before, now = to_json(from_json(json.loads(earlier.read_text()))), to_json(config)
        changed = [key for key in now if before.get(key) != now[key] and key not in MAY_CHANGE]
        if changed:
            listed = ", ".join(f"{key}={now[key]!r} (was {before.get(key)!r})" for key in changed)
            raise RunError(f"the run {config.run.name!r} cannot go on with {listed}. Take the old values or another --name.")
        last = checkpoint.newest(paths.checkpoints(folder)) or 0
        if last >= config.outer.num_outer_steps:
            raise RunError(
                f"the run {config.run.name!r} has finished its {last} outer steps. Ask for more by --num-outer-steps, or start "
                "a new run under another --name."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except (OSError, RunError) as error:
        raise RunError(f"cannot write in {folder}: {error}. Name another folder by --output-dir.") from error


def _rehearse(config: Config) -> None:
    """One task's gradient in this process, so that a mistake shows before any cluster work."""
    tasks = build.task_distributions(config)
    device, dtype = torch.device("cpu"), getattr(torch, config.outer.precision)
    learner = build.learner(config, build.shapes(tasks["train"]), device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = tree_to(tasks["train"].sample([0]), device, dtype)
        _, metrics = chunk_sum(learner.algorithm, learner.meta_params, one, 0, vectorize=learner.vectorize)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"model={config.model!r} does not get along with tasks={config.tasks!r} and objective={config.objective!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    finally:
        torch.set_num_threads(threads)
    judged = {f"val/query_{name}" for name in ("loss", *learner.objective.metrics)}
    judged |= {f"{name}_step_{k}" for name in judged for k in range(config.evaluation.num_eval_steps + 1)}
    if config.evaluation.val_every and config.evaluation.selection_metric not in judged:
        raise ConfigError(
            f"selection_metric={config.evaluation.selection_metric!r} is not among the metrics of this run: "
            f"{', '.join(sorted(name for name in judged if '_step_' not in name))}."
        )


def _gpus_per_worker(config: Config, resources: Mapping[str, float]) -> float:
    wanted = config.cluster.use_gpu == "yes" or (config.cluster.use_gpu == "auto" and resources.get("GPU", 0) > 0)
    return config.cluster.gpus_per_worker if wanted else 0.0


# ------------------------------------------------------------------------------------------- while it runs


@contextmanager
def _tracked(config: Config, folder: Path, tracking: Any) -> Iterator[Any]:
    """The MLflow run: FINISHED, FAILED or KILLED at the end, whatever happens inside."""
    from distmaml.tracking.outbox import Dataset
    from distmaml.tracking.runs import TrackedRun
    from distmaml.tracking.views import seed_view

    data = build.dataset_record(config)
    dataset = None if data is None else Dataset(data["name"], data["source"], data["content_hash"], data["split_hash"])
    name = config.run.name or ""
    run = TrackedRun.start(
        folder,
        tracking=tracking,
        experiment=config.run.experiment or config.recipe,
        name=name,
        params=flatten(config),
        tags={"mlflow.source.type": "JOB" if "RAY_JOB_SUBMISSION_ID" in os.environ else "LOCAL"},
        dataset=dataset,
    )
    quantity = config.evaluation.selection_metric.removeprefix("val/")
    if run.experiment_id is not None:
        seed_view(
            tracking,
            run.experiment_id,
            params=["log10_inner_lr", "log10_outer_lr", "num_inner_steps", "meta_batch_size"],
            best=f"best/{quantity}",
            test=f"test/{quantity}",
            curves=["train/query_loss", f"train/{quantity}", f"val/{quantity}"],
            lower_is_better=config.evaluation.selection_mode == "min",
        )
    if run.url:
        _say(f"MLflow: {run.url}")
    try:
        yield run
    except KeyboardInterrupt:
        run.end("KILLED", reason="stopped by a signal", timeout=3.0)
        raise
    except BaseException as error:
        run.end("FAILED", reason=str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise
    run.end("FINISHED")


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGINT both end the run in order. Installed after Ray, which puts its own handlers in."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """Says how far a run is: one line that changes on a terminal, a line now and then in a log."""

    LOG_SECONDS = 10.0

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._file = config, folder / "progress.json"
        self._end, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Progress":
        self._file.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        terminal, shown, said = sys.stderr.isatty(), "", 0.0
        first: tuple[float, int] | None = None
        while not self._end.wait(0.5) or shown == "":
            if self._end.is_set() and not self._file.exists():
                return
            try:
                progress = json.loads(self._file.read_text())
            except (OSError, ValueError):
                continue
            first = first or (time.monotonic(), progress["step"])
            line = self._line(progress, first)
            if line != shown and (terminal or time.monotonic() - said >= self.LOG_SECONDS or self._end.is_set()):
                print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
                shown, said = line, time.monotonic()
        if terminal:
            print(file=sys.stderr)

    def _line(self, progress: Mapping[str, float], first: tuple[float, int]) -> str:
        total, step = self._config.outer.num_outer_steps, int(progress["step"])
        words = [f"step {step}/{total}"]
        quantity = self._config.evaluation.selection_metric.removeprefix("val/query_").split("_step_")[0]
        for split in ("train", "val"):
            value = progress.get(f"{split}/query_{quantity}")
            if value is not None:
                words.append(f"{split} {quantity} {_figure(quantity, value)}")
        if "system/tasks_per_second" in progress:
            words.append(f"{progress['system/tasks_per_second']:.0f} tasks/s")
        seconds, steps = time.monotonic() - first[0], step - first[1]
        if steps > 0 and step < total:
            left = (total - step) * seconds / steps
            words.append(f"{int(left // 60)}:{int(left % 60):02d} left")
        return "  ".join(words)


def _figure(quantity: str, value: float) -> str:
    return f"{100 * value:.1f} %" if "accuracy" in quantity else f"{value:.4f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- the result


def test_metrics(scores: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, float]:
    """The flat metrics of an evaluation, as MLflow gets them; the inductive ones under ``test_inductive/``."""
    flat = {}
    for mode, metrics in scores.items():
        prefix = "test" if mode == "transductive" else f"test_{mode}"
        for metric, intervals in metrics.items():
            flat.update({f"{prefix}/{metric}_step_{k}": value[0] for k, value in enumerate(intervals)})
            flat[f"{prefix}/{metric}"], flat[f"{prefix}/{metric}_interval"] = intervals[-1]
    return flat


def write_evaluation(config: Config, folder: Path, split: str, found: Mapping[str, Any]) -> list[Path]:
    """Everything that decides the figures beside them, as JSON, and the figures as CSV."""
    name = f"evaluation-{split}" if found.get("checkpoint") is None else f"evaluation-{split}-{found['checkpoint']}"
    settings, data = to_json(config), build.dataset_record(config)
    record = {
        "run": config.run.name,
        "recipe": config.recipe,
        "commit": _commit(),
        "split": split,
        "dataset": data,
        "outer_steps": found["step"],
        "num_episodes": config.evaluation.num_val_episodes if split == "val" else config.evaluation.num_test_episodes,
        "first_episode": 0,
        "interval": "1.96 * standard deviation / sqrt(num_episodes)",
        "config": settings,
        "scores": {
            mode: {metric: [{"mean": v[0], "half_width": v[1]} for v in values] for metric, values in metrics.items()}
            for mode, metrics in found["modes"].items()
        },
    }
    json_file, csv_file = folder / f"{name}.json", folder / f"{name}.csv"
    write_text(json_file, json.dumps(record, indent=2) + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["batch_norm", "metric", "inner_step", "mean", "half_width_95"])
    for mode, metrics in found["modes"].items():
        for metric, values in metrics.items():
            writer.writerows([mode, metric, k, *value] for k, value in enumerate(values))
    write_text(csv_file, table.getvalue())
    return [json_file, csv_file]


def table(scores: Mapping[str, Mapping[str, list[Any]]]) -> str:
    """An evaluation as a table to print: a row an inner step, a column a batch-norm mode and metric."""
    columns = [(mode, metric) for mode, metrics in scores.items() for metric in metrics]
    num_steps = len(next(iter(next(iter(scores.values())).values())))
    head = ["inner step", *(f"{metric} ({mode})" for mode, metric in columns)]
    rows = [head]
    for k in range(num_steps):
        cells = [f"{k}" if k else "0 (before)"]
        for mode, metric in columns:
            mean, half = scores[mode][metric][k]
            cells.append(f"{100 * mean:.2f} +- {100 * half:.2f} %" if "accuracy" in metric else f"{mean:.4f} +- {half:.4f}")
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(config: Config, folder: Path, scores: Mapping[str, Mapping[str, list[Any]]]) -> list[Path]:
    """The run's pictures: learning curve, adaptation curve, and one episode of the test split."""
    target, title = folder / "artifacts", config.run.name or ""
    files = [target / "learning_curve.png"]
    points: dict[str, tuple[list[int], list[float]]] = {}
    for segment in committed_segments(paths.metrics(folder), -1):
        for point in read_points(segment):
            for key, value in point.values.items():
                if key.startswith(("train/query", "val/query")) and ("_step_" not in key or key.endswith("_step_0")):
                    points.setdefault(key, ([], []))[0].append(point.step)
                    points[key][1].append(value)
    pictures.learning_curve(files[0], points, title=title)
    if scores:
        metric = config.evaluation.selection_metric.removeprefix("val/").split("_step_")[0]
        curves = {
            mode: ([v[0] for v in metrics[metric]], [v[1] for v in metrics[metric]]) for mode, metrics in scores.items()
        }
        files.append(target / "adaptation_curve.png")
        pictures.adaptation_curve(files[-1], curves, metric=metric, title=title)
    if not any(is_custom(name) for name in (config.model, config.objective, config.algorithm, config.tasks)):
        files.append(_draw_episode(config, folder, target, title))
    return files


def _draw_episode(config: Config, folder: Path, target: Path, title: str) -> Path:
    model, tasks = load(folder), build.task_distributions(config)["test"]
    task = tree_index(tasks.sample([0]), 0)
    adapted = model.adapt(task.support)
    predictions = adapted.predict(task.query.inputs, transductive=True)
    if isinstance(config.task_options, ImageTasks):
        path = target / "episode.png"
        classes, _ = tasks.draw([0])  # type: ignore[attr-defined]
        names = [tasks.class_names[int(c) // tasks.turns] for c in classes[0]]  # type: ignore[attr-defined]
        record = build.dataset_record(config)
        assert record is not None
        pictures.episode_sheet(
            path,
            task.support.inputs.numpy(),
            task.support.targets.numpy(),
            task.query.inputs.numpy(),
            task.query.targets.numpy(),
            predictions.argmax(-1).numpy(),
            class_names=names,
            ink=record["ink"],
            title=f"{title}: test episode 0",
        )
        return path
    path = target / "fit.png"
    order = np.argsort(task.query.inputs[:, 0].numpy())
    fits = {
        k: model.adapt(task.support, num_steps=k).predict(task.query.inputs, transductive=True)[:, 0].numpy()[order]
        for k in (0, 1, config.evaluation.num_eval_steps)
    }
    pictures.fit_curve(
        path,
        inputs=task.query.inputs[:, 0].numpy()[order],
        targets=task.query.targets[:, 0].numpy()[order],
        support_inputs=task.support.inputs[:, 0].numpy(),
        support_targets=task.support.targets[:, 0].numpy(),
        predictions=fits,
        title=f"{title}: test task 0",
    )
    return path


def _commit() -> str | None:
    """The commit of the code that runs, with "+" behind it where the checkout was changed; None outside one."""
    folder = Path(__file__).parent
    run = lambda *words: subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)  # noqa: E731
    try:
        found = run("rev-parse", "HEAD")
        dirty = run("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except OSError:
        return None
    return None if found.returncode else found.stdout.strip() + ("+" if dirty else "")


__all__ = ["DistmamlError", "Outcome", "draw", "evaluate", "table", "test_metrics", "train", "write_evaluation"]
