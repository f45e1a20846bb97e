"""Omniglot: 1623 handwritten characters of 50 alphabets, each drawn once by 20 people.

Lake, Salakhutdinov, Tenenbaum (2015), Human-level concept learning through probabilistic program induction,
Science 350(6266), https://doi.org/10.1126/science.aab3050. Files: https://github.com/brendenlake/omniglot.

Reads the two official zips, or the folders that they unpack to, or downloads the zips. A zip is never unpacked to the
disk: its members are read one at a time, in memory, and none that is larger than a drawing can be.
"""

import contextlib
import functools
import http.client
import io
import re
import stat
import struct
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from distmaml.datasets.images import check_file, check_folder, read_image
from distmaml.errors import ConfigError, DataError, first_line
from distmaml.files import atomic_file, disk_errors
from distmaml.store import StoreInfo, hash_order, write_store

BASE_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
NUM_DRAWERS = 20
NUM_TRAIN, NUM_VAL = 1100, 100
"""Characters of the `maml` split; the other 423 are for test. Finn et al. (2017), https://arxiv.org/abs/1703.03400,
train on 1200, of which their code keeps 100 for validation."""
NUM_VAL_ALPHABETS = 5

_MAX_MEMBER_BYTES = 1 << 20
_MAX_ARCHIVE_BYTES = 1 << 28
"""Unpacked; 19,280 drawings of 105 x 105 black and white pixels have far less."""
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""The others unfold a block at a time, however large, before Python counts how much it was."""
_TIMEOUT_S = 60
_DRAWING = re.compile(r"((?!\.\.?/)[^/]+/character\d{2})/\d{4}_\d{2}\.png")
_FOLDERS = (".", "omniglot-py", "python")
"""Where in data_dir the files may lie: in itself, as torchvision puts them, as a clone of the repository has them."""


class Part(NamedTuple):
    """One of the two official archives."""

    name: str
    num_characters: int


PARTS = (Part("images_background", 964), Part("images_evaluation", 659))

_Files = Mapping[str, Callable[[], bytes]]


def build(path: Path, *, data_dir: Path | None, image_size: int, color: bool, download_dir: Path) -> StoreInfo:
    """Writes the store of all 1623 characters, 20 drawings each, in grey with ink 255; classes "Alphabet/characterNN".

    Args:
      data_dir: folder with the zips or the unpacked folders; without it they are downloaded into `download_dir`.

    Raises:
      ConfigError: `color`.
      DataError: files that are missing, broken or not exactly Omniglot; a download that fails.
    """
    if color:
        raise ConfigError("omniglot has no colors. Leave --color out.")
    characters: list[dict[str, list[str]]] = []
    files: dict[str, Callable[[], bytes]] = {}
    with contextlib.ExitStack() as stack:
        for part in PARTS:
            place = _downloaded(part, download_dir) if data_dir is None else _find(part, data_dir)
            found = _folder_files(place) if place.is_dir() else _zip_files(place, part, stack)
            characters.append(_characters(place, part, found))
            files.update(found)
        background, evaluation = characters

        def drawings() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
            classes = [*background.items(), *evaluation.items()]
            for name, members in tqdm(classes, desc="omniglot", unit=" classes", disable=None):
                pictures = [
                    read_image(io.BytesIO(files[m]()), image_size=image_size, color=False, ink=True, name=m)
                    for m in members
                ]
                yield name, np.stack(pictures)

        return write_store(
            path,
            name="omniglot",
            source="https://github.com/brendenlake/omniglot",
            licence="MIT",
            image_shape=(1, image_size, image_size),
            ink=True,
            classes=drawings(),
            splits=split_schemes(list(background), list(evaluation)),
        )


def split_schemes(background: Sequence[str], evaluation: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """The schemes `maml` (= `default`) and `alphabets` of the two parts' classes.

    maml: 1100 train, 100 val, 423 test of all characters, in an order fixed by the sha256 of their names, which is
    not the paper's. alphabets: 25 and 5 of the background alphabets are train and val, the 20 evaluation alphabets are
    test, so that whole scripts are new.
    """
    order = hash_order("distmaml-omniglot-maml", [*background, *evaluation])
    held_out = NUM_TRAIN + NUM_VAL
    maml = {"train": order[:NUM_TRAIN], "val": order[NUM_TRAIN:held_out], "test": order[held_out:]}
    val_alphabets = hash_order("distmaml-omniglot-alphabets", {_alphabet(c) for c in background})[:NUM_VAL_ALPHABETS]
    alphabets = {
        "train": [c for c in background if _alphabet(c) not in val_alphabets],
        "val": [c for c in background if _alphabet(c) in val_alphabets],
        "test": list(evaluation),
    }
    return {"default": maml, "maml": maml, "alphabets": alphabets}


def _alphabet(character: str) -> str:
    return character.partition("/")[0]


# ------------------------------------------------------------------------------------------- raw files


def _find(part: Part, data_dir: Path) -> Path:
    for folder in _FOLDERS:
        for place in (data_dir / folder / f"{part.name}.zip", data_dir / folder / part.name):
            if place.is_dir():
                check_folder(place, data_dir)
                return place
            if place.exists():
                check_file(place, data_dir)
                return place
    raise DataError(
        f"no {part.name}.zip and no folder {part.name} in {data_dir}. Leave --data-dir out to download them."
    )


def _zip_files(path: Path, part: Part, stack: contextlib.ExitStack) -> _Files:
    """The members of an archive by their names below the part's folder; the archive is open as long as the stack."""
    with _zip_errors(path):
        archive = stack.enter_context(zipfile.ZipFile(path))
    files: dict[str, Callable[[], bytes]] = {}
    num_bytes = 0
    for member in archive.infolist():
        if member.filename.endswith("/") or member.filename.startswith("__MACOSX/"):
            continue
        name = member.filename.removeprefix(f"{part.name}/")
        if name == member.filename or name in files:
            raise DataError(f"{path} is not Omniglot's {part.name}.zip: it has {member.filename!r}.")
        if stat.S_ISLNK(member.external_attr >> 16) or member.compress_type not in _COMPRESSIONS:
            raise DataError(f"{path}: {member.filename!r} is a link, or compressed in an unusual way. Get it again.")
        size = max(member.file_size, member.compress_size)
        if size > _MAX_MEMBER_BYTES:
            raise DataError(f"{path}: {member.filename!r} has {size} bytes; no drawing has more than 1 MiB.")
        num_bytes += member.file_size
        if num_bytes > _MAX_ARCHIVE_BYTES:
            raise DataError(
                f"{path} unpacks to more than {_MAX_ARCHIVE_BYTES >> 20} MiB; Omniglot does not. Get it again."
            )
        files[name] = functools.partial(_read_member, path, archive, member)
    return files


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    # Not archive.read: that unfolds everything before it looks at the size that the member claims.
    with _zip_errors(path), archive.open(member) as file:
        return file.read(member.file_size + 1)


