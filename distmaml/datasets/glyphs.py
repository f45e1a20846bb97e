"""Glyphs: letters of the DejaVu and STIX faces, rendered here, so that a first run needs no download.

The faces come with matplotlib. A class is a letter; its 20 samples are spread over the faces that have it (upright,
italic, bold; sans, serif, mono), each a little rotated, scaled, sheared and shifted. Everything is drawn from the
class's name, so the store is the same to the byte wherever Pillow has the same FreeType.
"""

import hashlib
import importlib.util
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from distmaml.errors import ConfigError, DataError
from distmaml.store import StoreInfo, hash_order, write_store

NUM_SAMPLES = 20
FACES = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf"),
    *("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    *("DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf"),
    *("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf"),
    *("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf"),
)

_LETTERS = ("Lu", "Ll", "Lt", "Lo")
# Their letters are rotations of one another or of Latin capitals: the task option `rotations` would make a test class
# out of a training class.
_ROTATED_SCRIPTS = ("CANADIAN", "LISU")
_EM = 96
"""Pixels of the em in the undistorted bitmap."""
_CANVAS = 128
"""Pixels of the square in which a sample is distorted before it is reduced to image_size."""
_BOX = 112
"""Pixels of the canvas within which a distorted letter stays."""
_MAX_ROTATION = math.radians(10)
_MAX_SHEAR = 0.15
_SCALES = (0.85, 1.15)
_MAX_SHIFT = 6.0


def build(path: Path, *, data_dir: Path | None, image_size: int, color: bool, download_dir: Path) -> StoreInfo:
    """Writes the store of all letters, 20 samples each, in grey with ink 255; classes "U+0041 LATIN CAPITAL LETTER A".

    `data_dir` and `download_dir` are not used.

    Raises:
      ConfigError: `color`.
      DataError: matplotlib's faces are not there.
    """
    if color:
        raise ConfigError("glyphs have no colors. Leave --color out.")
    letters = {_class_name(letter): faces for letter, faces in distinct_letters().items()}
    order = hash_order("distmaml-glyphs", letters)
    num_train, num_val = 7 * len(order) // 10, len(order) // 10
    held_out = num_train + num_val

    def samples() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        for name, faces in tqdm(letters.items(), desc="glyphs", unit=" classes", disable=None):
            yield name, _samples(name, faces, image_size)
        _bitmap.cache_clear()

    return write_store(
        path,
        name="glyphs",
        source="DejaVu and STIX faces of matplotlib",
        licence="renderings of fonts under the Bitstream Vera and STIX licences",
        image_shape=(1, image_size, image_size),
        ink=True,
        classes=samples(),
        splits={"default": {"train": order[:num_train], "val": order[num_train:held_out], "test": order[held_out:]}},
    )


def distinct_letters() -> dict[str, list[str]]:
    """The letters by code point, each with the faces that have it; of letters that look the same, the first.

    Latin A, Greek Alpha and Cyrillic A have one bitmap; as three classes they would leak from training into test.
    Letters with the same bitmap in any face are joined, and the one with the lowest code point stands for them all.
    Accented letters and other compositions are left out (they are near twins of their base), as are blank glyphs.
    """
    faces: dict[str, list[str]] = defaultdict(list)
    parents: dict[str, str] = {}
    for face in FACES:
        first_with: dict[bytes, str] = {}
        for letter in _letters_of(face):
            bitmap = _bitmap(face, letter)
            if bitmap is None:
                continue
            faces[letter].append(face)
            parents.setdefault(letter, letter)
            twin = first_with.setdefault(hashlib.sha256(repr(bitmap.size).encode() + bitmap.tobytes()).digest(), letter)
            low, high = sorted((_root(parents, twin), _root(parents, letter)))
            parents[high] = low
    return {letter: faces[letter] for letter in sorted(parents) if parents[letter] == letter}


def _root(parents: dict[str, str], letter: str) -> str:
    while parents[letter] != letter:
        letter = parents[letter]
    return letter


