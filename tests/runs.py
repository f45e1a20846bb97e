"""Small runs for tests: settings that train in a second, a store of made-up pictures, and real process groups."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from distmaml import checkpoint, launch, paths, study, workers
from distmaml.config import Config, override
from distmaml.episodes import TaskBatch
from distmaml.errors import DistmamlError
from distmaml.recipes import RECIPES
from distmaml.search import Trial
from distmaml.store import StoreInfo, write_store
from distmaml.tasks.sinusoid import SinusoidTasks
from distmaml.trial import take_weights
from distmaml.worker import LocalWorker


def waves(output_dir: Path, name: str, **changes: Any) -> Config:
    """20 steps of 7 sine waves in chunks of 2: four chunks, the last of them short."""
    values = {
        "output_dir": output_dir, "name": name, "num_outer_steps": 20, "meta_batch_size": 7, "reduction_chunk": 2,
        "inner_lr": 0.05, "num_inner_steps": 2, "outer_lr": 0.01, "hidden_sizes": (8, 8), "num_eval_steps": 2,
        "num_eval_queries": 10, "val_every": 5, "num_val_episodes": 25, "num_test_episodes": 45, "log_every": 1,
        "checkpoint_every": 5,
    }  # fmt: skip
    base = override(
        RECIPES["sinusoid-maml-5s"](), values
    )  # what belongs to other tasks or another model goes with them
    return override(base, changes)


def pictures(output_dir: Path, name: str, **changes: Any) -> Config:
    """20 steps of 4 image episodes in chunks of 2, by a tiny Conv4 on the store that `tiny_store` writes."""
    values = {
        "output_dir": output_dir, "name": name, "dataset": str(output_dir / "tiny.arrow"), "num_ways": 3,
        "num_queries": 2, "num_eval_queries": 2, "num_outer_steps": 20, "meta_batch_size": 4, "reduction_chunk": 2,
        "num_filters": 3, "inner_lr": 0.1, "num_inner_steps": 2, "num_eval_steps": 2, "val_every": 10,
        "num_val_episodes": 4, "num_test_episodes": 21, "checkpoint_every": 10, "inductive": False,
    }  # fmt: skip
    return override(RECIPES["glyphs-maml-5w1s"](), {**values, **changes})


def tiny_store(path: Path) -> StoreInfo:
    """12 classes of 6 pictures of 8 x 8: a pattern for each class, with noise."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 200, (12, 1, 1, 8, 8))
    images = (patterns + generator.integers(0, 55, (12, 6, 1, 8, 8))).astype(np.uint8)
    names = [f"class-{i:02d}" for i in range(12)]
    return write_store(
        path,
        name="tiny",
        source="numpy",
        licence="none",
        image_shape=(1, 8, 8),
        ink=False,
        classes=zip(names, images, strict=True),
        splits={"default": {"train": names[:6], "val": names[6:9], "test": names[9:]}},
    )


class FragileWaves(SinusoidTasks):
    """Sine waves whose source fails at one task, once: as long as a file is there."""

    def __init__(self, *, fails_at: int, while_there: str, **arguments: Any) -> None:
        super().__init__(num_shots=5, num_queries=10, **arguments)
        self.fails_at, self.while_there = fails_at, Path(while_there)

    def sample(self, indices: Sequence[int]) -> TaskBatch:
        if self.split == "train" and self.fails_at in indices and self.while_there.exists():
            self.while_there.unlink()
            raise OSError("the disk with the tasks is gone")
        return super().sample(indices)


class Member:
    """A worker of a process group on this machine."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nobody listens."""

    def leaving(self) -> bool:
        return False


def adopt(config: Config) -> None:
    """Makes the newest checkpoint of a run one of these settings, with which it would not go on otherwise."""
    step = checkpoint.newest(paths.checkpoints(paths.run_folder(config)))
    assert step is not None
    take_weights(config, donor=config, step=step)


class _Stop(Exception):  # noqa: N818 (no error)
    pass


def run_serially(patch: pytest.MonkeyPatch) -> None:
    """Lets searches run and test their trials one after the other in this process, as long as the patch is."""

    def run(function: Any, plan: Any, listener: Any, *, until: int | None, **_: Any) -> None:
        while plan.num_left:
            trial = plan.next()
            listener.started(trial)

            def report(metrics: Mapping[str, float], trial: Trial = trial) -> None:
                listener.reported(trial, metrics)
                if until is not None and metrics["step"] >= until:
                    raise _Stop

            try:
                function(trial, report)
                listener.ended(trial, "finished", None)
            except _Stop:
                listener.ended(trial, "finished", None)
            except DistmamlError as error:
                listener.ended(trial, "failed", str(error))

    @contextmanager
    def cluster(config: Config, environment: object = None) -> Iterator[dict[str, float]]:
        yield {"CPU": 2.0}

    patch.setattr(study, "search", run)
    patch.setattr(workers, "cluster", cluster)
    patch.setattr(launch, "fit", lambda function, config, **_: function(config, LocalWorker()))


@contextmanager
def one_thread() -> Iterator[None]:
    """The number of threads is part of what a bitwise promise is made for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_groups(folder: Path, world_sizes: Sequence[int], function: Callable[..., None], *arguments: Any) -> None:
    """Calls ``function(member, *arguments)`` on every member of real gloo groups of these sizes, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    spawn(_process, args=(folder, tuple(world_sizes), function, arguments), nprocs=max(world_sizes))  # type: ignore[no-untyped-call]


def _process(
    rank: int, folder: Path, world_sizes: Sequence[int], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    for number, world_size in enumerate(world_sizes):
        if rank < world_size:
            meeting = (folder / f"group-{number}").absolute().as_uri()
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
            function(Member(rank, world_size), *arguments)
            dist.barrier()
            dist.destroy_process_group()


def largest_difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Over all tensors, which have the same names."""
    assert found.keys() == expected.keys()
    pairs = itertools.chain((found[name], expected[name]) for name in expected)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
