"""Images of any channels and 16 bits: what is read, what is refused, and that augmentation and batches keep it."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from detection.data.augment import eval_transform, train_transform
from detection.data.dataset import DetectionDataset, collate
from detection.data.images import image_size, read_image
from detection.data.mixing import Picture, copy_paste, mosaic
from detection.data.pipeline import try_steps
from detection.data.records import DataError, Index, Record
from detection.data.spectral import RGB, ChannelStatistics, PixelFormat, false_colour
from tests import twins

FORMS = [PixelFormat(c, d) for c, d in ((1, 8), (2, 8), (4, 8), (5, 8), (10, 8), (1, 16), (3, 16), (4, 16), (7, 16))]


def pixels_of(form: PixelFormat, height: int = 20, width: int = 30) -> NDArray[Any]:
    """Smooth in space, different in each channel, over the whole range."""
    y, x, c = np.mgrid[0:height, 0:width, 0 : form.channels]
    waves = 0.5 + 0.5 * np.sin(x / 7 + c) * np.cos(y / 5 - c / 2)
    return (waves * form.highest).round().astype(form.dtype)


def tiff(path: Path, pixels: NDArray[Any], planes: bool = False, photometric: int = 1, orientation: int = 1) -> None:
    """An uncompressed TIFF, written byte by byte as TIFF 6.0 says, with our own hands and no library."""
    height, width, samples = pixels.shape
    parts = [pixels[..., i].tobytes() for i in range(samples)] if planes else [pixels.tobytes()]
    bits = 8 * pixels.dtype.itemsize
    places, place = [], 8
    for part in parts:
        places.append(place)
        place += len(part)
    extra = b""

    def many(code: str, values: list[int]) -> tuple[int, bytes]:
        nonlocal extra
        packed = struct.pack(f"<{len(values)}{code}", *values)
        if len(packed) <= 4:
            return len(values), packed.ljust(4, b"\0")
        offset = place + len(extra)
        extra += packed + b"\0" * (len(packed) % 2)
        return len(values), struct.pack("<I", offset)

    unspecified = [0] * (samples - (3 if photometric == 2 else 1))
    rows = [(256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * samples), (259, 3, [1]), (262, 3, [photometric])]
    rows += [(273, 4, places), (274, 3, [orientation]), (277, 3, [samples]), (278, 4, [height])]
    rows += [(279, 4, [len(part) for part in parts]), (284, 3, [2 if planes else 1])]
    rows += [(338, 3, unspecified)] if unspecified else []
    table = b""
    for tag, kind, values in rows:
        count, value = many("H" if kind == 3 else "I", values)
        table += struct.pack("<HHI", tag, kind, count) + value
    start = place + len(extra)
    directory = struct.pack("<H", len(rows)) + table + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", start) + b"".join(parts) + extra + directory)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_arrays_of_any_format_are_read_as_they_are(form: PixelFormat, tmp_path: Path) -> None:
    pixels = pixels_of(form)
    np.save(tmp_path / "a.npy", pixels)
    found = read_image(tmp_path / "a.npy", (20, 30), form=form)
    assert found.dtype == form.dtype and np.array_equal(found, pixels)
    assert image_size(tmp_path / "a.npy") == (20, 30)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("form", [f for f in FORMS if f.channels in (1, 3, 4)], ids=str)
def test_files_that_opencv_wrote_are_read_in_red_green_blue(form: PixelFormat, suffix: str, tmp_path: Path) -> None:
    pixels = pixels_of(form)
    twins.write(tmp_path / f"a{suffix}", pixels)
    assert np.array_equal(read_image(tmp_path / f"a{suffix}", None, form=form), pixels)
    assert image_size(tmp_path / f"a{suffix}") == (20, 30)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 2), ("RGBA", 4)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_files_that_pillow_wrote_keep_colours_under_transparency(
    mode: str, channels: int, suffix: str, tmp_path: Path
) -> None:
    pixels = pixels_of(PixelFormat(channels))
    pixels[..., -1] = pixels[..., -1] // 2  # what a reader that multiplies by alpha would darken
    Image.fromarray(pixels.squeeze(), mode).save(tmp_path / f"a{suffix}")
    assert np.array_equal(read_image(tmp_path / f"a{suffix}", None, form=PixelFormat(channels)), pixels)


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("form", [f for f in FORMS if f.channels > 1 and f != PixelFormat(3, 16)], ids=str)
def test_tiffs_of_any_number_of_samples_are_read(form: PixelFormat, planes: bool, tmp_path: Path) -> None:
    pytest.importorskip("tifffile")
    pixels = pixels_of(form)
    tiff(tmp_path / "a.tif", pixels, planes)
    assert image_size(tmp_path / "a.tif") == (20, 30)
    assert np.array_equal(read_image(tmp_path / "a.tif", (20, 30), form=form), pixels)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pages_of_a_tiff_are_channels(form: PixelFormat, tmp_path: Path) -> None:
    pixels = pixels_of(form)
    pages = [np.ascontiguousarray(pixels[..., i]) for i in range(form.channels)]
    assert cv2.imwritemulti(str(tmp_path / "a.tif"), pages)
    assert np.array_equal(read_image(tmp_path / "a.tif", None, form=form), pixels)


def test_another_number_of_channels_or_depth_is_one_sentence_with_file_found_and_wanted(tmp_path: Path) -> None:
    for name, pixels in (("rgb.png", pixels_of(RGB)), ("deep.png", pixels_of(PixelFormat(4, 16)))):
        twins.write(tmp_path / name, pixels)
    wanted = PixelFormat(4, 8)
    with pytest.raises(DataError, match=r"rgb\.png: the image has 3 channels of 8 bits, but 4 channels of 8 bits are"):
        read_image(tmp_path / "rgb.png", None, form=wanted)
    with pytest.raises(DataError, match=r"deep\.png: the image has 4 channels of 16 bits, but 4 channels of 8 bits"):
        read_image(tmp_path / "deep.png", None, form=wanted)


def test_a_palette_counts_as_its_colours(tmp_path: Path) -> None:
    Image.fromarray(pixels_of(RGB)).quantize(8).save(tmp_path / "p.png")
    with pytest.raises(DataError, match="3 channels of 8 bits, but 1 channel of 8 bits"):
        read_image(tmp_path / "p.png", None, form=PixelFormat(1, 8))


def test_what_can_not_be_rgb_says_what_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels_of(PixelFormat(5, 16)))
    with pytest.raises(DataError, match=r"a\.npy: the image has 5 channels of 16 bits: set data\.channels to 5 and"):
        read_image(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "array", [np.zeros((4, 5, 3), np.float32), np.zeros(7, np.uint8), np.zeros((0, 5, 3), np.uint8)]
)
def test_arrays_that_are_no_images_are_refused(array: NDArray[Any], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"a\.npy: .*"):
        read_image(tmp_path / "a.npy", None, form=PixelFormat(4, 8))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[Path("x")]], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy"):
        read_image(tmp_path / "a.npy", None, form=PixelFormat(1, 8))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_truncated_files_are_refused(suffix: str, tmp_path: Path) -> None:
    form, path = PixelFormat(4, 16), tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).integers(0, 65536, (64, 64, 4)).astype(np.uint16)
    twins.write(path, noise)
    whole = path.read_bytes()
    for share in (0.2, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=f"a{suffix}"):
            read_image(path, None, form=form)


def test_a_tiff_that_lies_on_its_side_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tifffile")
    tiff(tmp_path / "a.tif", pixels_of(PixelFormat(5, 8)), orientation=3)
    with pytest.raises(DataError, match="orientation tag is 3: save it upright"):
        read_image(tmp_path / "a.tif", None, form=PixelFormat(5, 8))


def test_the_annotated_size_is_checked(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels_of(PixelFormat(4, 8)))
    with pytest.raises(DataError, match=r"20x30 .* but its annotation says 30x20"):
        read_image(tmp_path / "a.npy", (30, 20), form=PixelFormat(4, 8))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_statistics_are_numpys_over_all_images(form: PixelFormat) -> None:
    images, statistics = [pixels_of(form), pixels_of(form, 31, 17) // 3], ChannelStatistics(form)
    for image in images:
        statistics.add(image)
    every = np.concatenate([image.reshape(-1, form.channels) for image in images]) / form.highest
    mean, std = statistics.mean_and_std()
    np.testing.assert_allclose(mean, every.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(std, every.std(axis=0), rtol=1e-3)


def test_a_channel_that_never_changes_is_not_divided_by_nothing() -> None:
    statistics = ChannelStatistics(PixelFormat(2, 8))
    statistics.add(np.full((4, 4, 2), 51, np.uint8))
    assert statistics.mean_and_std() == ([0.2, 0.2], [1.0, 1.0])


def test_false_colour_shows_three_channels_and_stretches_16_bits() -> None:
    rgb = pixels_of(RGB)
    assert false_colour(rgb) is rgb
    many = pixels_of(PixelFormat(6, 8))
    assert np.array_equal(false_colour(many), many[..., :3])
    grey = pixels_of(PixelFormat(1, 8))
    assert np.array_equal(false_colour(grey), grey.repeat(3, axis=2))
    dark = false_colour(pixels_of(PixelFormat(4, 16)) // 64)  # 10 of 16 bits are used
    assert dark.dtype == np.uint8 and dark.shape == (20, 30, 3)
    assert dark.min() < 10 and dark.max() > 245


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_our_own_augmentation_keeps_channels_and_depth(form: PixelFormat) -> None:
    """Every channel must be what the same augmentation makes of it when it is the only one."""
    pixels, boxes = pixels_of(form, 60, 80), np.array([[10, 12, 50, 40]], np.float32)
    geometry: list[Any] = [A.Affine(rotate=(-20, 20), p=1), A.MotionBlur(p=1)]
    for options in ({"augmentations": geometry, "vflip": 1.0}, {"scale_jitter": (0.4, 1.6), "hflip": 1.0}):
        transform = train_transform(48, 96, form=form, **options)  # type: ignore[arg-type]
        out = transform(pixels, boxes, seed=3)
        assert out.image.dtype == form.dtype and out.image.shape[2] == form.channels
        one = train_transform(48, 96, form=PixelFormat(1, form.depth), **options)  # type: ignore[arg-type]
        for channel in range(form.channels):
            alone = one(np.ascontiguousarray(pixels[..., channel, None]), boxes, seed=3)
            apart = np.abs(alone.image[..., 0].astype(float) - out.image[..., channel])
            # Of 2 channels, and of more than 4, OpenCV rounds places to 1/32 pixel: 1/64 of an edge of black and white
            assert apart.max() <= (form.highest / 64 if "augmentations" in options else 0)


@pytest.mark.parametrize("channels", [1, 4])
def test_the_photometric_changes_of_16_bits_are_those_of_8(channels: int) -> None:
    few, boxes = pixels_of(PixelFormat(channels, 8), 60, 80), np.zeros((0, 4), np.float32)
    changed = 0.0
    for seed in range(8):
        outs = []
        for form, pixels in ((PixelFormat(channels, 8), few), (PixelFormat(channels, 16), few.astype(np.uint16) * 257)):
            outs.append(train_transform(60, 80, 0, photometric=0.7, form=form)(pixels, boxes, seed=seed).image)
        assert np.abs(outs[0].astype(float) - outs[1] / 257).max() <= 3  # 8 bits round in each of two steps
        changed = max(changed, float(np.abs(outs[0].astype(float) - few).mean()))
    assert changed > 5


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_mosaics_and_pasted_objects_keep_channels_and_depth(form: PixelFormat) -> None:
    pixels = pixels_of(form, 60, 80)
    masks = np.zeros((1, 60, 80), np.uint8)
    masks[0, 12:40, 10:50] = 1
    picture = Picture(pixels, np.array([[10, 12, 50, 40]], np.float32), np.array([1]), masks)
    other = picture._replace(image=np.full_like(pixels, form.highest))
    for mixed in (mosaic([picture] * 4, random.Random(0)), copy_paste(picture, other, random.Random(0))):
        assert mixed.image.dtype == form.dtype and mixed.image.shape == pixels.shape
    pasted = mixed.masks[-1].astype(bool)  # type: ignore[index]
    assert (mixed.image[pasted] == form.highest).all() and pasted.any()
    free = ~pasted
    assert np.array_equal(mixed.image[free], pixels[free])


def test_transforms_that_need_rgb_or_8_bits_are_refused_by_name() -> None:
    geometry = [A.Affine(rotate=(-20, 20), p=0.5), A.HorizontalFlip(), A.OneOf([A.MotionBlur(), A.GaussianBlur()])]
    for form in FORMS:
        try_steps(geometry, form)
    with pytest.raises(ValueError, match="HueSaturationValue can't take images of 4 channels of 8 bits; leave it out"):
        try_steps([*geometry, A.HueSaturationValue(p=0.1)], PixelFormat(4, 8))
    with pytest.raises(ValueError, match="RandomGamma can't take images of 3 channels of 16 bits"):
        try_steps([A.OneOf([A.RandomGamma()], p=0.1)], PixelFormat(3, 16))
    with pytest.raises(ValueError, match="GaussNoise"):
        try_steps([A.GaussNoise()], PixelFormat(1, 16))
    try_steps([A.RandomCrop(5000, 5000)], PixelFormat(4, 8))  # its size is another matter


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_carry_channels_and_depth(form: PixelFormat, workers: int, tmp_path: Path) -> None:
    records = []
    for i, (height, width) in enumerate([(60, 80), (50, 70), (60, 80)]):
        np.save(tmp_path / f"{i}.npy", pixels_of(form, height, width))
        records.append(Record.of(i, f"{i}.npy", (height, width), [[5, 5, 30, 30]], [1]))
    index = Index(tmp_path, ("thing",), (1,), records)
    dataset = DetectionDataset(index, eval_transform(60, 80), form=form)
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=collate, num_workers=workers)
    for batch in loader:
        assert batch.images.dtype == (torch.uint16 if form.depth == 16 else torch.uint8)
        assert batch.images.shape == (3, form.channels, 64, 96)
        first = batch.images[0, :, :60, :80].numpy()
        assert np.array_equal(first.transpose(1, 2, 0), pixels_of(form, 60, 80))
        assert not batch.images[0, :, 60:].numpy().any() and not batch.images[0, :, :, 80:].numpy().any()
