"""Distributed MAML meta-training: a distribution of tasks in, a model that adapts from a handful of examples out.

The public names, imported when they are first used: ``import distmaml`` alone loads neither torch nor ray.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distmaml.adapter import AdaptedModel, FewShotModel, load
    from distmaml.algorithms import Algorithm, Stateful
    from distmaml.algorithms.anil import anil
    from distmaml.algorithms.boil import boil
    from distmaml.algorithms.cavia import cavia
    from distmaml.algorithms.fine_tuning import fine_tuning
    from distmaml.algorithms.imaml import imaml
    from distmaml.algorithms.maml import fomaml, maml
    from distmaml.algorithms.maml_plus_plus import maml_plus_plus
    from distmaml.algorithms.meta_curvature import meta_curvature
    from distmaml.algorithms.meta_lstm import meta_lstm
    from distmaml.algorithms.meta_sgd import meta_sgd
    from distmaml.algorithms.metric import matching_networks, prototypical_networks
    from distmaml.algorithms.proto_maml import proto_maml
    from distmaml.algorithms.reptile import reptile
    from distmaml.config import Config, override
    from distmaml.episodes import Batch, Episode, TaskBatch, TaskDistribution
    from distmaml.errors import DistmamlError
    from distmaml.limits import check
    from distmaml.loop import evaluate, train
    from distmaml.objectives import Moment, Objective, classification, initial_params, objective, regression
    from distmaml.outer import meta_gradient
    from distmaml.recipes import RECIPES
    from distmaml.scoring import interval, score
    from distmaml.store import open_store, write_store
    from distmaml.worker import LocalWorker, Worker

    __version__: str

_MODULES: dict[str, tuple[str, ...]] = {
    "adapter": ("AdaptedModel", "FewShotModel", "load"),
    "algorithms": ("Algorithm", "Stateful"),
    "algorithms.anil": ("anil",),
    "algorithms.boil": ("boil",),
    "algorithms.cavia": ("cavia",),
    "algorithms.fine_tuning": ("fine_tuning",),
    "algorithms.imaml": ("imaml",),
    "algorithms.maml": ("fomaml", "maml"),
    "algorithms.maml_plus_plus": ("maml_plus_plus",),
    "algorithms.meta_curvature": ("meta_curvature",),
    "algorithms.meta_lstm": ("meta_lstm",),
    "algorithms.meta_sgd": ("meta_sgd",),
    "algorithms.metric": ("matching_networks", "prototypical_networks"),
    "algorithms.proto_maml": ("proto_maml",),
    "algorithms.reptile": ("reptile",),
    "config": ("Config", "override"),
    "episodes": ("Batch", "Episode", "TaskBatch", "TaskDistribution"),
    "errors": ("DistmamlError",),
    "limits": ("check",),
    "loop": ("evaluate", "train"),
    "objectives": ("Moment", "Objective", "classification", "initial_params", "objective", "regression"),
    "outer": ("meta_gradient",),
    "recipes": ("RECIPES",),
    "scoring": ("interval", "score"),
    "store": ("open_store", "write_store"),
    "worker": ("LocalWorker", "Worker"),
}
"""Module -> its public names."""
_HOMES: dict[str, str] = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [  # noqa: RUF022 (in the order of the modules)
    "AdaptedModel", "FewShotModel", "load", "Algorithm", "Stateful", "anil", "boil", "cavia", "fine_tuning", "imaml",
    "fomaml", "maml", "maml_plus_plus", "meta_curvature", "meta_lstm", "meta_sgd", "matching_networks",
    "prototypical_networks", "proto_maml", "reptile", "Config", "override", "Batch", "Episode", "TaskBatch",
    "TaskDistribution", "DistmamlError", "check", "evaluate", "train", "Moment",
    "Objective", "classification", "initial_params", "objective", "regression", "meta_gradient", "RECIPES",
    "interval", "score", "open_store", "write_store", "LocalWorker", "Worker", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("distmaml")
    if name not in _HOMES:
        raise AttributeError(f"module 'distmaml' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"distmaml.{_HOMES[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
