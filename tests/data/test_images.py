from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from detection.data import headers, images, jpeg
from detection.data.audit import audit
from detection.data.headers import EXTENSIONS, UNREAD
from detection.data.images import from_array, image_size, orientation_of, read_image, remarks
from detection.data.records import DataError, Index, Record
from detection.data.yolo import read_yolo


def noise(height: int = 24, width: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str = "RGB", orientation: int = 1, **options: object) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation != 1:
        options["exif"] = exif
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def need(suffix: str) -> None:
    decoder = {"avif": "avif", "webp": "webp", "jp2": "jpg_2000", "j2k": "jpg_2000"}.get(suffix)
    if decoder and not features.check(decoder):
        pytest.skip(f"this Pillow has no decoder for {suffix}")


# of the extensions: Pillow's name, how to save without loss, and the mode that can hold
LOSSLESS = {
    (".png", ".apng"): ("PNG", {}, "RGB"),
    (".tif", ".tiff"): ("TIFF", {"compression": "tiff_lzw"}, "RGB"),
    (".bmp",): ("BMP", {}, "RGB"),
    (".dib",): ("DIB", {}, "RGB"),
    (".webp",): ("WEBP", {"lossless": True}, "RGB"),
    (".jp2", ".jpx", ".jpf"): ("JPEG2000", {"irreversible": False}, "RGB"),
    (".j2k", ".j2c"): ("JPEG2000", {"irreversible": False, "no_jp2": True}, "RGB"),
    (".gif",): ("GIF", {}, "P"),
    (".ppm", ".pnm"): ("PPM", {}, "RGB"),
    (".pgm",): ("PPM", {}, "L"),
    (".pbm",): ("PPM", {}, "1"),
    (".tga",): ("TGA", {"compression": "tga_rle"}, "RGB"),
}
LOSSY = {(".jpg", ".jpeg", ".jpe", ".jfif"): "JPEG", (".mpo",): "MPO", (".avif",): "AVIF"}


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_every_extension_is_read_to_its_pixels(tmp_path: Path, suffix: str) -> None:
    need(suffix[1:])
    path = tmp_path / f"a{suffix}"
    lossless = {one: how for several, how in LOSSLESS.items() for one in several}
    lossy = {one: name for several, name in LOSSY.items() for one in several}
    if suffix in lossless:
        kind, options, mode = lossless[suffix]
        stored = Image.fromarray(noise() // 86 * 86).convert(mode)  # 27 colours fit a palette
        stored.save(path, kind, **options)
        wanted = np.asarray(stored.convert("RGB"))
        if mode != "1":
            assert len(np.unique(wanted.reshape(-1, 3), axis=0)) > 3
    else:
        smooth = Image.fromarray(noise(4, 5)).resize((40, 24), Image.Resampling.BICUBIC)
        smooth.save(path, lossy[suffix], quality=95)
        wanted = np.asarray(Image.open(path).convert("RGB"))
        assert np.abs(wanted.astype(int) - np.asarray(smooth)).mean() < 6
    image = read_image(path)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, wanted)
    assert image_size(path) == (24, 40) and not remarks(path)


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


def test_exif_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(), orientation=6)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])  # before the last chunk
    upright = np.rot90(noise(), -1)
    with Image.open(path) as image:
        assert "exif" not in image.info
        np.testing.assert_array_equal(ImageOps.exif_transpose(image), upright)
    np.testing.assert_array_equal(read_image(path), upright)
    assert image_size(path) == (40, 24) and orientation_of(path) == 6


def test_wrong_size_names_both(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise())
    with pytest.raises(DataError, match=r"a\.png: the image is 24x40 .* says 25x40"):
        read_image(path, (25, 40))


@pytest.mark.parametrize(
    "suffix", ["jpg", "png", "tif", "webp", "bmp", "avif", "jp2", "j2k", "gif", "mpo", "ppm", "tga"]
)
def test_truncated_files_are_refused_at_every_length(tmp_path: Path, suffix: str) -> None:
    need(suffix)
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


