"""Files that are there as a whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from distmaml.errors import RunError, first_line


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends, and vanishes when the block fails.

    After a crash or a power cut at any moment `path` has its old content or its new one. Not `tempfile`, whose files
    nobody else could read: stores and checkpoints are shared.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # otherwise a power cut can undo the rename
    finally:
        os.close(folder)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of writing `path` into a RunError with the way out."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Make room or choose another folder with --output-dir."
        ) from error


def absolute(path: Path) -> Path:
    """The path from the root on, with ``~`` and ``~user`` spelled out.

    Raises:
      RunError: there is no such user.
    """
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise RunError(f"{path}: {first_line(error)}. Write the folder out.") from None


def write_text(path: Path, text: str) -> None:
    """Replaces a text file as a whole.

    Raises:
      RunError: a full disk, a folder that cannot be written.
    """
    with disk_errors(path), atomic_file(path) as file:
        file.write(text.encode(errors="surrogateescape"))  # the name of a file need not be Unicode
