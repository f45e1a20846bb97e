"""Files of another machine: one copy on this one."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs
from filelock import FileLock

from distmaml.errors import DataError, first_line
from distmaml.files import atomic_file, disk_errors


def local_copy(uri: str) -> Path:
    """This machine's copy of a remote file, fetched once for all its processes, and again when the file changes.

    It lies in $XDG_CACHE_HOME/distmaml, else ~/.cache/distmaml, under a name made of the URI, the size and the time of
    the last change.

    Args:
      uri: of any Arrow file system: s3://, gs://, and file:// for a network mount.

    Raises:
      DataError: nothing is there, or it cannot be read.
      RunError: the cache cannot be written.
    """
    with _remote_errors(uri):
        filesystem, remote_path = pa.fs.FileSystem.from_uri(uri)
        remote = filesystem.get_file_info(remote_path)
    if remote.type != pa.fs.FileType.File:
        raise DataError(f"no store at {_without_secrets(uri)}. Build it with jobs/build_store.py and copy it there.")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distmaml"
    identity = hashlib.sha256(f"{uri} {remote.size} {remote.mtime_ns}".encode()).hexdigest()[:20]
    path = folder / f"{identity}.arrow"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                with atomic_file(path) as file:
                    for block in _remote_blocks(uri, filesystem, remote_path):
                        file.write(block)
                    if file.tell() != remote.size:
                        raise DataError(
                            f"{_without_secrets(uri)} changed while it was copied: {file.tell()} bytes came of "
                            f"{remote.size}. Try again."
                        )
    return path


def _remote_blocks(uri: str, filesystem: Any, remote_path: str) -> Iterator[bytes]:
    with _remote_errors(uri), filesystem.open_input_stream(remote_path) as stream:
        while block := stream.read(1 << 20):
            yield block


@contextlib.contextmanager
def _remote_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        shown = _without_secrets(uri)
        reason = first_line(error).replace(uri, shown)
        raise DataError(f"cannot read {shown}: {reason}. Check the address and the credentials.") from error


def _without_secrets(uri: str) -> str:
    """The URI without user, password and query: those of s3:// hold keys, and messages are logged."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
