"""A class store: labelled uint8 images in one Arrow file, written once and then memory-mapped.

All images are one contiguous piece of the file that numpy views without a copy; every process of a machine shares its
pages. Rows are sorted by class: the images of class ``c`` are the rows ``offsets[c]`` to ``offsets[c + 1]``. What the
rows mean is one JSON object in the file's metadata.

A store may come from anywhere. What it says is checked before anything of the size that it says is made; that its
images are those that were written, `ClassStore.verify` checks.

A store knows classes and splits; it knows nothing of episodes, data sets or torch.
"""

import contextlib
import hashlib
import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distmaml import arrow_file
from distmaml.arrow_file import ArrowFile
from distmaml.errors import DataError, first_line, unknown
from distmaml.files import atomic_file, disk_errors
from distmaml.remote import local_copy
from distmaml.splits import SAMPLES, SPLITS

FORMAT_VERSION = 1
MAX_NAME = 200
"""Characters in the name of a data set, which errors call it by."""

_REBUILD = "Rebuild it with jobs/build_store.py."


class ClassRows(NamedTuple):
    """A class and those of its rows that belong to a split."""

    name: str
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class StoreInfo:
    """What a store says of itself."""

    name: str
    """Name of the data set."""
    source: str
    """Where the raw files come from."""
    licence: str
    """Licence of the images."""
    image_shape: tuple[int, int, int]
    """(channels, height, width)."""
    class_names: tuple[str, ...]
    """Distinct names, in the order of the rows."""
    offsets: tuple[int, ...]
    """First row of each class, and the number of rows at the end."""
    splits: Mapping[str, Mapping[str, tuple[str, ...]]]
    """For each stored scheme, the class names in train, val and test."""
    content_hash: str
    """sha256 over the shape, the class names and the images."""
    ink: bool
    """Drawings with ink 255 on paper 0; otherwise natural brightness."""


@dataclass(frozen=True, eq=False)
class ClassStore:
    """An open store. The memory map lives as long as any view of `images`."""

    info: StoreInfo
    """What the store says of itself."""
    images: npt.NDArray[np.uint8]
    """[num_rows, channels, height, width], a read-only view of the file."""

    def classes(self, scheme: str, split: str) -> list[ClassRows]:
        """The classes of a split, in the order of the store, with their rows in that split.

        The scheme ``samples`` has every class in each split and divides the class's rows 60/20/20 (at least one
        each) in an order drawn from the class's name.

        Raises:
          DataError: a scheme or a split that does not exist, or ``samples`` of a class with fewer than 3 images.
        """
        info = self.info
        if split not in SPLITS:
            raise DataError(unknown("split", split, SPLITS))
        if scheme == SAMPLES:
            return [ClassRows(name, rows[SPLITS.index(split)]) for name, rows in self._sample_rows()]
        if scheme not in info.splits:
            if not info.splits:
                raise DataError(
                    f"unknown split scheme {scheme!r}: the {len(info.class_names)} classes of {info.name} are too few "
                    "to divide. Divide their images with --split-by samples."
                )
            raise DataError(unknown("split scheme", scheme, [*info.splits, SAMPLES]))
        wanted = set(info.splits[scheme][split])
        ranges = zip(info.class_names, itertools.pairwise(info.offsets), strict=True)
        return [ClassRows(name, np.arange(*rows, dtype=np.int64)) for name, rows in ranges if name in wanted]

    def split_hash(self, scheme: str) -> str:
        """sha256 of which classes (for ``samples``: which rows of which class) a scheme puts in which split.

        Raises:
          DataError: as `classes`.
        """
        members = {
            split: [
                [name, rows.tolist()] if scheme == SAMPLES else name
                for name, rows in sorted(self.classes(scheme, split), key=lambda entry: entry.name)
            ]
            for split in SPLITS
        }
        return hashlib.sha256(_canonical(members)).hexdigest()

    def verify(self) -> None:
        """Reads every image and compares with the content hash.

        Raises:
          DataError: the images or the class names are not those that were written.
        """
        digest = _content_digest(self.info.image_shape, self.info.ink)
        for name, (start, end) in zip(self.info.class_names, itertools.pairwise(self.info.offsets), strict=True):
            _add_class(digest, name, self.images[start:end])
        if digest.hexdigest() != self.info.content_hash:
            raise DataError(
                f"the store of {self.info.name} is damaged: its content hash is {digest.hexdigest()[:12]}, written was "
                f"{self.info.content_hash[:12]}. {_REBUILD}"
            )

    def _sample_rows(self) -> Iterator[tuple[str, list[npt.NDArray[np.int64]]]]:
        for name, (start, end) in zip(self.info.class_names, itertools.pairwise(self.info.offsets), strict=True):
            count = end - start
            if count < len(SPLITS):
                raise DataError(
                    f"class {name!r} of {self.info.name} has {count} images; split by samples needs 3 or more a class."
                )
            order = [int(index) for index in hash_order(f"distmaml-samples:{name}", map(str, range(count)))]
            held_out = max(1, count // 5)
            bounds = [0, count - 2 * held_out, count - held_out, count]
            rows = [np.sort(np.array(order[a:b], dtype=np.int64)) + start for a, b in itertools.pairwise(bounds)]
            yield name, rows


def hash_order(salt: str, names: Iterable[str]) -> list[str]:
    """The names sorted by the sha256 of ``salt:name``: a permutation that depends on no library's generator."""
    # surrogatepass: the name of a folder need not be Unicode.
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}:{name}".encode("utf-8", "surrogatepass")).digest())


