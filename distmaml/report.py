"""What a run came to: figures as metrics, JSON, CSV and a table, and pictures of it."""

import csv
import io
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distmaml import build, paths, pictures
from distmaml.adapter import load
from distmaml.config import Config, ImageTasks, is_custom, to_json
from distmaml.files import write_text
from distmaml.segments import committed_segments, read_points
from distmaml.trees import tree_index

Scores = Mapping[str, Mapping[str, list[Any]]]
"""Batch-norm mode -> metric -> mean and half width of the 95 % interval after each inner step."""


# --------------------------------------------------------------------------------------------- figures


def num_episodes(config: Config, split: str) -> int:
    """How many episodes of a split an evaluation looks at."""
    return config.evaluation.num_val_episodes if split == "val" else config.evaluation.num_test_episodes


def data_of(config: Config, split: str) -> str:
    """What the episodes of a split are made of, and whether training has seen it."""
    if isinstance(config.task_options, ImageTasks) and config.task_options.split_by == "samples":
        return f"the {split} pictures of classes that training has seen (split_by samples)"
    return f"the {split} split, which training never saw"


def metrics_of(scores: Scores, *, prefix: str = "test") -> dict[str, float]:
    """The flat metrics of an evaluation, as MLflow gets them; the inductive ones under ``test_inductive/``."""
    flat = {}
    for mode, metrics in scores.items():
        group = prefix if mode == "transductive" else f"{prefix}_{mode}"
        for metric, intervals in metrics.items():
            flat.update({f"{group}/{metric}_step_{k}": value[0] for k, value in enumerate(intervals)})
            flat[f"{group}/{metric}"], flat[f"{group}/{metric}_interval"] = intervals[-1]
    return flat


def write_evaluation(
    config: Config, folder: Path, found: Mapping[str, Any], *, split: str = "test", name: str = "evaluation-test"
) -> list[Path]:
    """Writes an evaluation as JSON, with everything that decides its figures beside them, and as CSV.

    Args:
      found: what `loop.evaluate` returned.
      name: of the files, without their endings.
    """
    record = {
        "run": config.run.name,
        "recipe": config.recipe,
        "commit": _commit(),
        "split": split,
        "data": data_of(config, split),
        "dataset": build.dataset_record(config),
        "outer_steps": found["step"],
        "num_episodes": num_episodes(config, split),
        "first_episode": 0,
        "interval": "1.96 * standard deviation / sqrt(num_episodes)",
        "config": to_json(config),
        "scores": {
            mode: {metric: [{"mean": v[0], "half_width": v[1]} for v in values] for metric, values in metrics.items()}
            for mode, metrics in found["modes"].items()
        },
    }
    json_file, csv_file = folder / f"{name}.json", folder / f"{name}.csv"
    write_text(json_file, json.dumps(record, indent=2) + "\n")
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["batch_norm", "metric", "inner_step", "mean", "half_width_95"])
    for mode, metrics in found["modes"].items():
        for metric, values in metrics.items():
            writer.writerows([mode, metric, k, *value] for k, value in enumerate(values))
    write_text(csv_file, rows.getvalue())
    return [json_file, csv_file]


def table(scores: Scores) -> str:
    """An evaluation as a table to print: a row an inner step, a column a batch-norm mode and metric."""
    columns = [(mode, metric) for mode, metrics in scores.items() for metric in metrics]
    num_steps = len(next(iter(next(iter(scores.values())).values())))
    head = ["inner step", *(f"{metric} ({mode})" for mode, metric in columns)]
    rows = [head]
    for k in range(num_steps):
        cells = [f"{k}" if k else "0 (before)"]
        for mode, metric in columns:
            mean, half = scores[mode][metric][k]
            cells.append(
                f"{100 * mean:.2f} +- {100 * half:.2f} %" if "accuracy" in metric else f"{mean:.4f} +- {half:.4f}"
            )
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _commit() -> str | None:
    """The commit of the code that runs, with "+" behind it where the checkout was changed; None outside one."""
    try:
        found = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except OSError:
        return None
    return None if found.returncode else found.stdout.strip() + ("+" if changes else "")


def _git(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True)


# -------------------------------------------------------------------------------------------- pictures


def draw(config: Config, folder: Path, scores: Scores) -> list[Path]:
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
