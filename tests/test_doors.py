"""One picture, one set of pixels: every way into the project reads depth, colours and EXIF alike."""

from __future__ import annotations

import asyncio
import importlib
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from detection.data.augment import eval_transform
from detection.data.dataset import DetectionDataset
from detection.data.images import read_image
from detection.data.records import DataError, Index, Record
from detection.data.spectral import RGB
from detection.inference.detector import to_pixels
from detection.inference.sources import open_source

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "run_exported.py"
HEIGHT, WIDTH = 24, 40
VALUES = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
PIXELS = (VALUES >> 8).astype(np.uint8)


def grey(plane: Any) -> Any:
    return np.repeat(plane[..., None], 3, axis=2)


def smooth() -> Image.Image:
    """What JPEG keeps well."""
    return Image.fromarray(PIXELS[:4, :5]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def deep_png(path: Path) -> Any:
    Image.fromarray(VALUES[..., 0]).save(path)
    return grey(PIXELS[..., 0])


def deep_tiff(path: Path) -> Any:
    Image.fromarray(VALUES[..., 0]).save(path)
    return grey(PIXELS[..., 0])


def deep_colours(path: Path) -> Any:
    cv2.imwrite(str(path), VALUES[..., ::-1])
    return PIXELS


def palette(path: Path) -> Any:
    colours, numbers = PIXELS[:4, :4].reshape(16, 3), VALUES[..., 0] % 16
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putdata(numbers.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    image.save(path, transparency=bytes(range(0, 256, 16)))
    return colours[numbers]


def cmyk(path: Path) -> Any:
    smooth().convert("CMYK").save(path, quality=95)
    return ("close", np.asarray(smooth()))


def grey_alpha(path: Path) -> Any:
    planes = [Image.fromarray(PIXELS[..., i].copy()) for i in range(2)]
    Image.merge("LA", planes).save(path)
    return grey(PIXELS[..., 0])


def turned(orientation: int) -> Any:
    def write(path: Path) -> Any:
        exif = Image.Exif()
        exif[0x0112] = orientation
        smooth().save(path, exif=exif, quality=95)
        a = np.asarray(smooth())  # EXIF 2.32, 4.6.4: where row 0 and column 0 are seen
        seen = (a, a[:, ::-1], a[::-1, ::-1], a[::-1], a.transpose(1, 0, 2), np.rot90(a, -1),
                a.transpose(1, 0, 2)[::-1, ::-1], np.rot90(a))[orientation - 1]  # fmt: skip
        return ("close", seen)

    return write


def floats(path: Path) -> Any:
    Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(path)
    return "32-bit pixels have no known range; convert the image to 8 or 16 bits"


CASES = {
    "deep.png": deep_png,
    "deep.tif": deep_tiff,
    "colours.png": deep_colours,
    "colours.tif": deep_colours,
    "palette.png": palette,
    "cmyk.jpg": cmyk,
    "alpha.png": grey_alpha,
    **{f"turned{number}.jpg": turned(number) for number in range(1, 9)},
    "float.tif": floats,
}


def by_path(path: Path) -> Any:
    return read_image(path)


def by_text(path: Path) -> Any:
    return to_pixels(str(path))


def by_pil(path: Path) -> Any:
    with Image.open(path) as image:
        return to_pixels(image)


def by_loaded_pil(path: Path) -> Any:
    """After loading, when Pillow has turned a TIFF and read all of a PNG."""
    with Image.open(path) as image:
        image.load()
        return to_pixels(image)


def by_folder(path: Path) -> Any:
    source = open_source(str(path.parent))
    found = list(source)
    if source.problems:
        raise DataError(source.problems[0])
    ((name, pixels),) = found
    assert name == path.name
    return pixels


def by_pattern(path: Path) -> Any:
    source = open_source(str(path.parent / "*"))
    found = list(source)
    if source.problems:
        raise DataError(source.problems[0])
    return found[0][1]


def by_training(path: Path) -> Any:
    """The data set, whose records say the size that the reader of the file found."""
    shown = read_image(path).shape[:2]
    index = Index(path.parent, ("a",), (1,), [Record.of(1, path.name, shown, np.zeros((0, 4)), [])])
    return DetectionDataset(index, eval_transform(*sorted(shown)))[0].pixels


def by_onnx(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the runner of exported files gives to onnxruntime."""
    seen: list[Any] = []

    class Session:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def get_modelmeta(self) -> Any:
            return SimpleNamespace(custom_metadata_map={})

        def get_outputs(self) -> Any:
            return [SimpleNamespace(name=name) for name in ("counts", "boxes", "labels", "scores")]

        def run(self, _: None, feed: dict[str, Any]) -> Any:
            seen.append(feed["images"])
            return np.zeros(1, int), np.zeros((1, 0, 4)), np.zeros((1, 0), int), np.zeros((1, 0))

    fake = SimpleNamespace(InferenceSession=Session, get_available_providers=list)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    (path.parent / "detector.onnx").touch()
    monkeypatch.setattr(sys, "argv", ["run_exported.py", str(path.parent / "detector.onnx"), str(path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (batch,) = seen
    assert batch.dtype == np.uint8
    return batch[0].transpose(1, 2, 0)


def by_upload(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the demo page makes of a file that is dropped on it."""
    pytest.importorskip("nicegui", reason='needs pip install "detection[demo]"')
    demo = importlib.import_module("detection.demo.demo_page")
    seen: list[Any] = []
    said: list[str] = []

    class Upload:
        name = path.name

        async def save(self, place: Path) -> None:
            place.write_bytes(path.read_bytes())

    def study(_: Any, __: Any, pixels: Any, ___: Any) -> Any:
        seen.append(pixels)
        return SimpleNamespace(found=(), seconds=0.0)

    async def nothing(*_: Any) -> None: ...

    detector = SimpleNamespace(form=RGB, class_names=("cat",))
    page = demo.Page([demo.Look(detector, None, "a")])
    page.panels[0].count, page.panels[0].begin = SimpleNamespace(set_text=lambda text: None), lambda _: None
    page._upload = SimpleNamespace(reset=lambda: None)
    page._say, page._draw, page._turn = said.append, nothing, nothing
    monkeypatch.setattr(demo, "Study", study)
    asyncio.run(page._take(SimpleNamespace(file=Upload())))
    if not seen:
        raise DataError(said[-1])
    return seen[0]


DOORS = [by_path, by_text, by_pil, by_loaded_pil, by_folder, by_pattern, by_training, by_onnx, by_upload]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", CASES)
def test_every_door_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, door: Any) -> None:
    (tmp_path / "in").mkdir()
    wanted = CASES[name](tmp_path / "in" / name)
    path = tmp_path / "in" / name
    given = (path, monkeypatch) if door in (by_onnx, by_upload) else (path,)
    if isinstance(wanted, str):
        with pytest.raises((DataError, SystemExit), match=wanted):
            door(*given)
        return
    pixels = door(*given)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3
    np.testing.assert_array_equal(pixels, read_image(path))
    if isinstance(wanted, tuple):  # JPEG: as the original to some values
        assert pixels.shape == wanted[1].shape
        assert np.abs(pixels.astype(int) - wanted[1]).mean() < 6
    else:
        np.testing.assert_array_equal(pixels, wanted)


def test_arrays_of_16_bits_are_those_of_their_files(tmp_path: Path) -> None:
    np.testing.assert_array_equal(to_pixels(VALUES), deep_colours(tmp_path / "a.png"))
    np.testing.assert_array_equal(to_pixels(VALUES[..., 0]), deep_png(tmp_path / "b.png"))
    with Image.open(tmp_path / "b.png") as image:
        np.testing.assert_array_equal(to_pixels(np.asarray(image)), read_image(tmp_path / "b.png"))


def test_frames_are_the_pixels_that_were_filmed(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter.fourcc(*"MPNG"), 5.0, (WIDTH, HEIGHT))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no lossless film")
    for image in (PIXELS, 255 - PIXELS):
        writer.write(np.ascontiguousarray(image[..., ::-1]))
    writer.release()
    frames = [pixels for _, pixels in open_source(str(tmp_path / "a.avi"))]
    np.testing.assert_array_equal(frames, [PIXELS, 255 - PIXELS])