# --------------------------------------------------------------------------------------------- writing


def write_store(
    path: Path,
    *,
    name: str,
    source: str,
    licence: str,
    image_shape: tuple[int, int, int],
    ink: bool,
    classes: Iterable[tuple[str, npt.NDArray[np.uint8]]],
    splits: Mapping[str, Mapping[str, Sequence[str]]],
) -> StoreInfo:
    """Writes a store atomically: `path` is the whole store or what it was before.

    Args:
      path: the file to write; its folder is made.
      classes: name and images [num_images, *image_shape] of each class, consumed one at a time. Memory is needed for
        one class, disk for twice the store.
      splits: for each scheme, the class names in train, val and test.

    Raises:
      DataError: no class, an empty class or a wrong array; a split that names an unknown class or shares one with
        another.
      RunError: a folder that is full or cannot be written.
    """
    digest = _content_digest(image_shape, ink)
    names: list[str] = []
    offsets = [0]
    # The metadata stand before the images in the file but are known after them, so the images wait in a nameless file.
    with contextlib.ExitStack() as stack:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            waiting = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
        for class_name, images in classes:
            if images.dtype != np.uint8 or images.shape[1:] != image_shape or images.ndim != 4:
                raise DataError(
                    f"class {class_name!r} of {name} is {images.dtype} {images.shape}, not uint8 [n, *{image_shape}]."
                )
            if not len(images):
                raise DataError(f"class {class_name!r} of {name} has no images; every class needs at least one.")
            images = np.ascontiguousarray(images)
            _add_class(digest, class_name, images)
            with disk_errors(path):
                waiting.write(images.data)
            names.append(class_name)
            offsets.append(offsets[-1] + len(images))
        info = StoreInfo(
            name=name,
            source=source,
            licence=licence,
            image_shape=image_shape,
            class_names=tuple(names),
            offsets=tuple(offsets),
            splits={scheme: {s: tuple(members) for s, members in parts.items()} for scheme, parts in splits.items()},
            content_hash=digest.hexdigest(),
            ink=ink,
        )
        _check_info(info)
        with disk_errors(path):
            waiting.flush()
            with atomic_file(path) as file:
                metadata = _canonical({"format_version": FORMAT_VERSION, **vars(info)})
                arrow_file.write(file, metadata, image_shape, np.memmap(waiting, dtype=np.uint8, mode="r"))
    return info


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _content_digest(image_shape: tuple[int, int, int], ink: bool) -> "hashlib._Hash":
    return hashlib.sha256(_canonical([list(image_shape), ink]))


def _add_class(digest: "hashlib._Hash", name: str, images: npt.NDArray[np.uint8]) -> None:
    digest.update(_canonical([name, len(images)]))
    digest.update(images.data)


# --------------------------------------------------------------------------------------------- reading


