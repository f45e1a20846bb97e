"""The picture of docs/PERFORMANCE.md, from the results beside it.

python -m benchmarks.chart docs/results docs/images/performance.png
"""

import json
from pathlib import Path
from typing import Any

import tyro

from benchmarks.throughput import OURS
from distmaml.pictures.style import BLUE, GREY, SILVER, new_figure, save

CONTENDERS = ("distmaml", "torchopt", "plain", "higher", "vmap")
ON_GPU = ("distmaml", "vmap", "plain")


def main(results: tyro.conf.Positional[Path], picture: tyro.conf.Positional[Path]) -> None:
    """Draw."""
    on_cpu = json.loads((results / "throughput.json").read_text())
    on_gpu = json.loads((results / "gpu-speed.json").read_text())
    figure, (cpu, gpu) = new_figure("Tasks a second: W(5), second-order MAML", num_panels=2)
    rates = {
        row["contender"]: row["tasks_per_second"]
        for contender in CONTENDERS
        for row in on_cpu["measured"]["5"]
        if (row["contender"], row["arrangement"]) == (contender, OURS.arrangement)
    }
    _bars(cpu, rates, f"{on_cpu['machine']['cores']} cores, a process on each")
    _bars(
        gpu,
        {
            f"{row['contender']}\n{row['precision']}": row["tasks_per_second"]
            for contender in ON_GPU
            for row in on_gpu["rows"]
            if (row["contender"], row["num_inner_steps"]) == (contender, 5) and row["precision"] in ("float32", "tf32")
        },
        on_gpu["machine"]["gpu"],
    )
    save(figure, picture)


def _bars(axes: Any, rates: dict[str, float], title: str) -> None:
    colors = [BLUE if name.startswith("distmaml") else SILVER for name in rates]
    bars = axes.bar(list(rates), list(rates.values()), color=colors, edgecolor=GREY)
    axes.bar_label(bars, labels=[f"{rate:,.3g}" if rate < 100 else f"{rate:,.0f}" for rate in rates.values()])
    axes.set_title(title, fontsize=11)
    axes.set_ylabel("tasks a second")
    axes.tick_params(axis="x", labelsize=8.5)


if __name__ == "__main__":
    tyro.cli(main)
