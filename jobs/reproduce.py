"""Trains published experiments for a number of tasks, and writes what they come to beside what their papers print."""

import sys

import tyro

from distmaml import cli, comparison, reproduction
from distmaml.plans import Request


def main(request: Request) -> int:
    """Reproduces, or lists what there is; status 2 where a row could not be made."""
    if request.listing:
        print(reproduction.listing(request))
        return 0
    failed = reproduction.reproduce(request)
    for name in failed:
        print(f"failed   {name}")
    print(f"table    {request.table}")
    if comparison.picture_of(request.table).exists():
        print(f"picture  {comparison.picture_of(request.table)}")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(tyro.cli(Request, prog="jobs/reproduce.py", description=__doc__))))