def open_store(uri: str | Path) -> ClassStore:
    """Opens a store by memory map: a path in place, a URI (s3://, gs://, ...) as this machine's copy of it.

    Raises:
      DataError: a file that is missing, truncated, of another format version or no store at all; a URI that cannot
        be read.
      RunError: a cache of remote files that cannot be written.
    """
    path = local_copy(uri) if isinstance(uri, str) and "://" in uri else Path(uri)
    try:
        file = ArrowFile(path)
        info = _parse_info(file.metadata())
        images = file.images(info.image_shape)
        if len(images) != info.offsets[-1]:
            raise DataError(f"it holds {len(images)} images, its metadata say {info.offsets[-1]}.")
    except FileNotFoundError as error:
        raise DataError(f"no store at {path}. Build it with jobs/build_store.py.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read as a store: {first_line(error)}. {_REBUILD}") from error
    except DataError as error:
        raise DataError(f"{path} is not a store that can be used: {error!s:.500} {_REBUILD}") from error
    return ClassStore(info, images)


def _parse_info(metadata: bytes) -> StoreInfo:
    try:
        values = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise DataError(f"its metadata are not JSON: {first_line(error)}.") from error
    if not isinstance(values, dict):
        raise DataError("its metadata are not a JSON object.")
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise DataError(f"it has format version {version!r}, this distmaml reads {FORMAT_VERSION}.")
    for key, (described, holds) in _FIELDS.items():
        if key not in values or not holds(values[key]):
            raise DataError(f"its metadata field {key!r} must be {described}.")
    info = StoreInfo(
        name=values["name"],
        source=values["source"],
        licence=values["licence"],
        image_shape=(values["image_shape"][0], values["image_shape"][1], values["image_shape"][2]),
        class_names=tuple(values["class_names"]),
        offsets=tuple(values["offsets"]),
        splits={scheme: {s: tuple(names) for s, names in parts.items()} for scheme, parts in values["splits"].items()},
        content_hash=values["content_hash"],
        ink=values["ink"],
    )
    _check_info(info)
    return info


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int and 0 <= entry < 2**48 for entry in value)


def _is_splits(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(parts, dict) and all(_is_texts(names) for names in parts.values()) for parts in value.values()
    )


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text", _is_text),
    "source": ("a text", _is_text),
    "licence": ("a text", _is_text),
    "image_shape": ("[channels, height, width]", lambda value: _is_counts(value) and len(value) == 3),
    "class_names": ("a list of strings", _is_texts),
    "offsets": ("a list of whole numbers", _is_counts),
    "splits": ("an object of objects of lists of texts", _is_splits),
    "content_hash": ("a text", _is_text),
    "ink": ("true or false", lambda value: isinstance(value, bool)),
}


def _check_info(info: StoreInfo) -> None:
    """Consistency, for what is about to be written and for what was just read."""
    if not info.name.isprintable() or len(info.name) > MAX_NAME:
        raise DataError(f"the name {info.name[:MAX_NAME]!r} must be one line of at most {MAX_NAME} characters.")
    # Arrow counts the elements of one tensor in 31 bits.
    if min(info.image_shape) < 1 or math.prod(info.image_shape) >= 2**31:
        raise DataError(f"image_shape {info.image_shape} of {info.name} must be positive and below 2 GiB an image.")
    if not info.class_names:
        raise DataError(f"{info.name} has no classes; a store needs at least one.")
    counts = Counter(info.class_names)
    twice, count = counts.most_common(1)[0]
    if count > 1:
        raise DataError(f"class {twice!r} of {info.name} comes twice; class names must be distinct.")
    if len(info.offsets) != len(info.class_names) + 1 or info.offsets[0] != 0:
        raise DataError(f"the offsets of {info.name} must start at 0 and bound each of its classes.")
    if any(end <= start for start, end in itertools.pairwise(info.offsets)):
        raise DataError(f"the offsets of {info.name} must increase from class to class.")
    for scheme, parts in info.splits.items():
        _check_scheme(info.name, scheme, parts, counts.keys())


def _check_scheme(store: str, scheme: str, parts: Mapping[str, Sequence[str]], known: Set[str]) -> None:
    if scheme == SAMPLES:
        raise DataError(f"split scheme {SAMPLES!r} of {store} is reserved; every store has it. Choose another name.")
    if set(parts) != set(SPLITS) or not all(parts.values()):
        raise DataError(f"split scheme {scheme!r} of {store} must put classes in each of train, val and test.")
    home: dict[str, str] = {}
    for split, names in parts.items():
        for name in names:
            if name not in known:
                raise DataError(f"split scheme {scheme!r} of {store}: {split} names the unknown class {name!r}.")
            if name in home:
                raise DataError(
                    f"split scheme {scheme!r} of {store}: class {name!r} is in {home[name]} and in {split}; "
                    "splits must not share a class."
                )
            home[name] = split
