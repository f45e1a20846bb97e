"""The training loop and the evaluation, the same code for one worker or many, with or without a cluster.

A step: take this worker's chunks of tasks, sum their meta-gradients, add up over the workers, step. All that decides
something (early stop, divergence, the best model) is computed from sums that every worker has, so all decide alike.
"""

import math
from collections import defaultdict
from typing import Any

import torch

from distmaml import build, checkpoint, collectives, paths
from distmaml.config import Config
from distmaml.episodes import TaskDistribution, shard
from distmaml.errors import ConfigError, DivergenceError
from distmaml.meter import Meter
from distmaml.outer import chunk_sum, init_outer, learning_rate, load_named_state, named_state, outer_step
from distmaml.prefetch import prefetched
from distmaml.recorder import Recorder, check_data, check_origin
from distmaml.scoring import Interval, interval, score
from distmaml.trees import tree_leaves, tree_names, tree_to, tree_unflatten
from distmaml.worker import Worker

EVALUATION_CHUNK = 20


def train(config: Config, worker: Worker) -> dict[str, float]:
    """Meta-trains until `num_outer_steps` or an early stop; goes on from the newest checkpoint in the run's folder.

    Returns:
      The last value of each metric, the best of the selection metric, and the step it ended at.

    Raises:
      DivergenceError: a loss or gradient that is not finite; checkpoints from before it are kept.
    """
    options, evaluation = config.outer, config.evaluation
    tasks = build.task_distributions(config)
    shapes = build.shapes(tasks["train"])
    learner = build.learner(config, shapes, worker.device)
    state = init_outer(learner.meta_params, options)
    start, best, stale, finished = _restore(config, worker, state)
    recorder = Recorder(config, start, shapes=shapes._asdict()) if worker.rank == 0 else None
    shards = shard(options.meta_batch_size, options.reduction_chunk, worker.rank, worker.world_size)
    num_chunks = -(-options.meta_batch_size // options.reduction_chunk)
    like = _shape_of_sums(config, worker, learner, tasks["train"])
    meter = Meter(options.meta_batch_size)
    values: dict[str, float] = {}
    done = start

    for step, chunks in prefetched(
        tasks["train"], shards, steps=range(start, start if finished else options.num_outer_steps),
        tasks_per_step=options.meta_batch_size, device=worker.device, dtype=getattr(torch, options.precision),
    ):  # fmt: skip
        sums = {
            chunk.position: (
                chunk_sum(learner.algorithm, state.meta_params, chunk.tasks, step, vectorize=learner.vectorize),
                chunk.num_tasks,
            )
            for chunk in chunks
        }
        (grads, metrics), _ = collectives.mean_over_tasks(
            sums, like, num_chunks=num_chunks, ordered=options.reduction == "ordered"
        )
        norm = float(outer_step(state, grads, step, options))
        done = step + 1
        values = {name: float(metric) for name, metric in metrics.items()}
        _check_finite(values, norm, done, config)
        meter.add({**values, "gradient_norm": norm})
        last = done == options.num_outer_steps
        if recorder and (done % config.run.log_every == 0 or done % config.run.checkpoint_every == 0 or last):
            recorder.points(done, {**meter.read(), "system/outer_lr": learning_rate(step, options)})
        improved, stopped_early = False, False
        if evaluation.val_every and (done % evaluation.val_every == 0 or last):
            with meter.excluded():
                found = _validate(config, worker, learner, state.meta_params, tasks["val"])
            selected = _selected(config, found)
            sign = 1 if evaluation.selection_mode == "max" else -1
            improved = sign * selected > (-math.inf if best is None else sign * best)  # never for NaN
            best, stale = (selected, 0) if improved else (best, stale + 1)
            stopped_early = not last and evaluation.patience is not None and stale >= evaluation.patience
            values.update(found)
            if recorder:
                recorder.points(done, {**found, **({_best_key(config): selected} if improved else {})})
        improved = improved or (best is None and (last or stopped_early))  # a run has a result, whatever it is
        due = done % config.run.checkpoint_every == 0 or last or stopped_early
        if recorder:
            with meter.excluded():
                if improved:
                    parts = dict(zip(tree_names(state.meta_params), tree_leaves(state.meta_params), strict=True))
                    recorder.model(done, parts, {"selection_metric": evaluation.selection_metric, "value": best})
                if due:
                    document = {"best": best, "stale": stale, "stopped_early": stopped_early}
                    recorder.checkpoint(done, named_state(state), document)
                recorder.progress(done)
        if due:
            worker.report({"step": float(done), **values})
        if stopped_early:
            break
    return {**values, **({} if best is None else {_best_key(config): best}), "step": float(done)}


def evaluate(config: Config, worker: Worker, *, split: str = "test", step: int | None = None) -> dict[str, Any]:
    """Scores the run's model, or its checkpoint after `step`, on episodes of a split.

    Returns:
      ``{"step": ..., "modes": {mode: {metric: [[mean, half_width] per inner step]}}}``, on every worker.
    """
    evaluation, folder = config.evaluation, paths.run_folder(config)
    tasks = build.task_distributions(config)
    learner = build.learner(config, build.shapes(tasks["train"]), worker.device)
    collectives.from_first(0, worker.device)  # rank 0 may still be writing the file that all read
    file = paths.model(folder) if step is None else checkpoint.path_of(paths.checkpoints(folder), step)
    tensors, document = checkpoint.load(file)
    check_data(document, config)
    prefix = "" if step is None else "meta_params/"
    leaves = [tensors[prefix + name].to(worker.device) for name in tree_names(learner.meta_params)]
    meta_params = tree_unflatten(learner.meta_params, leaves)
    num_episodes = evaluation.num_val_episodes if split == "val" else evaluation.num_test_episodes
    scores = _score(config, worker, learner, meta_params, tasks[split], num_episodes, inductive=evaluation.inductive)
    return {"step": document["step"], "modes": scores}


def _score(
    config: Config,
    worker: Worker,
    learner: build.Learner,
    meta_params: Any,
    tasks: TaskDistribution,
    num_episodes: int,
    *,
    inductive: bool,
) -> dict[str, dict[str, list[Interval]]]:
    """Mode -> metric -> mean and interval per inner step, over the episodes 0 ... num_episodes - 1."""
    steps, dtype = config.evaluation.num_eval_steps, getattr(torch, config.outer.precision)
    keys = [(mode, f"query_{name}") for mode in ("transductive", *(["inductive"] if inductive else []))
            for name in ("loss", *learner.objective.metrics)]  # fmt: skip
    table = torch.zeros(num_episodes, len(keys), steps + 1, dtype=dtype, device=worker.device)
    for _, positions in shard(num_episodes, EVALUATION_CHUNK, worker.rank, worker.world_size):
        batch = tree_to(tasks.sample(positions), worker.device, dtype)
        found = score(learner.algorithm, learner.objective, meta_params, batch, num_steps=steps, inductive=inductive,
                      vectorize=learner.vectorize)  # fmt: skip
        for column, (mode, metric) in enumerate(keys):
            table[positions.start : positions.stop, column] = found[mode][metric]
    collectives.all_reduce(table)  # every row is zero on all workers but one
    scores: dict[str, dict[str, list[Interval]]] = defaultdict(dict)
    for column, (mode, metric) in enumerate(keys):
        scores[mode][metric] = [interval(table[:, column, k]) for k in range(steps + 1)]
    return dict(scores)


def _validate(
    config: Config, worker: Worker, learner: build.Learner, meta_params: Any, tasks: TaskDistribution
) -> dict[str, float]:
    scores = _score(config, worker, learner, meta_params, tasks, config.evaluation.num_val_episodes, inductive=False)
    found = {}
    for metric, intervals in scores["transductive"].items():
        found.update({f"val/{metric}_step_{k}": value.mean for k, value in enumerate(intervals)})
        found[f"val/{metric}"] = intervals[-1].mean
    return found


def _selected(config: Config, found: dict[str, float]) -> float:
    metric = config.evaluation.selection_metric
    if metric not in found:
        raise ConfigError(f"selection_metric={metric!r} is not among the metrics: {', '.join(sorted(found))}.")
    return found[metric]


def _best_key(config: Config) -> str:
    return "best/" + config.evaluation.selection_metric.removeprefix("val/")


def _restore(config: Config, worker: Worker, state: Any) -> tuple[int, float | None, int, bool]:
    """Step, best value, validations since then, and whether that was the end, from the newest whole checkpoint."""
    folder = paths.checkpoints(paths.run_folder(config))
    step = collectives.from_first((checkpoint.newest(folder) or 0) if worker.rank == 0 else 0, worker.device)
    if step == 0:
        return 0, None, 0, False
    tensors, document = checkpoint.load(checkpoint.path_of(folder, step))
    check_origin(document, config)
    load_named_state(state, tensors)
    return step, document["best"], document["stale"], document["stopped_early"]


def _shape_of_sums(config: Config, worker: Worker, learner: build.Learner, tasks: TaskDistribution) -> Any:
    """A tree like the sums of a step, from one task: a worker without a chunk needs it too."""
    one = tree_to(tasks.sample([0]), worker.device, getattr(torch, config.outer.precision))
    return chunk_sum(learner.algorithm, learner.meta_params, one, 0, vectorize=learner.vectorize)


def _check_finite(values: dict[str, float], norm: float, step: int, config: Config) -> None:
    wrong = [name for name, value in {**values, "gradient_norm": norm}.items() if not math.isfinite(value)]
    if wrong:
        raise DivergenceError(
            f"{', '.join(wrong)} is no longer finite at outer step {step}. The likely cause is a learning rate that is "
            f"too large: lower --inner-lr or --outer-lr (now {config.outer.outer_lr}), or set --clip-norm. "
            "The last checkpoint from before it is kept."
        )
