"""Reading one picture: every mode comes out as the same uint8 pixels, and what is broken is named."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from distmaml.datasets.images import read_image
from distmaml.errors import DataError


def saved(picture: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    file.seek(0)
    return file


def read(source: Path | io.BytesIO, size: int = 4, color: bool = False, ink: bool = False) -> npt.NDArray[np.uint8]:
    return read_image(source, image_size=size, color=color, ink=ink)


GREY = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)


def test_a_picture_of_the_right_size_is_its_pixels(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "x.png")
    pixels = read(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels, GREY[None])
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


def test_color_has_three_channels_first() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read(saved(Image.fromarray(rgb)), color=True), np.moveaxis(rgb, 2, 0))
    np.testing.assert_array_equal(read(saved(Image.fromarray(GREY)), color=True), np.stack([GREY] * 3))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_a_grey_picture_reads_alike(mode: str) -> None:
    np.testing.assert_array_equal(read(saved(Image.fromarray(GREY).convert(mode))), GREY[None])


def test_16_bits_keep_their_brightness() -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    np.testing.assert_array_equal(read(saved(deep)), GREY[None])
    np.testing.assert_array_equal(read(saved(deep, "TIFF"), color=True), np.stack([GREY] * 3))


def test_1_bit_is_black_and_white_and_resized_with_greys() -> None:
    halves = Image.new("1", (8, 8), 1)
    halves.paste(0, (0, 0, 3, 8))
    pixels = read(saved(halves), size=8)
    assert set(pixels.ravel().tolist()) == {0, 255}
    assert 0 < read(saved(halves), size=4)[0, 0, 1] < 255


def test_cmyk_reads_as_its_rgb() -> None:
    cmyk = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    np.testing.assert_allclose(read(saved(cmyk, "JPEG"), color=True)[:, 0, 0], [0, 255, 255], atol=3)


def test_transparent_pixels_are_white() -> None:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.putpixel((1, 2), (0, 0, 0, 255))
    expected = np.full((1, 4, 4), 255)
    expected[0, 2, 1] = 0
    np.testing.assert_array_equal(read(saved(picture)), expected)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 10, 10, 10])
    assert read(saved(palette, "GIF", transparency=0)).min() == 255
    assert read(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))).tolist()[0][0][0] in (127, 128)


def test_ink_is_255_on_0() -> None:
    np.testing.assert_array_equal(read(saved(Image.fromarray(GREY)), ink=True), 255 - GREY[None])


def test_exif_orientation_is_honoured() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise
    picture = Image.fromarray(GREY)
    np.testing.assert_array_equal(read(saved(picture, exif=exif)), np.rot90(GREY, -1)[None])


def test_shrinking_averages_over_all_pixels() -> None:
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    np.testing.assert_allclose(read(saved(Image.fromarray(checkers)), size=8), 127.5, atol=3)


def test_a_large_jpeg_reads_as_when_it_is_decoded_in_full() -> None:
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    picture = Image.fromarray(np.tile(ramp, (480, 1)))
    full = np.asarray(picture.resize((16, 16), Image.Resampling.LANCZOS), dtype=np.float64)
    np.testing.assert_allclose(read(saved(picture, "JPEG", quality=95), size=16)[0], full, atol=3)


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("L", (4, 4), value) for value in (40, 200)]
    assert set(read(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])).ravel().tolist()) == {40}


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("not a picture")
    with pytest.raises(DataError, match=r"notes.jpg cannot be read as a picture .*Known kinds: .bmp, .gif"):
        read(tmp_path / "notes.jpg")
    with pytest.raises(DataError, match=r"none.png cannot be read .*FileNotFoundError"):
        read(tmp_path / "none.png")
    with pytest.raises(DataError, match="my photo cannot be read"):
        read_image(io.BytesIO(b""), image_size=4, color=False, ink=False, name="my photo")


def test_a_picture_of_another_kind_is_refused_whatever_it_is_called(tmp_path: Path) -> None:
    for kind in ("EPS", "PPM", "PDF"):
        Image.fromarray(GREY).save(tmp_path / "x.png", kind)
        with pytest.raises(DataError, match=r"x\.png cannot be read as a picture .*Known kinds"):
            read(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_picture_is_an_error_of_the_data(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    content = saved(Image.fromarray(noise), kind).getvalue()
    for length in range(1, len(content) // 2, 61):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(DataError, match="cut cannot be read"):
            read(tmp_path / "cut")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 10_000, 50_000])
def test_a_picture_that_claims_too_many_pixels_is_refused_unread(side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match=r"pixels"):
        read(io.BytesIO(bomb))


def test_a_file_that_is_too_large_for_a_picture_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(640_000_001)
    with pytest.raises(DataError, match=r"x\.png has 640000001 bytes; at most 640000000 are read"):
        read(tmp_path / "x.png")


def test_pixels_without_a_known_range_are_refused() -> None:
    with pytest.raises(DataError, match="floating-point pixels"):
        read(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(DataError, match="0 to 70000; 8 and 16 bits are read"):
        read(saved(Image.fromarray(np.diag([70000, 0, 0, 0]).astype(np.int32)), "TIFF"))
