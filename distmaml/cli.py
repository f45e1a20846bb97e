"""The command line of the jobs: recipes, options by flat names, and errors as one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from distmaml.config import OPTIONS, Config, override
from distmaml.errors import ConfigError, DistmamlError, unknown
from distmaml.interrupt import EXIT_STATUS
from distmaml.recipes import RECIPES
from distmaml.space import Search


@dataclass(frozen=True)
class _Tuning:
    """The options of a search beside those of its trials."""

    search: Search
    """How to go about it."""
    config: Config
    """What all trials have in common."""


def parse_recipe(arguments: Sequence[str], *, prog: str, description: str | None) -> Config:
    """The configuration that ``RECIPE [options]`` names.

    ``--algorithm``, ``--model`` and ``--tasks`` are looked at first: they decide which other options there are.

    Raises:
      ConfigError: an unknown recipe, algorithm, model or task distribution.
    """
    default = _default(arguments, prog=prog, description=description)
    parsed: Config = _parse(Config, default, arguments, prog)
    return parsed


def parse_search(arguments: Sequence[str], *, prog: str, description: str | None) -> tuple[Config, Search]:
    """What ``RECIPE [options]`` or ``--resume NAME [options]`` names, options of a search among them."""
    if arguments[:1] == ["--resume"] and len(arguments) > 1:
        default = _interrupted(arguments)
    else:
        default = _Tuning(Search(), _default(arguments, prog=prog, description=description))
    words = [default.config.recipe, *arguments[2:]] if default.config.run.resume else arguments
    parsed: _Tuning = _parse(_Tuning, default, words, prog)
    return parsed.config, parsed.search


def _interrupted(arguments: Sequence[str]) -> _Tuning:
    from distmaml.study import settings_of  # which takes a second to import, and --help does not need it

    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where.add_argument("--output-dir", type=Path)
    config, search = settings_of(arguments[1], where.parse_known_args(arguments[2:])[0].output_dir)
    return _Tuning(search, override(config, {"resume": True}))


def _default(arguments: Sequence[str], *, prog: str, description: str | None) -> Config:
    if not arguments or arguments[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:24s}{(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items())
        print(f"usage: {prog} RECIPE [options]\n\n{description}\n\nrecipes:\n{listed}")
        print(f"\n{prog} RECIPE --help lists its options.")
        raise SystemExit(0)
    name = arguments[0]
    if name not in RECIPES:
        raise ConfigError(unknown("recipe", name, RECIPES))
    selectors = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for selector in OPTIONS:
        selectors.add_argument(f"--{selector}")
    chosen, _ = selectors.parse_known_args(arguments[1:])
    return override(RECIPES[name](), {k: v for k, v in vars(chosen).items() if v is not None})


def _parse(kind: type, default: Any, arguments: Sequence[str], prog: str) -> Any:
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)
    return tyro.cli(
        tyro.conf.configure(*markers)(kind),
        default=default,
        args=list(arguments[1:]),
        prog=f"{prog} {arguments[0]}",
        description=RECIPES[arguments[0]].__doc__ if arguments[0] in RECIPES else None,
    )


def guarded(main: Callable[[], int | None]) -> int | None:
    """Runs a job; an error raised on purpose is one line and status 2, a stop by a signal status 130."""
    try:
        return main()
    except DistmamlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # All is in order by now, and Python's own end, with torch, ray and mlflow loaded, takes seconds more.
        os._exit(EXIT_STATUS)


def compare(lines: Sequence[str]) -> str:
    """How to open the MLflow page that compares runs, to print."""
    return "\n".join(f"{'compare' if number == 0 else '':9s} {line}" for number, line in enumerate(lines))
