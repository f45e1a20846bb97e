"""Raw files -> class store. A data set is one file with a `build` function and one line in the table DATASETS."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from distmaml.datasets import glyphs, image_folder, omniglot
from distmaml.errors import ConfigError, DataError, unknown
from distmaml.files import disk_errors
from distmaml.store import StoreInfo

MAX_IMAGE_SIZE = 1024


class Builder(Protocol):
    """Writes the store of a data set at `path`; its errors are ConfigError and DataError."""

    def __call__(
        self, path: Path, *, data_dir: Path | None, image_size: int, color: bool, download_dir: Path
    ) -> StoreInfo:
        """Writes images of [3 if color else 1, image_size, image_size]; `download_dir` keeps what it downloads."""
        ...


DATASETS: dict[str, Builder] = {
    "glyphs": glyphs.build,
    "omniglot": omniglot.build,
    "image_folder": image_folder.build,
}

_FIXED_CONTENT = ("glyphs", "omniglot")
"""Data sets whose images do not depend on what lies in data_dir."""


def ensure_store(
    dataset: str,
    *,
    data_dir: Path | None,
    image_size: int,
    color: bool,
    stores_dir: Path,
    builder: Builder | None = None,
    rebuild: bool = False,
) -> Path:
    """The path of a data set's store, which is built when it is missing, by one process at a time.

    Pictures of one's own make a new store when `data_dir` or a name, size or time in it changes.

    Args:
      dataset: a name in DATASETS, or any name of a `builder`.
      stores_dir: folder of the stores; downloads go to ``downloads`` beside it.
      builder: builds the data set instead of the table's entry.
      rebuild: build even if the store is there.

    Raises:
      ConfigError: an unknown data set, or options that it does not have.
      DataError: raw files that cannot be used.
      RunError: a folder that cannot be written.
    """
    if builder is None:
        if dataset not in DATASETS:
            raise ConfigError(
                f"{unknown('dataset', dataset, DATASETS)} A ready store's path or URI ends in .arrow; your own data "
                "set is named package.module:attribute."
            )
        builder = DATASETS[dataset]
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise ConfigError(f"image_size={image_size} must lie in [1, {MAX_IMAGE_SIZE}].")
    inside = data_dir is not None and data_dir.resolve() in stores_dir.resolve().parents
    if inside and dataset not in _FIXED_CONTENT:
        raise ConfigError(
            f"the output folder {stores_dir.parent} lies in the data folder {data_dir} and would be read as a class. "
            "Name another --output-dir."
        )
    path = stores_dir / _file_name(dataset, data_dir, image_size, color)
    if path.exists() and not rebuild:
        return path
    with disk_errors(path):
        stores_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    try:
        if rebuild or not path.exists():
            download_dir = stores_dir.parent / "downloads"
            part = path.with_name(f".{path.name}.part")  # a builder of one's own need not be as careful as write_store
            try:
                builder(part, data_dir=data_dir, image_size=image_size, color=color, download_dir=download_dir)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    finally:
        lock.release()
    return path


def _file_name(dataset: str, data_dir: Path | None, image_size: int, color: bool) -> str:
    words = [dataset.replace(":", "."), str(image_size)]
    if color:
        words.append("rgb")
    if data_dir is not None and dataset not in _FIXED_CONTENT:
        digest = hashlib.sha256(os.fsencode(data_dir.absolute()))
        for line in _listing(data_dir):
            digest.update(os.fsencode(line))
        words.append(digest.hexdigest()[:12])
    return "-".join(words) + ".arrow"


def _listing(folder: Path) -> Iterator[str]:
    """Name, size and time of the last change of every file below a folder, in a fixed order.

    A link to a folder is one line: it may lead back to where it lies.
    """
    try:
        with os.scandir(folder) as scan:
            entries = sorted((e for e in scan if not e.name.startswith(".")), key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield f"{entry.name}/\n"
                yield from _listing(Path(entry.path))
            else:
                status = entry.stat()
                yield f"{entry.name}\0{status.st_size}\0{status.st_mtime_ns}\n"
    except OSError as error:
        raise DataError(
            f"cannot list {error.filename or folder}: {error.strerror or error}. Check --data-dir."
        ) from error
