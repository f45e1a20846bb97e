"""Times what Python processes do while they start, from outside: nothing of what is timed knows of it.

Python imports this by itself in every process that has its folder on $PYTHONPATH. Where $STARTUP_CLOCK names a folder,
the outermost imports of other people's packages and the calls of some functions (`CALLS`) are written into a file of
the process there, a line each when it is over: what, begin, end (seconds since the machine's start, which all processes
share), and whether it was in the main thread. The first line is the start of the interpreter itself.
"""

import functools
import importlib.machinery
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = (
    "torch", "ray", "mlflow", "pyarrow", "numpy", "tyro", "pandas", "sqlalchemy", "alembic", "filelock", "psutil",
    "PIL", "fontTools", "safetensors", "tqdm", "matplotlib", "plotly", "optuna",
)  # fmt: skip
"""Those whose imports are timed, each with all that it imports in turn."""
OF_THEIR_OWN = ("distmaml", "torch")
"""Whose time does not count for what imports them."""

CALLS = {
    "distmaml.cli": ("parse_recipe",),
    "distmaml.preflight": ("check_output", "take_run", "check_new", "remove_false_start", "check_shared"),
    "distmaml.rehearsal": ("rehearse",),
    "distmaml.datasets": ("ensure_store",),
    "distmaml.store": ("open_store", "ClassStore.verify"),
    "distmaml.tracking.database": ("open_tracking", "_create_database"),
    "distmaml.tracking.runs": ("sweep", "TrackedRun.start"),
    "distmaml.tracking.views": ("seed_view",),
    "distmaml.ray_cluster": ("_init",),
    "distmaml.launch": ("_fit", "_per_worker", "RayWorker.__init__"),
    "distmaml.build": ("task_distributions", "learner", "shapes", "dataset_record"),
    "distmaml.outer": ("chunk_sum", "outer_step"),
    "distmaml.collectives": ("mean_over_tasks",),
    "distmaml.loop": ("train",),
    "distmaml.recorder": ("Recorder.__init__",),
    "ray.train.v2._internal.execution.controller.controller": ("TrainController.__init__",),
    "ray.train.v2._internal.execution.worker_group.worker_group": (
        "WorkerGroup._start", "WorkerGroup._create_workers", "WorkerGroup._init_train_context",
    ),
    "ray.train.v2._internal.execution.worker_group.worker": ("RayTrainWorker.init_train_context",),
    "ray.train.v2._internal.callbacks.backend_setup": ("BackendSetupCallback.after_execution_group_start",),
    "ray.train.v2._internal.callbacks.placement_group_callback": (
        "PlacementGroupCleanerCallback.after_worker_group_start",
    ),
    "ray.train.torch.config": ("_setup_torch_process_group",),
}  # fmt: skip
"""Module -> what is timed in it."""


def now() -> float:
    """Seconds since the machine's start."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Clock:
    """Writes what it is told into this process's file."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def write(self, what: str, begun: float, ended: float) -> None:
        """One line, whole also where others write at the same time."""
        record = {"what": what, "begun": begun, "ended": ended,
                  "main": threading.current_thread() is threading.main_thread()}  # fmt: skip
        path = os.path.join(self._folder, f"{os.getpid()}.jsonl")  # a process may have been forked since
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, (json.dumps(record) + "\n").encode())
        finally:
            os.close(file)


class Finder:
    """Finds modules like Python's own finder, and times how they are loaded."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._importing = clock, threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec; None where it is not to be timed."""
        package = name.partition(".")[0]
        if package not in (*PACKAGES, "distmaml"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module
        kind = package if package in OF_THEIR_OWN else "others"

        def timed(module: ModuleType) -> None:
            under_way = getattr(self._importing, kind, False)
            setattr(self._importing, kind, True)
            begun = now()
            try:
                execute(module)
            finally:
                setattr(self._importing, kind, under_way)
                if not under_way:
                    self._clock.write(f"import {package}", begun, now())
            for call in CALLS.get(name, ()):
                wrap(self._clock, module, call)

        spec.loader.exec_module = timed  # type: ignore[method-assign]
        return spec


def wrap(clock: Clock, module: ModuleType, path: str) -> None:
    """Puts a timed function in the place of a function of a module, or of a class of it."""
    *owners, last = path.split(".")
    owner: Any = module
    for each in owners:
        owner = getattr(owner, each)
    held = vars(owner)[last]
    function = held.__func__ if isinstance(held, classmethod | staticmethod) else held

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = now()
        try:
            return function(*args, **kwargs)
        finally:
            clock.write(f"{module.__name__}:{path}", begun, now())

    setattr(owner, last, type(held)(timed) if isinstance(held, classmethod | staticmethod) else timed)


def _process_begun() -> float:
    """When the kernel started this process, to a hundredth of a second."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


if "STARTUP_CLOCK" in os.environ:
    _clock = Clock(os.environ["STARTUP_CLOCK"])
    _clock.write("interpreter " + " ".join(sys.orig_argv[1:4]), _process_begun(), now())
    sys.meta_path.insert(0, Finder(_clock))
