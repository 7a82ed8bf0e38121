from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from detection.data.images import image_size, orientation_of, read_image
from detection.data.records import DataError


def noise(height: int = 24, width: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str = "RGB", orientation: int = 1, **options: object) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation != 1:
        options["exif"] = exif
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_formats_give_back_their_pixels(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", noise(), **options)
    image = read_image(path)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, noise())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / "a.png", noise(), mode)
    expected = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)
    assert expected.std() > 10


def test_alpha_is_dropped_and_not_blended(tmp_path: Path) -> None:
    rgba = np.concatenate([noise(), np.zeros((24, 40, 1), np.uint8)], axis=2)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), noise())


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_equals_pillow(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / "a.jpg", noise(), mode)
    np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))


def test_progressive_jpeg_is_complete(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise(200, 300), progressive=True)
    np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path)))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_keep_their_high_byte(tmp_path: Path, suffix: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (24, 40), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(image, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2))


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: 32-bit pixels"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_follows_the_annotation(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", noise(), orientation=orientation)
    with Image.open(path) as opened:
        stored = np.asarray(opened.convert("RGB"))
        upright = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert orientation_of(path) == orientation
    assert image_size(path) == upright.shape[:2]
    np.testing.assert_array_equal(read_image(path), upright)
    np.testing.assert_array_equal(read_image(path, upright.shape[:2]), upright)
    if orientation >= 5:
        assert image_size(path, (24, 40)) == (24, 40)
        np.testing.assert_array_equal(read_image(path, (24, 40)), stored)


def test_square_image_is_turned_whatever_the_annotation_says(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(24, 24), orientation=6)
    np.testing.assert_array_equal(read_image(path, (24, 24)), np.rot90(noise(24, 24), -1))


def test_wrong_size_names_both(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise())
    with pytest.raises(DataError, match=r"a\.png: the image is 24x40 .* says 25x40"):
        read_image(path, (25, 40))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp"])
def test_truncated_files_are_refused_at_every_length(tmp_path: Path, suffix: str) -> None:
    data = save(tmp_path / f"whole.{suffix}", noise(64, 64)).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for fraction in (0, 0.01, 0.1, 0.3, 0.5, 0.8, 0.95):
        path.write_bytes(data[: int(len(data) * fraction)])
        with pytest.raises(DataError, match=f"cut.{suffix}"):
            read_image(path)


def test_truncated_jpeg_is_refused_although_its_thumbnail_is_complete(tmp_path: Path) -> None:
    thumbnail = io.BytesIO()
    Image.fromarray(noise(8, 8)).save(thumbnail, "JPEG")
    path = tmp_path / "a.jpg"
    Image.fromarray(noise(64, 64)).save(path, comment=thumbnail.getvalue())
    read_image(path)
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(DataError, match=r"a\.jpg: the JPEG is truncated"):
        read_image(path)


def test_header_that_promises_too_much_is_refused_at_once(tmp_path: Path) -> None:
    data = save(tmp_path / "a.bmp", noise()).read_bytes()
    (tmp_path / "a.bmp").write_bytes(data[:18] + (12_000).to_bytes(4, "little") * 2 + data[26:])
    with pytest.raises(DataError, match=r"a\.bmp: \d+ bytes can't hold the 12000x12000 pixels"):
        read_image(tmp_path / "a.bmp")


def test_missing_file_and_foreign_content(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    for path in (tmp_path / "a.jpg", tmp_path / "none.jpg", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            read_image(path)
        with pytest.raises(DataError, match=str(path)):
            image_size(path)


def test_tiffs_without_a_known_range_are_refused(shared_data: Path) -> None:
    for path in sorted((shared_data / "icevision" / "images").glob("*.tif")):
        with pytest.raises(DataError, match=path.name):
            read_image(path)
