"""Tasks a second and memory of the meta-gradient, beside other libraries and beside what the processor can, in one run.

    pip install -e '.[bench]' -c constraints.txt
    python -m benchmarks.throughput --output FILE
    python -m benchmarks.throughput --short --check docs/results/throughput.json

The workload and the contenders are those of `benchmarks.peers`. Before anything is timed, all must find one gradient.
Each contender is measured in up to three arrangements, each in processes of its own that live through the run:

    users     as its users run it: one process with as many threads as torch takes; distmaml: as `workers`
    workers   a process of one thread on every core, all at once, in the environment of distmaml's workers; rates added
    single    one of these alone

A round measures each once, one after the other, on new tasks; each round begins with another. The first is a warm-up.
A ratio is that of distmaml's workers to a peer's arrangement, the median over the rounds of the ratio within a round;
the lower of those to `users` and `workers` is what counts. The limit is what the same arrangement multiplies matrices
at, in the same rounds, divided by the FLOPs of a task; what is no convolution costs time, but counts as none.

A short run measures `workers` alone. Those ratios are what a check compares, as times are of one machine and one day.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import tyro

from benchmarks import machine
from benchmarks.peers import INNER_LR, PACKAGES, PEERS, Workload, agree, missing
from benchmarks.processes import MATMUL, MATMUL_FLOPS, Measured, Process
from distmaml.launch import WORKER_ENVIRONMENT

LARGEST_FALL = 0.15
"""Of a ratio, below that of the file that is checked against."""
Ratios: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Number of inner steps -> peer -> its arrangement -> distmaml's rate over the peer's."""


class Case(NamedTuple):
    """What is measured at a time."""

    contender: str
    arrangement: str


class Series(NamedTuple):
    """What a case gave: a value for each round."""

    rates: list[float]
    """Tasks a second, of the processes together; products of matrices a second."""
    peak_bytes: list[int]
    """Of the process that took most."""


OURS = Case("distmaml", "workers")


def cases(peers: tuple[str, ...], *, short: bool) -> list[Case]:
    """All that a round measures."""
    arrangements = ("workers",) if short else ("users", "workers", "single")
    everything = [Case(contender, a) for contender in ("distmaml", *peers, MATMUL) for a in arrangements]
    return [case for case in everything if case != Case("distmaml", "users")]


def measure(workload: Workload, measured: list[Case], *, rounds: int, num_workers: int) -> dict[Case, Series]:
    """Rounds of all cases."""
    series = {case: Series([], []) for case in measured}
    seeds = iter(range(10**9))
    with ExitStack() as stack:
        teams: dict[Case, list[Process]] = {}
        for case in measured:
            size, environment = (1, {}) if case.arrangement == "users" else (num_workers, WORKER_ENVIRONMENT)
            if case.arrangement == "single":
                teams[case] = teams[case._replace(arrangement="workers")][:1]
            else:
                started = [Process(case.contender, workload, environment) for _ in range(size)]
                teams[case] = [stack.enter_context(closing(process)) for process in started]
        for number in range(rounds + 1):
            first = number % len(measured)
            for case in (*measured[first:], *measured[:first]):
                found = _together(teams[case], seeds)
                tasks = 1 if case.contender == MATMUL else workload.num_tasks
                if number:
                    series[case].rates.append(sum(tasks / one.seconds for one in found))
                    series[case].peak_bytes.append(max(one.peak_bytes for one in found))
    return series


def _together(team: list[Process], seeds: Iterator[int]) -> list[Measured]:
    for process in team:
        process.prepare(next(seeds))
    for process in team:
        process.prepared()
    for process in team:
        process.go()
    return [process.measured() for process in team]


def table(workload: Workload, series: Mapping[Case, Series], num_workers: int) -> list[dict[str, Any]]:
    """What came of each case, beside the limit of its arrangement."""
    rows = []
    for case, (rates, peaks) in series.items():
        if case.contender != MATMUL:
            products = statistics.median(series[Case(MATMUL, case.arrangement)].rates)
            median, limit = statistics.median(rates), products * MATMUL_FLOPS / workload.task_flops
            rows.append({
                "contender": case.contender, "arrangement": case.arrangement,
                "processes": num_workers if case.arrangement == "workers" else 1, "tasks_per_second": median,
                "limit": limit, "share_of_limit": median / limit, "peak_bytes_of_a_process": max(peaks),
                "tasks_per_second_each_round": rates,
            })  # fmt: skip
    return rows


def ratios_of(series: Mapping[Case, Series], peer: str) -> dict[str, float]:
    """The rate of distmaml's workers over that of each of a peer's arrangements on all cores."""
    return {
        case.arrangement: statistics.median(a / b for a, b in zip(series[OURS].rates, theirs.rates, strict=True))
        for case, theirs in series.items()
        if case.contender == peer and case.arrangement != "single"
    }


