"""Reading one picture as a uint8 array of the size and the channels that a store has; and the pictures in a folder.

The same functions read the raw files of a data set and, later, the pictures that a user hands to a trained model, so
both see the same pixels.

Raw files may come from anywhere. What a symbolic link shows need not be theirs to show, so a link counts only where it
leads to a file of the same folder; and only the kinds in SUFFIXES are opened, whatever a file is called: Pillow would
hand others to programs of the machine.
"""

import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from distmaml.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_KINDS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
MAX_PIXELS = 80_000_000
"""Larger pictures are refused: a file of a few kilobytes can claim gigabytes of pixels."""
MAX_BYTES = 8 * MAX_PIXELS
"""Larger files are refused: as many pixels of four channels of 16 bits, without compression, have no more."""


def read_image(
    source: Path | BinaryIO, *, image_size: int, color: bool, ink: bool, name: str | None = None
) -> npt.NDArray[np.uint8]:
    """Reads a picture as uint8 [channels, image_size, image_size], 3 channels with `color`, else 1.

    Transparent pixels lie on white; EXIF orientation is honoured; of an animation the first frame is taken; 16-bit
    values are divided by 257. The picture is resized to a square without keeping its aspect ratio, averaging over
    all its pixels (Lanczos).

    Args:
      ink: the picture is dark ink on light paper; the result has ink 255 on paper 0.
      name: what an error calls the picture; by default its path.

    Raises:
      DataError: a picture that is missing, broken, of an unknown kind or larger than MAX_PIXELS or MAX_BYTES.
    """
    name = name or str(source if isinstance(source, Path) else getattr(source, "name", "the picture"))
    # Pillow's decoders raise almost anything on a broken file (OSError, SyntaxError, struct.error, IndexError...).
    try:
        if isinstance(source, Path):
            if source.stat().st_size > MAX_BYTES:
                raise DataError(f"{name} has {source.stat().st_size} bytes; at most {MAX_BYTES} are read. Shrink it.")
            source = io.BytesIO(source.read_bytes())  # a decoder that asks for more bytes than there are gets no memory
        with Image.open(source, formats=_KINDS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS} are read. Shrink it.")
            # Lets a JPEG decode at an eighth to a half of its size while that is at least twice the wanted one.
            opened.draft(None, (2 * image_size, 2 * image_size))
            opened.load()
            picture = _on_white(ImageOps.exif_transpose(opened), name).convert("RGB" if color else "L")
            picture = picture.resize((image_size, image_size), Image.Resampling.LANCZOS)
    except DataError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise DataError(
            f"{name} cannot be read as a picture ({reason}). Known kinds: {', '.join(sorted(SUFFIXES))}."
        ) from error
    pixels = np.asarray(picture, dtype=np.uint8)
    pixels = np.moveaxis(pixels, 2, 0) if color else pixels[None]
    return np.ascontiguousarray(255 - pixels if ink else pixels)


def pictures_in(folder: Path, root: Path | None = None) -> list[Path]:
    """The pictures that lie in a folder, by name; hidden files are left out.

    Args:
      root: the folder that links may lead to; by default `folder`.

    Raises:
      DataError: there is none; one that is no file, or a link out of `root`.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and _is_shown(path))
    if not files:
        raise DataError(f"there is no picture in the folder {folder}; known kinds are {', '.join(sorted(SUFFIXES))}.")
    for file in files:
        check_file(file, root or folder)
    return files


def folders_in(folder: Path) -> list[Path]:
    """The folders that lie in a folder, by name, a class each; hidden ones are left out.

    Raises:
      DataError: one is a link.
    """
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and _is_shown(path))
    for path in folders:
        check_folder(path, folder)
    return folders


def check_file(path: Path, root: Path) -> None:
    """Refuses what is no file, and what is called to lie below a folder but does not.

    Raises:
      DataError: it is none, or a link leads out of `root`.
    """
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path} is no file, or a link to none. Remove it.")
    if path.is_symlink() and not _real(path).is_relative_to(_real(root)):
        raise DataError(
            f"{path} is a symbolic link that leads out of {root}, to {_real(path)}. Put a copy in its place."
        )


def check_folder(path: Path, root: Path) -> None:
    """Refuses a folder below another one that is reached by a link: its pictures would count twice, or lie elsewhere.

    Raises:
      DataError: there is a link between `root` and `path`.
    """
    if _real(path) != _real(root) / os.path.relpath(path, root):
        raise DataError(f"{path} is reached by a symbolic link, to {_real(path)}. Put a copy in its place.")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _is_shown(path: Path) -> bool:
    return not path.name.startswith((".", "__MACOSX"))


def _on_white(picture: Image.Image, name: str) -> Image.Image:
    """The picture as 8-bit grey or RGB."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"{name} has pixels of {values.min()} to {values.max()}; 8 and 16 bits are read. Convert it."
            )
        return Image.fromarray((values // 257).astype(np.uint8))
    if picture.mode == "F":
        raise DataError(f"{name} has floating-point pixels, whose range is not known. Convert it to 8 or 16 bits.")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture if picture.mode in ("1", "L", "RGB") else picture.convert("RGB")
