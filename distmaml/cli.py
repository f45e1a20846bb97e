"""The command line of the jobs: recipes, options by flat names, and errors as one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import tyro

from distmaml import paths
from distmaml.config import OPTIONS, Config, override
from distmaml.errors import ConfigError, DistmamlError, unknown
from distmaml.interrupt import STATUS
from distmaml.recipes import RECIPES


def parse_recipe(arguments: Sequence[str], *, prog: str, description: str | None) -> Config:
    """The configuration that ``RECIPE [options]`` names.

    ``--algorithm``, ``--model`` and ``--tasks`` are looked at first: they decide which other options there are.

    Raises:
      ConfigError: an unknown recipe, algorithm, model or task distribution.
    """
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
    default = override(RECIPES[name](), {k: v for k, v in vars(chosen).items() if v is not None})
    parsed: Config = tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)(Config),
        default=default,
        args=list(arguments[1:]),
        prog=f"{prog} {name}",
        description=RECIPES[name].__doc__,
    )
    return parsed


def guarded(main: Callable[[], int | None]) -> int | None:
    """Runs a job; an error raised on purpose is one line and status 2, a stop by a signal status 130."""
    try:
        return main()
    except DistmamlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; go on from the last checkpoint, if there is one, with --resume", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # All is in order by now, and Python's own end, with torch, ray and mlflow loaded, takes seconds more.
        os._exit(STATUS)


def how_to_compare(config: Config, view: str) -> list[str]:
    """What opens the MLflow UI on the runs of this experiment: a link, and the command that it needs first.

    Args:
      view: the path of the page, behind a server's address.
    """
    server = config.run.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if server:
        return [server.rstrip("/") + view]
    return [f"DISTMAML_HOME={paths.output_dir(config.run.output_dir)} make ui", f"http://127.0.0.1:5000{view}"]
