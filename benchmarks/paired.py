"""Two models on the same episodes: the mean of the differences, whose interval is narrower than that of either mean.

    python -m benchmarks.paired RUN OTHER --split val --num-episodes 1000 --output-dir DIR

The difference is that of the query metric after the last inner step, transductive, RUN minus OTHER; intervals are 95 %.
Episodes that chose the models are left out: those of a validation are the first of their split.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from distmaml import build, checkpoint, outer, paths
from distmaml.config import from_json
from distmaml.scoring import interval, score
from distmaml.trees import tree_to

CHUNK = 20


def scores_of(run: Path, split: str, episodes: range) -> torch.Tensor:
    """The query metric of a run's best model on each of these episodes of a split, ``[num_episodes]``."""
    tensors, document = checkpoint.load(paths.model(run))
    config = from_json(document["config"])
    device, dtype = torch.device("cpu"), getattr(torch, config.outer.dtype)
    tasks = build.task_distributions(config)
    learner = build.learner(config, build.shapes(tasks["train"]), device)
    meta_params = outer.load_meta_params(learner.meta_params, tensors, prefix="")
    found = []
    for first in episodes[::CHUNK]:
        batch = tree_to(tasks[split].sample(range(first, min(first + CHUNK, episodes.stop))), device, dtype)
        scores = score(learner.algorithm, learner.objective, meta_params, batch, inductive=False,
                       num_steps=config.evaluation.num_eval_steps, vectorize=learner.vectorize)  # fmt: skip
        found.append(scores["transductive"][config.evaluation.selected_quantity][:, -1])
    return torch.cat(found)


def main(
    runs: Annotated[tuple[str, str], tyro.conf.Positional],
    split: Literal["val", "test"] = "val",
    first_episode: int = 200,
    num_episodes: int = 1000,
    output_dir: Path | None = None,
    result: Annotated[Path | None, tyro.conf.arg(help="JSON file for the result")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)  # of the engine's small tensors two threads are slower than one
    folders = [paths.runs(paths.output_dir(output_dir)) / name for name in runs]
    documents = [checkpoint.load(paths.model(folder))[1] for folder in folders]
    if documents[0]["dataset"] != documents[1]["dataset"]:
        raise SystemExit(f"{runs[0]} and {runs[1]} were trained on different data, and have no episodes in common.")
    episodes = range(first_episode, first_episode + num_episodes)
    own, others = (scores_of(folder, split, episodes) for folder in folders)
    record: dict[str, Any] = {"runs": runs, "split": split, "first_episode": first_episode,
                              "num_episodes": num_episodes}  # fmt: skip
    for name, values in zip((*runs, "difference"), (own, others, own - others), strict=True):
        mean, half_width = interval(values)
        sys.stdout.write(f"{name:24s} {mean:9.5f} +- {half_width:.5f}\n")
        record[name] = (mean, half_width)
    if result:
        result.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
