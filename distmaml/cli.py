"""The command line of the jobs: recipes, options by flat names, and errors as one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from distmaml import paths
from distmaml.config import Config, misplaced, override, read
from distmaml.errors import ConfigError, DistmamlError, unknown
from distmaml.interrupt import EXIT_STATUS
from distmaml.options import OPTIONS
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
    """The configuration that ``RECIPE [options]`` or ``--recipe-file FILE [options]`` names.

    ``--algorithm``, ``--model`` and ``--tasks`` are looked at first: they decide which other options there are.

    Raises:
      ConfigError: an unknown recipe, algorithm, model or task distribution; a file that holds no configuration.
    """
    default, options = _named(arguments, prog=prog, description=description)
    parsed: Config = _parse(Config, default, options, f"{prog} {default.recipe}", default.recipe)
    return parsed


def parse_search(arguments: Sequence[str], *, prog: str, description: str | None) -> tuple[Config, Search]:
    """Like `parse_recipe`, with the options of a search among the others; or ``--resume NAME [options]``."""
    space: tuple[str, ...] = ()
    if arguments and arguments[0] == "--resume":
        default, options = _interrupted(arguments), arguments[2:]
        # What is given takes the place of what was, and is not added to it.
        space, default = default.search.space, replace(default, search=replace(default.search, space=()))
    else:
        config, options = _named(arguments, prog=prog, description=description, also=("--resume NAME [options]",))
        default = _Tuning(Search(), config)
    recipe = default.config.recipe
    parsed: _Tuning = _parse(_Tuning, default, options, f"{prog} {recipe}", recipe)
    return parsed.config, replace(parsed.search, space=parsed.search.space or space)


def _interrupted(arguments: Sequence[str]) -> _Tuning:
    from distmaml.study import settings_of  # which takes a second to import, and --help does not need it

    if len(arguments) < 2:
        raise ConfigError("--resume needs the name of the search to go on with.")
    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where.add_argument("--output-dir", type=Path)
    output_dir = where.parse_known_args(arguments[2:])[0].output_dir
    config, search = settings_of(arguments[1], output_dir)
    return _Tuning(search, override(config, {"resume": True, "output_dir": paths.output_dir(output_dir)}))


def _named(
    arguments: Sequence[str], *, prog: str, description: str | None, also: Sequence[str] = ()
) -> tuple[Config, Sequence[str]]:
    """The configuration that the first words name, and the options behind them."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, RECIPES)) + 2
        lines = {name: (recipe.__doc__ or "").splitlines()[0] for name, recipe in RECIPES.items()}
        listed = "\n".join(f"  {name:{width}s}{line}" for name, line in lines.items())
        forms = "\n       ".join(
            f"{prog} {form}" for form in ("RECIPE [options]", "--recipe-file FILE [options]", *also)
        )
        print(f"usage: {forms}\n\n{description}\n")
        print(f"recipes:\n{listed}\n\n{prog} RECIPE --help lists its options.")
        raise SystemExit(0)
    if arguments[0] == "--recipe-file":
        if len(arguments) < 2:
            raise ConfigError("--recipe-file needs a file, as a search leaves one: champion.json.")
        config, options = read(Path(arguments[1])), arguments[2:]
    elif arguments[0] in RECIPES:
        config, options = RECIPES[arguments[0]](), arguments[1:]
    else:
        raise ConfigError(unknown("recipe", arguments[0], RECIPES))
    selectors = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for selector in OPTIONS:
        selectors.add_argument(f"--{selector}")
    chosen, _ = selectors.parse_known_args(options)
    config = override(config, {k: v for k, v in vars(chosen).items() if v is not None})
    _check_algorithm_options(config, options)
    return config, options


def _check_algorithm_options(config: Config, options: Sequence[str]) -> None:
    """Refuses an option of another algorithm, with those that this one has."""
    for word in options:
        name = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        said = misplaced(config, name, lambda field: f"--{field.replace('_', '-')}")
        if word.startswith("--") and said:
            raise ConfigError(f"{word} {said}")


def _parse(kind: type, default: Any, options: Sequence[str], prog: str, recipe: str) -> Any:
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)
    return tyro.cli(
        tyro.conf.configure(*markers)(kind),
        default=default,
        args=list(options),
        prog=prog,
        description=RECIPES[recipe].__doc__ if recipe in RECIPES else None,
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
