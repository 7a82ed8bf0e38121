"""The size of a plain JPEG, read from its header, is the one that Pillow gives."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detection.data import images, jpeg
from detection.data.images import image_size
from detection.data.records import DataError
from tests.data.test_images import noise, save

HEADERS: list[tuple[str, dict[str, object]]] = [
    ("RGB", {}),
    ("L", {"quality": 5}),
    ("RGB", {"progressive": True, "comment": b"a picture", "dpi": (300, 300)}),
    ("RGB", {"restart_marker_blocks": 2, "subsampling": 0, "icc_profile": b"colours" * 40}),
]


@pytest.mark.parametrize(("mode", "options"), HEADERS)
def test_size_of_a_plain_jpeg_is_read_without_pillow(
    tmp_path: Path, mode: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.jpg", noise(24, 40), mode, **options)
    monkeypatch.setattr(images, "read_header", lambda *_: pytest.fail("Pillow was asked"))
    assert image_size(path) == image_size(path, (40, 24)) == (24, 40)


@pytest.mark.parametrize("options", [{"orientation": 6}, {"orientation": 8, "comment": b"turned"}])
def test_a_turned_jpeg_is_left_to_pillow(tmp_path: Path, options: dict[str, Any]) -> None:
    path = save(tmp_path / "a.jpg", noise(24, 40), **options)
    assert jpeg.plain_size(path.read_bytes()) is None and image_size(path) == (40, 24)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(HEADERS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3), st.floats(0, 2))
def test_what_is_plain_is_what_pillow_opens(
    header: tuple[str, dict[str, object]], damage: list[tuple[float, int]], kept: float
) -> None:
    stream, (mode, options) = io.BytesIO(), header
    Image.fromarray(noise(24, 40)).convert(mode).save(stream, "JPEG", **options)  # type: ignore[arg-type]
    data = bytearray(stream.getvalue())
    before = data.index(b"\xff\xda")
    for place, value in damage:
        data[int(place * (before - 1))] = value
    head = bytes(data[: int(kept * len(data))])
    size = jpeg.plain_size(head)
    if not damage and kept >= 1:
        assert size == (24, 40)
    if size is not None:
        with Image.open(io.BytesIO(head), formats=("JPEG",)) as image:
            assert image.size == size[::-1] and "exif" not in image.info


@pytest.mark.parametrize("name", ["nowhere.jpg", "a\0b.jpg"])
def test_what_can_not_be_opened_is_said_as_of_any_picture(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError):
        image_size(tmp_path / name)
