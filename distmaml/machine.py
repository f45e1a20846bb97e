"""On what a figure was computed."""

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def machine_of(device: torch.device) -> dict[str, Any]:
    """Processor and number of its cores, the GPU if `device` is one, and the versions of Python and torch."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "processor": processor(), "cores": os.cpu_count(), "gpu": gpu,
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def processor() -> str:
    """The model of the processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
