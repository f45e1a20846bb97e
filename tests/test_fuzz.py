"""Damaged and hostile files are read or refused, and the fuzzer would tell if they were not."""

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import strategies as st

from distmaml.errors import DataError
from tests import fuzz
from tests.fuzz_targets import TARGETS, Target

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parent.parent
INPUTS = 2_000


def fuzzed(*arguments: str) -> tuple[int, str]:
    """Exit status and output of the command that `make fuzz` is."""
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


def test_damaged_and_hostile_files_are_read_or_refused() -> None:
    status, output = fuzzed("--inputs", str(INPUTS))
    assert status == 0, output
    counts = dict(re.findall(r"^(\w+): (.*) refused, 0 findings$", output, re.MULTILINE))
    assert counts.keys() == TARGETS.keys()
    for name, count in counts.items():
        read, refused = (int(number) for number in count.split(" read, "))
        assert read > 0, f"{name} refuses all, so nothing behind its first check was tried"
        assert refused > 0, name
        assert read + refused >= 0.9 * INPUTS / len(counts), name


# ------------------------------------------------------------------------------- that it finds something


def _raises(path: Path) -> None:
    raise KeyError("step")


def _takes_memory(path: Path) -> None:
    taken = []
    while True:
        taken.append(bytes(1 << 26))


def _takes_memory_and_says_so(path: Path) -> None:
    try:
        _takes_memory(path)
    except MemoryError as error:
        raise DataError("it is damaged. Take another one.") from error


def _talks(path: Path) -> None:
    raise DataError("two\nlines")


def _ends_it(content: bytes) -> bool:
    return content[:1] in (b"\1", b"\2", b"\3")


def _aborts_at_times(path: Path) -> None:
    if _ends_it(path.read_bytes()):
        os.abort()


def _target(use: object) -> Target:
    return Target(lambda: st.binary(max_size=4), use)  # type: ignore[arg-type]


RAISES = _target(_raises)
TAKES_MEMORY = _target(_takes_memory)
TAKES_MEMORY_AND_SAYS_SO = _target(_takes_memory_and_says_so)
TALKS = _target(_talks)
HANGS = _target(lambda path: time.sleep(3600))
ABORTS = _target(lambda path: os.abort())
LEAVES = _target(lambda path: os._exit(0))
ABORTS_AT_TIMES = _target(_aborts_at_times)


ENDS = {
    "RAISES": r"KeyError at test_fuzz.py:\d+ _raises",
    "TAKES_MEMORY": "MemoryError",
    "TAKES_MEMORY_AND_SAYS_SO": "out of memory",
    "TALKS": "message of 2 lines",
    "HANGS": r"SIGALRM at .* more than 0\.5 s",
    "ABORTS": "SIGABRT",
    "LEAVES": "exit status 0",
}


def test_every_other_end_than_an_error_of_ours_is_a_finding() -> None:
    named = [argument for target in ENDS for argument in ("--target", f"tests.test_fuzz:{target}")]
    status, output = fuzzed(*named, "--one", "7", "--seconds", "0.5")
    assert status == 1
    for target, what in ENDS.items():
        assert re.search(rf"^tests\.test_fuzz:{target}: {what}", output, re.MULTILINE), output
        assert f"python -m tests.fuzz --target tests.test_fuzz:{target} --seed 0 --one 7\n" in output


def test_the_inputs_behind_one_that_ends_the_process_are_read_too() -> None:
    status, output = fuzzed("--target", "tests.test_fuzz:ABORTS_AT_TIMES", "--inputs", str(fuzz.BATCH))
    assert status == 1
    inputs = fuzz.drawn("tests.test_fuzz:ABORTS_AT_TIMES", 0, 0)
    ending = sum(map(_ends_it, inputs))
    assert 1 < ending < len(inputs)
    assert f": {len(inputs) - ending} read, 0 refused, {ending} findings\n" in output


def test_an_input_is_a_function_of_target_seed_and_number() -> None:
    targets = ["store", "model", "journal"]
    code = (
        "import hashlib\n"
        "from tests import fuzz\n"
        f"for target in {targets}: print(hashlib.sha256(repr(fuzz.drawn(target, 3, 1)).encode()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    here = [fuzz.drawn(target, 3, 1) for target in targets]
    assert there.stdout.split() == [hashlib.sha256(repr(contents).encode()).hexdigest() for contents in here]
    assert all(len({*contents}) == len(contents) > 0.9 * fuzz.BATCH for contents in here)
    assert fuzz.drawn("journal", 4, 1) not in here
