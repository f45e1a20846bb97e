"""What faults cost, as a table: the medians over some rounds of the fault suite.

for round in 1 2 3; do DISTMAML_FAULTS=FILE make test-faults; done
python -m benchmarks.faults FILE
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import tyro


def main(file: Annotated[Path, tyro.conf.Positional]) -> None:
    """Print a table of the faults that the suite has noted in a file."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in file.read_text().splitlines():
        record = json.loads(line)
        found[record["fault"]].append(record)
    sys.stdout.write("| fault | seconds | each round | target | outer steps repeated |\n|---|---|---|---|---|\n")
    for fault, records in found.items():
        seconds = [record["seconds"] for record in records]
        each, target = ", ".join(f"{value:.1f}" for value in seconds), records[0]["target"]
        repeated = f"{min(r['repeated'] for r in records)} to {max(r['repeated'] for r in records)}"
        sys.stdout.write(f"| {fault} | {statistics.median(seconds):.1f} | {each} | {target or ''} | {repeated} |\n")


if __name__ == "__main__":
    tyro.cli(main)
