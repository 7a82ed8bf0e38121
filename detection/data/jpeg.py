"""What the segments of a JPEG file tell: its size, and whether it holds its whole picture.

Decoders don't say the latter: what is missing they paint grey.

A JPEG is a chain of marked segments (ITU-T T.81, annex B). A scan's own bytes follow its header; the end marker ends
the picture. Files of phones go on behind it with a film or a second picture, and some writers leave the end marker out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

END = b"\xff\xd9"
SCAN, FRAMES = 0xDA, (0xC0, 0xC1, 0xC2)  # start of a scan; of a baseline, extended or progressive picture
QUANTISATION, PROFILE = 0xDB, 0xE2  # tables; a colour profile, or other data of applications
PLAIN = (0xC4, 0xDD, 0xE0, *range(0xE3, 0xED), 0xFE)  # tables, restarts, JFIF, data of applications, a comment
ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length
# Inside a scan FF is followed by 00, by a restart marker or by another FF.
AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
# What may follow a scan without being a marker. Pixels that were decoded from it instead of from the scan change.
STRAY = tuple(np.random.default_rng(0).integers(0, 255, (2, 4096), np.uint8))


def plain_size(head: bytes) -> tuple[int, int] | None:
    """`(height, width)` of a JPEG whose header is as most are; None where it needs a closer look, or is none.

    A closer look is for EXIF, which may turn the picture, for previews of phones, and for whatever Pillow would refuse.

    Args:
        head: the first bytes of the file, at best all before the first scan.
    """
    at, size = 2, None
    while head.startswith(b"\xff\xd8\xff") and at + 4 <= len(head) and head[at] == 0xFF:
        code, end = head[at + 1], at + 2 + int.from_bytes(head[at + 2 : at + 4])
        body = head[at + 4 : end]
        if end > len(head) or end < at + 4:
            return None
        if code == SCAN:
            return size
        if code in FRAMES:
            if size is not None or len(body) < 6 or body[0] != 8 or body[5] not in (1, 3, 4):
                return None
            if len(body) != 6 + 3 * body[5]:
                return None
            size = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
            if not all(size):
                return None
        elif code == QUANTISATION:
            if len(body) % 65 or any(body[i] > 3 for i in range(0, len(body), 65)):
                return None
        elif not (code in PLAIN or (code == PROFILE and body.startswith(b"ICC_PROFILE\0") and len(body) > 14)):
            return None
        at = end
    return None


def with_end(data: bytes) -> bytes | None:
    """The file as decoders want it, up to an end marker or beyond; None where a part of the picture is missing.

    A file that stops without the marker is whole if it has every scan and nothing behind them would change a pixel.
    """
    if data.endswith(END) or END in (marker for marker, _ in _segments(data)):
        return data
    data = data.removesuffix(END[:1])
    return data + END if _has_all_scans(data) and _is_filled(data) else None


def lacks_end(data: bytes) -> bool:
    """Whether no end marker ends the picture."""
    return not data.endswith(END) and END not in (marker for marker, _ in _segments(data))


def is_grey_at_end(pixels: NDArray[np.uint8]) -> bool:
    """Whether the last pixels of `(H, W, 3)` are the grey of missing blocks, which an end marker may hide.

    Where less than the last block is missing, it is no more than that which looks wrong, and is not seen.
    """
    return bool((pixels[-1, -8:] == 128).all())


def ends_early(data: bytes) -> bool:
    """Whether the last scan stops short of the picture, though an end marker follows."""
    last = max((start for marker, start in _segments(data) if marker == END), default=len(data))
    return not _is_filled(data[:last])


def _segments(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Marker and place of each segment, up to the end marker of the picture or the end of the file."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        code = data[at + 1]
        if code == 0xFF:  # filling
            at += 1
            continue
        yield data[at : at + 2], at
        if data[at : at + 2] == END:
            return
        if code in ALONE or code == 0:
            at += 2
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
        if code == SCAN:
            found = AFTER_SCAN.search(data, at)
            at = found.start() if found else len(data)


def _has_all_scans(data: bytes) -> bool:
    """Whether every coefficient of every component is there to its last bit (T.81, B.2.3 and G.1.1.1)."""
    wanted: set[tuple[int, int]] = set()
    given: set[tuple[int, int]] = set()
    for marker, at in _segments(data):
        body = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
        if marker[1] in FRAMES and len(body) > 5 and len(body) >= 6 + 3 * body[5]:
            wanted |= {(body[6 + 3 * i], k) for i in range(body[5]) for k in range(64)}
        if marker[1] == SCAN and body and len(body) >= 4 + 2 * body[0]:
            first, last, bits = body[-3:]
            if bits & 15 == 0:  # no lower bits are left for later scans
                given |= {(body[1 + 2 * i], k) for i in range(body[0]) for k in range(first, last + 1)}
    return bool(wanted) and wanted <= given


def _is_filled(data: bytes) -> bool:
    """Whether a picture whose end marker is cut off is the same whatever follows its last scan."""
    whole, *others = (_decoded(data + stray.tobytes() + END) for stray in (STRAY[0][:0], *STRAY))
    return whole is not None and all(other == whole for other in others)


def _decoded(data: bytes) -> bytes | None:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.tobytes()
    except Exception:  # a damaged file makes Pillow raise several types
        return None
