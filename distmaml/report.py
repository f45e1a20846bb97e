"""What a run came to: figures as metrics, JSON, CSV and a table, and pictures of it."""

import csv
import io
import json
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distmaml import build, paths
from distmaml.adapter import load
from distmaml.config import Config, is_custom, to_json
from distmaml.files import write_text
from distmaml.options import ImageTaskOptions
from distmaml.recipes import RECIPES
from distmaml.scoring import Evaluated, Interval, Intervals, after_last, by_step
from distmaml.segments import committed_segments, read_points
from distmaml.tasks.images import ImageTasks
from distmaml.trees import tree_index

# --------------------------------------------------------------------------------------------- figures


def data_of(config: Config, split: str) -> str:
    """What the episodes of a split are made of, and whether training has seen it."""
    if isinstance(config.task_options, ImageTaskOptions) and config.task_options.split_by == "samples":
        return f"the {split} pictures of classes that training has seen (split_by samples)"
    return f"the {split} split, which training never saw"


def metrics_of(scores: Intervals, *, prefix: str = "test") -> dict[str, float]:
    """The flat metrics of an evaluation, as MLflow gets them; the inductive ones under ``test_inductive/``."""
    flat = {}
    for mode, metrics in scores.items():
        group = prefix if mode == "transductive" else f"{prefix}_{mode}"
        for metric, intervals in metrics.items():
            flat.update(by_step(f"{group}/{metric}", intervals))
            flat[f"{group}/{metric}_interval"] = after_last(intervals).half_width
    return flat


def write_evaluation(
    config: Config, folder: Path, found: Evaluated, *, split: str = "test", name: str = "evaluation-test"
) -> list[Path]:
    """Writes an evaluation as JSON, with everything that decides its figures beside them, and as CSV.

    Args:
      found: what `loop.evaluate` returned.
      name: of the files, without their endings.
    """
    record = {
        "run": config.run.name,
        "recipe": config.recipe,
        "overrides": _overrides(config),
        "commit": _commit(),
        "split": split,
        "data": data_of(config, split),
        "dataset": build.dataset_record(config),
        "outer_steps": found.step,
        "num_episodes": config.evaluation.num_episodes(split),
        "first_episode": 0,
        "machine": found.machine,
        "interval": "1.96 * standard deviation / sqrt(num_episodes)",
        "config": to_json(config),
        "scores": {
            mode: {metric: _listed(values) for metric, values in metrics.items()}
            for mode, metrics in found.scores.items()
        },
    }
    json_file, csv_file = folder / f"{name}.json", folder / f"{name}.csv"
    write_text(json_file, json.dumps(_finite(record), indent=2, allow_nan=False) + "\n")
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["batch_norm", "metric", "inner_step", "mean", "half_width_95"])
    for mode, metrics in found.scores.items():
        for metric, values in metrics.items():
            writer.writerows([mode, metric, k, *value] for k, value in values.items())
    write_text(csv_file, rows.getvalue())
    return [json_file, csv_file]


def table(scores: Intervals) -> str:
    """An evaluation as a table to print: one row per inner step, one column per batch-norm mode and metric.

    An algorithm without inner steps has one row: adapted.
    """
    columns = [(mode, metric) for mode, metrics in scores.items() for metric in metrics]
    steps = list(next(iter(scores["transductive"].values())))
    head = ["inner step", *(f"{metric} ({mode})" for mode, metric in columns)]
    rows = [head]
    for k in steps:
        cells = [f"{k}" if k else "0 (before)" if len(steps) > 1 else "adapted"]
        rows.append([*cells, *(_cell(metric, scores[mode][metric].get(k)) for mode, metric in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cell(metric: str, value: Interval | None) -> str:
    if value is None:
        return "-"
    mean, half = value
    return f"{100 * mean:.2f} +- {100 * half:.2f} %" if "accuracy" in metric else f"{mean:.4f} +- {half:.4f}"


def _listed(values: Mapping[int, Interval]) -> list[dict[str, float] | None]:
    """One for each inner step from 0 on; None for a step that was not scored."""
    return [values[k]._asdict() if k in values else None for k in range(max(values) + 1)]


def _overrides(config: Config) -> dict[str, Any]:
    """The fields that differ from those of the recipe."""
    usual = to_json(RECIPES[config.recipe]()) if config.recipe in RECIPES else {}
    where = ("name", "output_dir", "data_dir", "resume")
    return {k: v for k, v in to_json(config).items() if k not in where and v != usual.get(k)}


def _finite(value: Any) -> Any:
    """The value with null for every NaN or infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _commit() -> str | None:
    """The commit of the code that runs, with "+" behind it where the checkout was changed; None outside one."""
    try:
        if _git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return None  # installed into an environment that lies in another repository
        found = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except OSError:
        return None
    return None if found.returncode else found.stdout.strip() + ("+" if changes else "")


def _git(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True)


# -------------------------------------------------------------------------------------------- pictures


def draw(config: Config, folder: Path, scores: Intervals | None) -> list[Path]:
    """The run's pictures: learning curve, adaptation curve, and one episode of the test split."""
    from distmaml.pictures import runs as pictures  # with matplotlib, which workers import this module without

    target, title = paths.artifacts(folder), config.run.name or ""
    files = [target / "learning_curve.png"]
    points: dict[str, tuple[list[int], list[float]]] = {}
    for segment in committed_segments(paths.metrics(folder), -1):
        for point in read_points(segment):
            for key, value in point.values.items():
                if key.startswith(("train/query", "val/query")) and ("_step_" not in key or key.endswith("_step_0")):
                    points.setdefault(key, ([], []))[0].append(point.step)
                    points[key][1].append(value)
    pictures.learning_curve(files[0], points, title=title)
    if scores and len(next(iter(scores["transductive"].values()))) > 1:
        metric = config.evaluation.selected_quantity.split("_step_")[0]
        curves = {mode: metrics[metric] for mode, metrics in scores.items()}
        files.append(target / "adaptation_curve.png")
        pictures.adaptation_curve(files[-1], curves, metric=metric, title=title)
    if not any(is_custom(name) for name in (config.model, config.objective, config.algorithm, config.tasks)):
        files.append(_draw_episode(config, folder, target, title))
    return files


def _draw_episode(config: Config, folder: Path, target: Path, title: str) -> Path:
    from distmaml.pictures import runs as pictures

    model, tasks = load(folder), build.task_distributions(config)["test"]
    task = tree_index(tasks.sample([0]), 0)
    adapted = model.adapt(task.support)
    predictions = adapted.predict(task.query.inputs, transductive=True)
    if isinstance(tasks, ImageTasks):
        path = target / "episode.png"
        record = build.dataset_record(config)
        assert record is not None
        pictures.episode_sheet(
            path,
            task.support.inputs.numpy(),
            task.support.targets.numpy(),
            task.query.inputs.numpy(),
            task.query.targets.numpy(),
            predictions.argmax(-1).numpy(),
            class_names=tasks.names_of(0),
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
