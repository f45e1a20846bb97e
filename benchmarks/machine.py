"""On what a number was measured: beside it in every JSON file."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from distmaml.machine import processor

ROOT = Path(__file__).parent.parent


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def description() -> dict[str, str | int]:
    """Processor, cores, versions, commit and date. A commit with "-dirty" has changes that are in no commit."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    return {
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": described.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