def falls(found: Ratios, recorded: Ratios) -> list[str]:
    """The ratios, in words, that are more than `LARGEST_FALL` below the recorded ones; those of both are compared."""
    pairs = [
        (steps, peer, found[steps][peer]["workers"], before["workers"])
        for steps, peers in recorded.items()
        for peer, before in peers.items()
        if peer in found.get(steps, {})
    ]
    return [f"{now:.2f} times {peer} at K={steps}, and it was {before:.2f}" for steps, peer, now, before in pairs
            if now < (1 - LARGEST_FALL) * before]  # fmt: skip


def compare(result: Mapping[str, Any], recorded: Mapping[str, Any], name: str) -> None:
    """Says whether distmaml keeps its lead of an earlier result.

    Raises:
      SystemExit: it does not.
    """
    then, now = recorded["machine"], result["machine"]
    if (then["processor"], then["cores"]) != (now["processor"], now["cores"]):
        _write(f"{name} is of another machine, {then['processor']} with {then['cores']} cores: its ratios may differ.")
    if fallen := falls(result["ratios"], recorded["ratios"]):
        raise SystemExit(f"distmaml has fallen by more than {LARGEST_FALL:.0%} since {name}: {'; '.join(fallen)}.")
    _write(f"no ratio is more than {LARGEST_FALL:.0%} below that of {name}")


def main(
    num_inner_steps: tuple[int, ...] = (1, 5),
    num_tasks: int = 16,
    rounds: int | None = None,
    short: Annotated[bool, tyro.conf.arg(help="5 rounds instead of 9, of the workers alone")] = False,
    check: Annotated[Path | None, tyro.conf.arg(help="an earlier result; fail where a ratio has fallen")] = None,
    output: Annotated[Path | None, tyro.conf.arg(help="JSON file for the result")] = None,
) -> None:
    """Measure and print."""
    recorded: dict[str, Any] | None = json.loads(check.read_text()) if check else None
    if recorded and recorded["num_tasks"] != num_tasks:
        raise SystemExit(f"{check} is of {recorded['num_tasks']} tasks at a time: --num-tasks {recorded['num_tasks']}.")
    rounds = rounds or (5 if short else 9)
    found_on, num_workers = machine.description(), machine.cores()
    _write(", ".join(f"{key} {value}" for key, value in found_on.items()))
    for hint in filter(None, map(missing, PEERS)):
        _write(hint)
    peers = tuple(peer for peer in PEERS if not missing(peer))
    result: dict[str, Any] = {
        "machine": found_on, "num_tasks": num_tasks, "inner_lr": INNER_LR, "rounds": rounds,
        "versions": {peer: metadata.version(peer) for peer in peers if peer in PACKAGES},
        "gradient_errors": {}, "measured": {}, "ratios": {},
    }  # fmt: skip
    for count in num_inner_steps:
        workload, steps = Workload(count, num_tasks), str(count)
        errors = agree(("distmaml", *peers), workload)
        series = measure(workload, cases(peers, short=short), rounds=rounds, num_workers=num_workers)
        rows, ratios = table(workload, series, num_workers), {peer: ratios_of(series, peer) for peer in peers}
        for name, part in (("gradient_errors", errors), ("measured", rows), ("ratios", ratios)):
            result[name][steps] = part
        _write(f"\nW({steps}): {workload.task_flops / 1e9:.2f} GFLOP a task, {num_tasks} tasks a process at a time, "
               f"medians of {rounds} rounds")  # fmt: skip
        _report(rows, errors, ratios)
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
    if recorded:
        compare(result, recorded, str(check))


def _report(
    rows: list[dict[str, Any]], errors: Mapping[str, dict[str, float]], ratios: Mapping[str, dict[str, float]]
) -> None:
    _write("contender  arrangement  processes  tasks/s  of the limit  peak MiB of a process")
    for row in rows:
        _write(f"{row['contender']:10s} {row['arrangement']:11s} {row['processes']:10d} {row['tasks_per_second']:8.1f} "
               f"{row['share_of_limit']:13.1%} {row['peak_bytes_of_a_process'] / 2**20:22.0f}")  # fmt: skip
    _write("relative error of the gradient in float64 and float32; distmaml's rate over the peer's")
    for contender, error in errors.items():
        line = f"{contender:10s} {error['float64']:7.0e} {error['float32']:7.0e}"
        if against := ratios.get(contender):
            better = min(against, key=against.__getitem__)
            line += f"   {against[better]:.2f} (its {better})"
            line += f", {against['users']:.2f} in the way its users run it" if "users" in against else ""
        _write(line)


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    tyro.cli(main)
