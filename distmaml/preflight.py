"""What can be known to be wrong with a training run before a cluster is started, without computing anything."""

import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from distmaml import checkpoint, mirror, paths
from distmaml.config import Config, is_repeated, is_store, read, to_json
from distmaml.errors import ConfigError, RunError
from distmaml.files import absolute
from distmaml.limits import check_storage
from distmaml.mirror import Mirror
from distmaml.options import ImageTaskOptions
from distmaml.recorder import check_origin, check_settings
from distmaml.selection import Selection
from distmaml.tracking.outbox import Outbox

LEAST_BYTES = 100 * 2**20
WORKERS_A_CORE = 8
"""On a machine of one's own, workers may share a core, to try things out; each takes some 400 MB."""


def named(config: Config) -> Config:
    """The configuration with a name and with absolute paths: a worker's working directory is another.

    Raises:
      ConfigError: a run is to be resumed, but nobody says which.
    """
    name = config.run.name
    if name is None:
        if config.run.resume:
            raise ConfigError("--resume needs the --name of the run to go on with.")
        name = f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"  # two may start in one second
    config = replace(config, run=replace(config.run, name=name, output_dir=paths.output_dir(config.run.output_dir)))
    options = config.task_options
    if isinstance(options, ImageTaskOptions):
        if options.data_dir is not None:
            options = replace(options, data_dir=absolute(options.data_dir))
        if is_store(options.dataset) and "://" not in options.dataset:
            options = replace(options, dataset=str(absolute(Path(options.dataset))))
    return replace(config, task_options=options)


def settings_of(name: str, output_dir: Path | None, storage: str | None = None) -> Config:
    """The configuration of a run that is there.

    Args:
      storage: where to look for it, rather than in the output folder alone.

    Raises:
      RunError: it is not; the message names those that are.
      ConfigError: its configuration is damaged.
    """
    check_storage(storage)
    runs = paths.runs(paths.output_dir(output_dir))
    there = Mirror(storage, runs / name)
    there.pull(paths.config_file(runs / name))
    if storage is not None and not paths.config_file(runs / name).exists():
        raise RunError(f"there is no run {there.shown}. Check --run and --storage.")
    return read(paths.config_file(known_folder("run", runs, name, "config.json")))


def known_folder(kind: str, parent: Path, name: str, file: str) -> Path:
    """The folder of a run or a search that is there: it holds a file of that name.

    Raises:
      RunError: it is not; the message names those that are.
    """
    known = sorted(path.parent.name for path in parent.glob(f"*/{file}"))
    if name not in known:
        raise RunError(f"there is no {kind} named {name!r} in {parent}. There are: {', '.join(known) or 'none'}.")
    return parent / name