def _letters_of(face: str) -> list[str]:
    with TTFont(_font_path(face), lazy=True) as font:
        glyphs: dict[int, str] = font.getBestCmap()
    letters = [chr(code) for code, glyph in sorted(glyphs.items()) if glyph != ".notdef"]
    return [
        letter
        for letter in letters
        if unicodedata.category(letter) in _LETTERS
        and not unicodedata.decomposition(letter)
        and not unicodedata.name(letter).startswith(_ROTATED_SCRIPTS)
    ]


def _class_name(letter: str) -> str:
    return f"U+{ord(letter):04X} {unicodedata.name(letter)}"


# ------------------------------------------------------------------------------------------- rendering


def _font_path(face: str) -> Path:
    # Not matplotlib.get_data_path(): importing matplotlib takes a second and writes a cache.
    package = importlib.util.find_spec("matplotlib")
    roots = list(package.submodule_search_locations or []) if package else []
    for root in roots:
        path = Path(root) / "mpl-data" / "fonts" / "ttf" / face
        if path.is_file():
            return path
    raise DataError(f"{face} is not among matplotlib's fonts in {roots}. Install matplotlib again with pip.")


@cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    # The basic layout: with libraqm, where Pillow has it, letters would be shaped otherwise than without.
    return ImageFont.truetype(str(_font_path(face)), _EM, layout_engine=ImageFont.Layout.BASIC)


@cache  # of all letters, 50 MB, for as long as a store is built: each is asked for twice and more
def _bitmap(face: str, letter: str) -> Image.Image | None:
    """The undistorted letter, ink 255, cropped to its ink; None if it is blank."""
    font = _font(face)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(letter))
    if right <= left or bottom <= top:
        return None
    picture = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(picture).text((-left, -top), letter, fill=255, font=font)
    ink = picture.getbbox()
    return picture.crop(ink) if ink else None


def _samples(name: str, faces: list[str], image_size: int) -> npt.NDArray[np.uint8]:
    """[NUM_SAMPLES, 1, image_size, image_size]."""
    seed = int.from_bytes(hashlib.sha256(f"distmaml-glyphs-samples:{name}".encode()).digest()[:16], "big")
    random = np.random.Generator(np.random.PCG64(seed))
    letter = chr(int(name[2 : name.index(" ")], 16))
    pictures = []
    for index in range(NUM_SAMPLES):
        bitmap = _bitmap(faces[index % len(faces)], letter)
        assert bitmap is not None, "distinct_letters lists the faces that draw the letter"
        pictures.append(np.asarray(_distort(bitmap, random, image_size)))
    return np.stack(pictures)[:, None]


def _distort(bitmap: Image.Image, random: np.random.Generator, image_size: int) -> Image.Image:
    """A random affine image of the bitmap in the middle of a square, as large as it is or as fits."""
    rotation = random.uniform(-_MAX_ROTATION, _MAX_ROTATION)
    shear = random.uniform(-_MAX_SHEAR, _MAX_SHEAR)
    cos, sin = math.cos(rotation), math.sin(rotation)
    forward = random.uniform(*_SCALES) * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, shear], [0.0, 1.0]])
    extent = np.abs(forward) @ np.array(bitmap.size)
    forward *= min(1.0, _BOX / extent.max())
    margin = np.maximum(0.0, (_BOX - np.abs(forward) @ np.array(bitmap.size)) / 2)
    shift = np.clip(random.uniform(-_MAX_SHIFT, _MAX_SHIFT, size=2), -margin, margin)
    # Pillow wants the way back, from a pixel of the result to one of the source.
    backward = np.linalg.inv(forward)
    offset = np.array(bitmap.size) / 2 - backward @ (_CANVAS / 2 + shift)
    matrix = (*backward[0].tolist(), float(offset[0]), *backward[1].tolist(), float(offset[1]))
    drawn = bitmap.transform((_CANVAS, _CANVAS), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return drawn.resize((image_size, image_size), Image.Resampling.BOX)
