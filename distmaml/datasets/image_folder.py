"""Image folder: a user's own pictures, one folder a class, or mini-ImageNet's flat folder with CSV files.

::

    data_dir/cats/1.jpg ...        data_dir/images/n0153282900000005.jpg ...
    data_dir/dogs/1.jpg ...        data_dir/{train,val,test}.csv   with the columns filename,label

The CSV files are optional in the first form, where a column ``label`` is enough; they say which class belongs to which
split. The second is the form of Ravi and Larochelle (2017), Optimization as a model for few-shot learning,
https://openreview.net/forum?id=rJY0-Kcll.
"""

import csv
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from distmaml.datasets.images import check_file, check_folder, folders_in, pictures_in, read_image
from distmaml.errors import ConfigError, DataError
from distmaml.splits import SPLITS
from distmaml.store import StoreInfo, hash_order, write_store

MIN_SPLIT_CLASSES = 2
"""With fewer classes in a split there is nothing to tell apart, and the only scheme is by samples."""

_FLAT = "images"

_Splits = dict[str, dict[str, list[str]]]


def build(path: Path, *, data_dir: Path | None, image_size: int, color: bool, download_dir: Path) -> StoreInfo:
    """Writes the store of the pictures below `data_dir`, resized, in grey or RGB, with natural brightness.

    The scheme ``default`` is the one of the CSV files; without them 64/16/20 % of the classes in an order fixed by the
    sha256 of their names, if that gives each split two classes or more. Otherwise the store has no scheme of its own
    and is used with ``--split-by samples``.

    Raises:
      ConfigError: no `data_dir`.
      DataError: a folder that is missing or empty, a class without pictures, a broken picture, a CSV file that does
        not fit, a symbolic link to a folder or out of `data_dir`.
    """
    if data_dir is None:
        raise ConfigError("image_folder needs the folder of the pictures. Name it with --data-dir.")
    if not data_dir.is_dir():
        raise DataError(f"{data_dir} is not a folder. Name one that has one folder of pictures a class.")
    tables = _read_tables(data_dir)
    pictures = _pictures_of_tables(data_dir, tables) if tables else _pictures_of_folders(data_dir)
    splits = {"default": {split: list(table) for split, table in tables.items()}} if tables else _draw_splits(pictures)
    read = functools.partial(read_image, image_size=image_size, color=color, ink=False)

    def classes() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        # Threads are enough: Pillow decodes and resizes without the interpreter lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, paths in tqdm(pictures.items(), desc="image_folder", unit=" classes", disable=None):
                yield name, np.stack(list(pool.map(read, paths)))

    return write_store(
        path,
        name="image_folder",
        source=str(data_dir.absolute()),
        licence="not stated",
        image_shape=(3 if color else 1, image_size, image_size),
        ink=False,
        classes=classes(),
        splits=splits,
    )


def _draw_splits(class_names: Mapping[str, object]) -> _Splits:
    order = hash_order("distmaml-image-folder", class_names)
    num_val, num_test = round(0.16 * len(order)), round(0.2 * len(order))
    if min(num_val, num_test) < MIN_SPLIT_CLASSES:
        return {}
    num_train = len(order) - num_val - num_test
    held_out = num_train + num_val
    return {"default": {"train": order[:num_train], "val": order[num_train:held_out], "test": order[held_out:]}}


# ------------------------------------------------------------------------------------- folders a class


def _pictures_of_folders(data_dir: Path) -> dict[str, list[Path]]:
    folders = folders_in(data_dir)
    if len(folders) < 2:
        raise DataError(
            f"{data_dir} has {len(folders)} folders of pictures; put each of 2 or more classes into its own."
        )
    return {folder.name: pictures_in(folder, data_dir) for folder in folders}


# ------------------------------------------------------------------------------------------- CSV files


def _read_tables(data_dir: Path) -> dict[str, dict[str, list[str]]]:
    """For each split its labels, each with its filenames (none where the table has no such column); {} without CSV."""
    paths = {split: data_dir / f"{split}.csv" for split in SPLITS}
    missing = [path.name for path in paths.values() if not path.exists()]
    if len(missing) == len(paths):
        return {}
    if missing:
        raise DataError(
            f"{data_dir} has no {', '.join(missing)}; train.csv, val.csv and test.csv come together or not."
        )
    for path in paths.values():
        check_file(path, data_dir)
    return {split: _read_table(path) for split, path in paths.items()}


def _read_table(path: Path) -> dict[str, list[str]]:
    labels: dict[str, list[str]] = {}
    try:
        # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if "label" not in (rows.fieldnames or []):
                raise DataError(f"{path} has the columns {rows.fieldnames}; it needs `label`, and may have `filename`.")
            for row in rows:
                label, filename = row["label"], row.get("filename")
                label = label and os.path.normpath(label)  # cats/ and cats are one folder
                if not label or (filename is not None and not filename) or not _is_inside(label, filename or ""):
                    raise DataError(f"{path}, line {rows.line_num}: no usable label and filename in {row}. Mend it.")
                labels.setdefault(label, []).extend([filename] if filename else [])
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}. Save it as CSV in UTF-8.") from error
    if not labels:
        raise DataError(f"{path} names no class; each split needs at least one.")
    return labels


def _is_inside(*names: str) -> bool:
    """Whether each name stays below the folder that it is joined to."""
    return not any(Path(name).is_absolute() or ".." in Path(name).parts for name in names)


def _pictures_of_tables(data_dir: Path, tables: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, list[Path]]:
    pictures: dict[str, list[Path]] = {}
    labels: dict[Path, str] = {}
    flat = data_dir / _FLAT
    for split, table in tables.items():
        for label, filenames in table.items():
            if label in pictures:
                raise DataError(
                    f"class {label!r} in {split}.csv of {data_dir} is in another split, too. Remove it in one."
                )
            if not (flat.is_dir() and filenames):
                if not (data_dir / label).is_dir():
                    raise DataError(
                        f"{data_dir / label} is not there, but a CSV file names the class {label!r}. Add it or its "
                        "pictures."
                    )
                check_folder(data_dir / label, data_dir)
                pictures[label] = pictures_in(data_dir / label, data_dir)
                continue
            pictures[label] = [flat / filename for filename in sorted(set(filenames))]
            for folder in {path.parent for path in pictures[label]}:
                check_folder(folder, data_dir)
            for path in pictures[label]:
                if not path.is_file():
                    raise DataError(f"{path} is not there, but {split}.csv names it for the class {label!r}.")
                check_file(path, data_dir)
                if labels.setdefault(path, label) != label:
                    raise DataError(
                        f"{path} is named for the classes {labels[path]!r} and {label!r}. Remove it in one."
                    )
    return dict(sorted(pictures.items()))