@contextlib.contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    try:
        yield
    # RuntimeError: an encrypted member, NotImplementedError among it: an unknown compression. ValueError: a name that
    # is no text, or a place before the beginning.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
        reason = first_line(error)[:200]
        raise DataError(f"{path} is no zip or a damaged one ({reason}). Delete it and get it again.") from error


def _folder_files(folder: Path) -> _Files:
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in paths:
        check_file(path, folder)
        if path.stat().st_size > _MAX_MEMBER_BYTES:
            raise DataError(f"{path} has {path.stat().st_size} bytes; no drawing has more than 1 MiB.")
    return {path.relative_to(folder).as_posix(): functools.partial(_read_file, path) for path in paths}


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Unpack the zip again.") from error


def _characters(place: Path, part: Part, files: _Files) -> dict[str, list[str]]:
    """For each character its drawings, both sorted by name; exactly as many as Omniglot has."""
    characters: dict[str, list[str]] = {}
    for name in sorted(files):
        match = _DRAWING.fullmatch(name)
        if match is None:
            raise DataError(f"{place} is not Omniglot's {part.name}: it has {name!r}, not Alphabet/characterNN/*.png.")
        characters.setdefault(match[1], []).append(name)
    if len(characters) != part.num_characters:
        raise DataError(
            f"{place} has {len(characters)} characters; Omniglot's {part.name} has {part.num_characters}. Get it again."
        )
    for character, drawings in characters.items():
        if len(drawings) != NUM_DRAWERS:
            raise DataError(f"{place} has {len(drawings)} drawings of {character}, not {NUM_DRAWERS}. Get it again.")
    return characters


# -------------------------------------------------------------------------------------------- download


def _downloaded(part: Part, download_dir: Path) -> Path:
    path = download_dir / f"{part.name}.zip"
    if not path.exists():
        download(f"{BASE_URL}/{part.name}.zip", path)
    return path


def download(url: str, path: Path) -> None:
    """Downloads a file; `path` appears when all of it is there.

    Raises:
      DataError: the server cannot be reached, refuses, or sends less than it announced.
      RunError: a disk that is full.
    """
    with disk_errors(path), atomic_file(path) as file:
        for block in _blocks(url, path):
            file.write(block)


def _blocks(url: str, path: Path) -> Iterator[bytes]:
    way_out = f"Try again, or get {path.name} by other means and name its folder with --data-dir."
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            announced = response.headers.get("Content-Length")
            total = int(announced) if announced and announced.isdigit() else None
            with tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read(1 << 16):
                    bar.update(len(block))
                    yield block
                    if total is not None:
                        total -= len(block)
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(f"cannot download {url}: {error.code} {error.reason}. {way_out}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise DataError(f"cannot download {url}: {reason}. {way_out}") from error
    if total:
        raise DataError(f"cannot download {url}: the last {total} bytes did not come. {way_out}")
