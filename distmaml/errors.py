"""The errors that distmaml raises on purpose.

Each message says three things in one line: what went wrong with the offending value, what is
allowed, and the way out. Jobs print the message without a traceback and exit with status 2;
any other exception is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class DistmamlError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(DistmamlError):
    """A name, an option or a combination of options that cannot work."""


class DataError(DistmamlError):
    """Raw files, a store or a split that cannot be used."""


class CheckpointError(DistmamlError):
    """A checkpoint or a model file that is damaged or belongs to something else."""


class DamagedError(CheckpointError):
    """A file that is not whole, or that distmaml did not write."""


class RunError(DistmamlError):
    """A run's folder, name or life: it exists already, it is missing, it cannot be written."""


class ClusterError(DistmamlError):
    """Ray: an address, a resource or a worker group that cannot be had."""


class DivergenceError(DistmamlError):
    """A loss or a gradient that is no longer finite."""


class TrackingError(DistmamlError):
    """The MLflow database or server cannot be used."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Message for a name that is not in a table, with the nearest one that is."""
    names = sorted(allowed)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