def check_output(folder: Path) -> None:
    """Refuses an output folder in which nothing can be written.

    Raises:
      RunError: naming the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise RunError(f"cannot write in {folder}: {error}. Name another folder by --output-dir.") from error
    if free < LEAST_BYTES:
        raise RunError(
            f"{folder} has {free / 2**20:.0f} MiB of free space; a run wants {LEAST_BYTES / 2**20:.0f} MiB or more. "
            "Make room, or name another folder by --output-dir."
        )


def check_machine(config: Config) -> None:
    """Refuses workers that a cluster on this machine could not carry.

    Raises:
      ConfigError: too many of them, or a GPU that is not there.
    """
    if config.cluster.use_gpu == "yes" and not torch.cuda.is_available():
        raise ConfigError(
            "use_gpu='yes', but torch finds no GPU on this machine. Take --use-gpu auto, or name a cluster."
        )
    most = WORKERS_A_CORE * (os.cpu_count() or 1)
    if config.cluster.team[1] > most:
        raise ConfigError(
            f"num_workers={config.cluster.num_workers} is more than this machine can carry: {most} at most, and "
            f"{os.cpu_count()} are as fast. Lower it, or name a cluster by --address."
        )


def check_shared(config: Config) -> None:
    """Refuses, in a worker, a run's folder that is not the one that the driver has written to, or its storage.

    Raises:
      RunError: another folder under the same path, on a disk of this node alone; or one that cannot be written.
    """
    folder, storage = paths.run_folder(config), mirror.of(config)
    here = f"the node {socket.gethostname()}"
    way_out = "Name a folder by --output-dir that all nodes see and may write, on a disk that they share."
    if storage.uri:
        way_out = f"Its storage is {storage.shown}: another command may use it under the same --name."
        storage.pull(paths.config_file(folder))
    try:
        seen = json.loads(paths.config_file(folder).read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{here} does not see the run in {folder} ({error}). {way_out}") from error
    expected = to_json(config)
    if storage.uri and isinstance(seen, dict):
        expected["output_dir"] = seen.get("output_dir")  # which is each node's own
    if seen != expected:
        raise RunError(f"{here} has another run of that name in {folder}. {way_out}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise RunError(f"{here} cannot write in {folder} ({error}). {way_out}") from error


# ------------------------------------------------------------------------------------------ an earlier run


def take_run(storage: Mirror, folder: Path) -> None:
    """Makes the run's folder what it is in storage, which can be written; nothing for a run without storage.

    Raises:
      RunError: storage cannot be used; another process is busy with the run; or the folder holds another one.
    """
    if not storage.uri:
        return
    storage.hasty().check()
    with claimed(folder):
        record, ours = storage.read(folder / "tracking" / "run.json"), Outbox(folder).read_run()
        there, here = record and _uid(record, storage), ours and ours.uid
        is_trained = checkpoint.steps(paths.checkpoints(folder)) or paths.model(folder).exists()
        if is_trained and here != there and (here or not there):  # without a record it is what a worker had here
            raise RunError(
                f"{folder} holds a run that is not the one in {storage.shown}, and would be lost. Copy it there, move "
                "it away, or choose another --name."
            )
        if there:
            storage.pull_run()


def _uid(record: bytes, storage: Mirror) -> str:
    try:
        return str(json.loads(record)["uid"])
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{storage.shown}/tracking/run.json is damaged ({error!r:.200}). It says which run this is; restore it, or "
            "choose another --name."
        ) from error


def is_interrupted(config: Config, folder: Path) -> bool:
    """Whether a run that was stopped on its way is asked for again, by the same settings: then it goes on.

    That is what resubmits a job: a scheduler that repeats a command cannot add --resume to it.

    Raises:
      RunError: another process is busy with it.
    """
    if Outbox(folder).status() == "FINISHED" or not paths.config_file(folder).exists():
        return False
    if not checkpoint.steps(paths.checkpoints(folder)):
        return False
    if not is_repeated(to_json(read(paths.config_file(folder))), config):
        return False
    with claimed(folder):
        return True


def check_new(config: Config, folder: Path) -> None:
    """Refuses the name of a run that has got somewhere. One that ended before its first checkpoint does not count.

    Raises:
      RunError: the run exists, or is being trained right now.
    """
    if not was_started(folder):
        return
    done = checkpoint.steps(paths.checkpoints(folder))
    if done:
        raise RunError(
            f"a run named {config.run.name!r} exists in {folder}, {done[-1]} outer steps long, and it is over or has "
            "other settings. Go on with it by --resume, or choose another --name."
        )
    if paths.model(folder).exists():
        raise RunError(
            f"a run named {config.run.name!r} exists in {folder}, with a model but no checkpoint to go on from. "
            "Move the folder away, or choose another --name."
        )
    with claimed(folder):
        pass  # nobody is busy with it


def check_resumable(config: Config, folder: Path) -> None:
    """Refuses to go on with a run that is not there, that was another experiment, or that has finished.

    Raises:
      RunError: naming what stands in the way, and the way out.
    """
    if not was_started(folder):
        raise RunError(f"there is no run named {config.run.name!r} in {folder.parent} to resume.")
    if paths.config_file(folder).exists():
        before = read(paths.config_file(folder))
        if before.run.storage and not config.run.storage:
            raise RunError(
                f"the run {config.run.name!r} lies in {before.run.storage}, and the copy in {folder} may be an old "
                f"one. Add --storage {before.run.storage}."
            )
        check_settings(to_json(before), config)
    last, stands = checkpoint.newest(paths.checkpoints(folder)) or 0, Selection()
    if last:
        _, document = checkpoint.load(checkpoint.path_of(paths.checkpoints(folder), last))
        check_origin(document, config)
        stands = Selection.of(document)
    finished = _end(folder) == "FINISHED"
    if last > config.outer.num_outer_steps or (finished and last == config.outer.num_outer_steps):
        raise RunError(
            f"the run {config.run.name!r} has {'finished its' if finished else 'done'} {last} outer steps. Ask for "
            "more by --num-outer-steps, or start a new run under another --name."
        )
    if finished and stands.is_over(config.evaluation):
        raise RunError(
            f"the run {config.run.name!r} stopped early after {last} outer steps, for want of a better "
            f"{config.evaluation.selection_metric}. Give it more --patience to go on."
        )


def remove_false_start(folder: Path) -> bool:
    """Removes what an earlier run of the same name left that ended before its first checkpoint; whether it did.

    Raises:
      RunError: another process is busy with the run, or has brought it further in the meantime.
    """
    if not was_started(folder):
        return False
    with claimed(folder):
        if checkpoint.steps(paths.checkpoints(folder)) or paths.model(folder).exists():
            raise RunError(f"another process has just trained a run in {folder}. Choose another --name.")
        shutil.rmtree(folder)
    return True


def was_started(folder: Path) -> bool:
    """Whether there is a run in a folder, however far it got."""
    signs = (paths.config_file(folder), folder / "tracking" / "run.json")
    return any(sign.exists() for sign in signs) or bool(checkpoint.steps(paths.checkpoints(folder)))


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A block in which no other process is busy with the run.

    Raises:
      RunError: another one is.
    """
    outbox = Outbox(folder)
    outbox.claim()
    try:
        yield
    finally:
        outbox.release()


def _end(folder: Path) -> str | None:
    """How the run last said that it ended."""
    ends = [record["status"] for record in Outbox(folder).records() if record["kind"] == "ended"]
    return ends[-1] if ends else None