def photo(height: int = 200, width: int = 300, **options: object) -> bytes:
    """A JPEG of smooth colours, none of them the grey of what is missing."""
    file = io.BytesIO()
    coarse = Image.fromarray(noise(height // 10, width // 10) // 3)
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


KINDS = [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0}]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("behind", [b"\xff\xda" * 9, b"\0" * 999, b"ftypmp42" + bytes(range(256)) * 20])
def test_jpeg_with_a_film_behind_its_end(tmp_path: Path, options: dict[str, object], behind: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(photo(**options))
    alone = read_image(path)
    path.write_bytes(photo(**options) + behind)
    np.testing.assert_array_equal(read_image(path), alone)
    assert not remarks(path)


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("options", KINDS)
def test_jpeg_without_end_marker_is_read_where_all_of_it_is_there(
    tmp_path: Path, options: dict[str, object], left: int
) -> None:
    path, data = tmp_path / "a.jpg", photo(**options)
    path.write_bytes(data)
    whole = read_image(path)
    path.write_bytes(data[: len(data) - 2 + left])
    np.testing.assert_array_equal(read_image(path), whole)
    assert [problem for problem, _ in remarks(path)] == ["the JPEG has no end marker"]
    for missing in (12, 50, 400, len(data) // 2):
        for end in (b"", jpeg.END):  # programs that repair files write the marker anew
            path.write_bytes(data[:-missing] + end)
            if end and (missing < 50 or options.get("progressive")):
                continue  # a part of the last block; or all rows are there, the later ones coarser
            with pytest.raises(DataError, match="the JPEG is truncated"):
                read_image(path)


def test_progressive_jpeg_without_its_last_scans_is_refused(tmp_path: Path) -> None:
    data = photo(progressive=True)
    starts = [at for marker, at in jpeg._segments(data) if marker == b"\xff\xda"]
    assert len(starts) > 5
    for at in starts[1:]:
        (tmp_path / "a.jpg").write_bytes(data[:at])
        with pytest.raises(DataError, match="the JPEG is truncated"):
            read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(data[: (starts[0] + starts[1]) // 2] + jpeg.END)  # half of the first scan
    with pytest.raises(DataError, match="the JPEG is truncated"):
        read_image(tmp_path / "a.jpg")


@settings(deadline=None)  # whose 200 ms a busy machine exceeds
@given(st.lists(st.tuples(st.integers(2, 700), st.integers(0, 255)), max_size=6), st.integers(0, 900))
def test_damaged_jpegs_are_read_or_refused(changes: list[tuple[int, int]], missing: int) -> None:
    data = bytearray(photo(40, 60))
    for at, value in changes:
        data[at] = value
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(DataError):
        path = Path(folder) / "a.jpg"
        path.write_bytes(data[: len(data) - missing])
        assert read_image(path).shape == (*image_size(path), 3)


def test_what_is_grey_in_truth_is_read(tmp_path: Path) -> None:
    pixels = noise(64, 64) // 3
    pixels[40:] = 128
    path = save(tmp_path / "a.jpg", pixels)
    image = read_image(path)
    assert jpeg.is_grey_at_end(image)
    path.write_bytes(path.read_bytes()[:-2])
    np.testing.assert_array_equal(read_image(path), image)


@pytest.mark.parametrize(("suffix", "count"), [("gif", 7), ("tif", 3), ("png", 2), ("webp", 4)])
def test_first_frame_is_read_and_the_others_are_noted(tmp_path: Path, suffix: str, count: int) -> None:
    frames = [Image.fromarray(np.full((24, 40, 3), 20 + 30 * i, np.uint8)) for i in range(count)]
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read_image(path), np.asarray(frames[0]))
    assert [problem for problem, _ in remarks(path)] == [f"only the first of {count} frames is read"]
    index = Index(tmp_path, ("a",), (1,), [Record.of(1, path.name, (24, 40), [[2, 2, 9, 9]], [1])])
    noted = [defect for defect in audit("train", lambda: index).defects if "frames" in defect.problem]
    assert [(defect.file, defect.severity) for defect in noted] == [(path.name, "note")]


def test_16_bits_of_each_kind(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (24, 40, 3), dtype=np.uint16)
    for suffix in ("png", "tif", "ppm"):
        cv2.imwrite(str(tmp_path / f"a.{suffix}"), values[..., ::-1])
        read = read_image(tmp_path / f"a.{suffix}")
        assert np.abs(read.astype(int) - (values >> 8)).max() <= (suffix == "ppm"), (
            suffix
        )  # PPM is scaled, by 255/65535
    cv2.imwrite(str(tmp_path / "a.pgm"), values[..., 0])
    np.testing.assert_array_equal(read_image(tmp_path / "a.pgm")[..., 1], values[..., 0] >> 8)


def test_missing_decoder_is_named_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("avif"), need("jp2")
    from PIL import AvifImagePlugin, ImageFile

    paths = [save(tmp_path / "a.avif", noise()), save(tmp_path / "a.jp2", noise()), save(tmp_path / "a.png", noise())]
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    monkeypatch.setattr(features, "check", lambda name: name not in ("avif", "jpg_2000"))

    def no_decoder(*_: object) -> None:
        raise OSError("decoder jpeg2k not available")

    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image._getdecoder", no_decoder)
        assert ImageFile  # whose files look it up there
        for path, kind in zip(paths[:2], ("AVIF", "JPEG 2000"), strict=True):
            with pytest.raises(DataError, match=rf"{path.name}: this build of Pillow has no decoder for {kind}; pip"):
                read_image(path)
    read_image(paths[2])


@pytest.mark.parametrize("name", ["a.heic", "a.jpg", "image"])
def test_heic_is_named_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\0\0\0\x24ftypheic" + bytes(99))
    with pytest.raises(DataError, match=f"{name}: HEIC is not read; export them as JPEG"):
        read_image(tmp_path / name)


def test_kinds_that_are_not_read_say_how_to_convert(tmp_path: Path) -> None:
    assert not set(UNREAD) & set(EXTENSIONS)
    for suffix, way in UNREAD.items():
        (tmp_path / f"a{suffix}").write_bytes(b"something else")
        with pytest.raises(DataError, match=f"{suffix[1:].upper()} is not read; ") as caught:
            image_size(tmp_path / f"a{suffix}")
        assert str(caught.value).endswith(way)


def test_no_program_is_run_for_a_picture(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(noise()).save(file, "EPS")
    (tmp_path / "a.jpg").write_bytes(file.getvalue())
    assert Image.open(tmp_path / "a.jpg").format == "EPS"  # by its content, and decoded by Ghostscript
    with pytest.raises(DataError, match="not a readable image"):
        read_image(tmp_path / "a.jpg")


def test_huge_pictures_are_for_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    for module in (headers, images):
        monkeypatch.setattr(module, "LARGEST", 800)
    monkeypatch.setattr(images, "BAND", 250)
    for suffix in ("jpg", "png", "tif"):
        path = save(tmp_path / f"a.{suffix}", noise(), orientation=6)
        with pytest.raises(DataError, match=rf"a\.{suffix}: 40x24 pixels \(height x width\) are too many.*tiles"):
            read_image(path)
        with pytest.raises(DataError, match="too many"):
            image_size(path)
        shown = read_image(path, huge=True)
        assert shown.shape == (40, 24, 3) and Image.MAX_IMAGE_PIXELS == 400
        with monkeypatch.context() as usual:
            usual.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
            for module in (headers, images):
                usual.setattr(module, "LARGEST", 10**6)
            np.testing.assert_array_equal(shown, read_image(path))


@pytest.mark.slow
def test_picture_above_pillows_limit(tmp_path: Path) -> None:
    pixels = np.zeros((13_000, 14_000), np.uint8)
    pixels[12_000:12_500, 13_000:13_900] = 200
    cv2.imwrite(str(tmp_path / "a.jpg"), pixels)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"13000x14000 pixels .* cut the image"):
        image_size(tmp_path / "a.jpg")
    shown = read_image(tmp_path / "a.jpg", huge=True)
    assert shown.shape == (13_000, 14_000, 3)
    np.testing.assert_array_equal(shown[11_900:, 12_900:, 1] > 100, pixels[11_900:, 12_900:] > 100)


def test_arrays_are_read_as_files_are() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (24, 40, 3), dtype=np.uint16)
    np.testing.assert_array_equal(from_array(values), values >> 8)
    np.testing.assert_array_equal(from_array(noise()[..., 0]), np.repeat(noise()[..., :1], 3, axis=2))
    np.testing.assert_array_equal(from_array(np.asfortranarray(noise())), noise())
    for wrong in (
        noise(channels=4),
        noise(channels=2),
        noise().astype(np.float32),
        noise().astype(np.int32),
        noise()[:0],
    ):
        with pytest.raises(ValueError, match="an image as array must be"):
            from_array(wrong)


def objects(pixels: np.ndarray) -> list[list[int]]:
    """Boxes of the red and the blue rectangle of a drawn picture; the blue one, drawn later, may cover the red one."""
    red, green, blue = pixels.astype(int).transpose(2, 0, 1)
    found = []
    for mask in ((red > 150) & (blue < 110) & (green < 110), (blue > 150) & (red < 110)):
        _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        x, y, w, h = stats[stats[1:, 4].argmax() + 1][:4] if len(stats) > 1 else [0] * 4
        found.append([x, y, x + w, y + h])
    return found


@pytest.mark.parametrize(
    ("name", "split", "count"), [("y_formats", "train", 7), ("y_motion", "train", 2), ("y_motion", "val", 1)]
)
def test_wild_sets_are_read_to_their_pixels(shared_data: Path, name: str, split: str, count: int) -> None:
    if not (shared_data / "wild" / name).is_dir():
        pytest.skip(f"there is no drawn set {name}")
    index = read_yolo(shared_data / "wild" / name, split)
    assert len(index.records) == count and not index.defects
    for record in index.records:
        pixels = read_image(index.root / record.file_name, (record.height, record.width))
        (red,), blue = record.boxes[record.labels == 1], record.boxes[record.labels == 2][0]
        shown = objects(pixels)  # colours of JPEG, at half the resolution, run over the edge by 2 pixels
        np.testing.assert_allclose(blue, shown[1], atol=2.1)
        if shown[0] == [0, 0, 0, 0]:
            assert (red[:2] >= blue[:2]).all() and (red[2:] <= blue[2:]).all()
        else:
            np.testing.assert_allclose(red, shown[0], atol=2.1)
