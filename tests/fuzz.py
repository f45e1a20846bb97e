"""Damaged and hostile files before every reader: nothing but a DistmamlError in one line may come of them.

    python -m tests.fuzz [--inputs 100000] [--seed 0] [--target store] [--one 1234] [--seconds 20]

An input is a function of (target, seed, number), so the command that a finding ends with repeats it. Inputs are read
in child processes with a limit of memory and of time: a child that a signal ends, native code included, is a finding
like an exception of another kind, and the rest goes on without it.
"""

import argparse
import faulthandler
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import hypothesis
import torch
from hypothesis.internal import constants_ast
from hypothesis.internal.conjecture import providers

from distmaml.errors import DistmamlError
from tests.fuzz_targets import TARGETS, Target

BATCH = 250
"""Inputs that are drawn together."""
MEMORY = 1 << 30
"""Bytes of address space that a child may take beside what it begins with. No input has more than some kilobytes."""
LONGEST_MESSAGE = 2000


class Finding(NamedTuple):
    """An input that did something else than to be read or to be refused."""

    target: str
    number: int
    what: str
    """KeyError, SIGABRT, ..."""
    where: str
    """The innermost line of distmaml."""
    message: str


class Outcome(NamedTuple):
    """What came of the inputs of a target."""

    read: int
    """Files that were read, as what was wrong with them does no harm."""
    refused: int
    """Files that were answered with a DistmamlError."""
    findings: list[Finding]


# -------------------------------------------------------------------------------------------- one child


def _find(name: str) -> Target:
    if name in TARGETS:
        return TARGETS[name]
    module, _, attribute = name.partition(":")
    target: Target = getattr(importlib.import_module(module), attribute)
    return target


def drawn(name: str, seed: int, batch: int) -> list[bytes]:
    """The inputs of a batch, no two alike. They are drawn before any is read, so readers have no influence on them."""
    contents: dict[bytes, None] = {}
    digest = hashlib.sha256(f"{name} {seed} {batch}".encode()).digest()

    @hypothesis.seed(int.from_bytes(digest[:8], "big"))
    @hypothesis.settings(
        max_examples=2 * BATCH,  # many come twice
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(_find(name).inputs())
    def keep(content: bytes) -> None:
        contents[content] = None

    # hypothesis also draws constants out of the source of the project, and an input would change with what it tests.
    with mock.patch.object(providers, "_get_local_constants", constants_ast.Constants):
        keep()
    return list(contents)[:BATCH]


def _read_alone(name: str, number: int, content: bytes, folder: Path) -> str | Finding:
    """What comes of one input, as a file of its own: what is mapped must not change below its reader."""
    path = folder / str(number) / "00000003.safetensors"
    path.parent.mkdir()
    path.write_bytes(content)
    try:
        _find(name).use(path)
    except DistmamlError as error:
        message = str(error)
        if _is_of_memory(error):
            return _finding(name, number, error, "out of memory")
        if len(message.splitlines()) != 1 or len(message) > LONGEST_MESSAGE:
            return _finding(name, number, error, f"message of {len(message.splitlines())} lines, {len(message)} long")
        return "refused"
    except Exception as error:
        return _finding(name, number, error, type(error).__name__)
    finally:
        shutil.rmtree(path.parent)
    return "read"


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether an error comes of memory that was not there: the limit of a child stands for that of a machine."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _finding(name: str, number: int, error: BaseException, what: str) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "distmaml" in Path(frame.filename).parts]
    last = (own or frames)[-1]
    return Finding(name, number, what, f"{Path(last.filename).name}:{last.lineno} {last.name}", str(error)[:200])


def _child(name: str, seed: int, numbers: range, seconds: float, pipe: int) -> None:
    """Reads inputs of one batch, and says in the pipe which it is at and what came of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    contents = drawn(name, seed, numbers.start // BATCH)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process whatever it does
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, os.fdopen(pipe, "w") as file:
        for number in numbers:
            if number % BATCH >= len(contents):  # hypothesis found no more
                break
            print(json.dumps({"at": number}), file=file, flush=True)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            came = _read_alone(name, number, contents[number % BATCH], Path(folder))
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps({"came": came}), file=file, flush=True)


# ------------------------------------------------------------------------------------------- the parent


def fuzz(name: str, seed: int, numbers: range, seconds: float) -> Outcome:
    """Reads the inputs with these numbers, a batch in a child, and goes on behind one that ends its child."""
    outcome = Outcome(0, 0, [])
    start = numbers.start
    while start < numbers.stop:
        stop = min(numbers.stop, (start // BATCH + 1) * BATCH)
        unfinished, came, status = _in_child(name, seed, range(start, stop), seconds)
        outcome = outcome._replace(
            read=outcome.read + came.count("read"), refused=outcome.refused + came.count("refused")
        )
        outcome.findings.extend(Finding(*entry) for entry in came if not isinstance(entry, str))
        if unfinished is None:
            if status != 0:
                raise RuntimeError(f"the inputs {start} to {stop} of {name} cannot be drawn: see above.")
            start = stop
            continue
        what = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        said = f"more than {seconds:g} s" if what == "SIGALRM" else "the process ended"
        outcome.findings.append(Finding(name, unfinished, what, "the stack above", said))
        start = unfinished + 1
    return outcome


def _in_child(name: str, seed: int, numbers: range, seconds: float) -> tuple[int | None, list[Any], int]:
    """The input that a child ended in, what came of those before, and its exit status: less than 0 is a signal."""
    incoming, outgoing = os.pipe()
    child = os.fork()  # a child of this process has all modules already
    if child == 0:
        status = 70
        try:
            os.close(incoming)
            _child(name, seed, numbers, seconds, outgoing)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(outgoing)
    unfinished, came = None, []
    with os.fdopen(incoming) as file:
        for line in file:
            said = json.loads(line)
            unfinished = said.get("at")
            if "came" in said:
                came.append(said["came"])
    _, waited = os.waitpid(child, 0)
    return unfinished, came, os.waitstatus_to_exitcode(waited)


def report(findings: list[Finding], seed: int) -> Iterator[str]:
    """A line for each kind of finding, and one for the command that repeats the first of it."""
    kinds: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        kinds[finding.target, finding.what, finding.where].append(finding)
    for (target, what, where), alike in kinds.items():
        yield f"{target}: {what} at {where}, {len(alike)} of the inputs: {' '.join(alike[0].message.split())}"
        yield f"  python -m tests.fuzz --target {target} --seed {seed} --one {alike[0].number}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs over all targets")
    parser.add_argument("--seed", type=int, default=0)
    choices = f"{', '.join(TARGETS)}, or package.module:attribute"
    parser.add_argument("--target", action="append", help=f"{choices}; once or several times; all by default")
    parser.add_argument("--one", type=int, help="the number of the only input to read")
    parser.add_argument("--seconds", type=float, default=20.0, help="for one input, on a machine that has other work")
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    numbers = range(-(-options.inputs // len(names))) if options.one is None else range(options.one, options.one + 1)
    findings: list[Finding] = []
    for name in names:
        found = fuzz(name, options.seed, numbers, options.seconds)
        print(f"{name}: {found.read} read, {found.refused} refused, {len(found.findings)} findings", flush=True)  # noqa: T201
        findings += found.findings
    for line in report(findings, options.seed):
        print(line)  # noqa: T201
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
