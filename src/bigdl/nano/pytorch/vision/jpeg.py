"""What a JPEG file says about itself, and whether its structure is whole. Stdlib only.

libjpeg forgives almost everything it meets inside the picture data and only warns; Pillow refuses
a file whose data ends too early or that holds a marker which does not belong there. So that the
fast decoder accepts exactly what Pillow accepts, it only gets files whose markers follow one
another as the standard has them, up to the end-of-image marker. Everything else is Pillow's.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["JpegHeader", "read_header"]

_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; Huffman coded
_DHT, _EOI, _SOS, _DQT, _DRI, _COM = 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xFE
_TABLES = frozenset({_DHT, _DQT, _DRI, _COM, *range(0xE0, 0xF0)})

# Within picture data 0xFF is followed by 0x00 (a real 0xFF) or a restart marker.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class JpegHeader(NamedTuple):
    """Size of the picture in the file, before any EXIF turn, and its channels (1 or 3)."""

    height: int
    width: int
    channels: int


def read_header(data: bytes) -> JpegHeader | None:
    """Read the header of a plain, complete JPEG.

    Returns:
        None where Pillow has to judge: not a JPEG, truncated, CMYK, 12 bits, arithmetic coding,
        a second frame, unknown or misplaced markers.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    frame = None
    marker, start, stop = _segment(data, 2)
    while marker != _SOS:
        if marker in _FRAMES and frame is None:
            frame = _frame(data[start:stop])
            if frame is None:
                return None
        elif marker not in _TABLES:
            return None
        marker, start, stop = _segment(data, stop)
    if frame is None or not _is_scan(data[start:stop], frame.channels):
        return None
    return frame if _reaches_end(data, start, stop, frame.channels) else None


def _segment(data: bytes, at: int) -> tuple[int, int, int]:
    """Marker at ``at`` and where its content starts and stops; marker -1 if there is none."""
    if at + 4 > len(data) or data[at] != 0xFF:
        return -1, at, at
    length = (data[at + 2] << 8) | data[at + 3]
    if length < 2 or at + 2 + length > len(data):
        return -1, at, at
    return data[at + 1], at + 4, at + 2 + length


def _frame(content: bytes) -> JpegHeader | None:
    if len(content) < 6 or content[0] != 8:
        return None
    height, width = (content[1] << 8) | content[2], (content[3] << 8) | content[4]
    channels = content[5]
    if not height or not width or channels not in (1, 3) or len(content) != 6 + 3 * channels:
        return None
    return JpegHeader(height, width, channels)


def _is_scan(content: bytes, channels: int) -> bool:
    return bool(content) and 1 <= content[0] <= channels and len(content) == 4 + 2 * content[0]


def _is_huffman_table(content: bytes) -> bool:
    at = 0
    while at + 17 <= len(content):
        at += 17 + sum(content[at + 1 : at + 17])
    return bool(content) and at == len(content)


def _reaches_end(data: bytes, start: int, stop: int, channels: int) -> bool:
    """Whether nothing but further scans and their tables lies before the end-of-image marker.

    ``start`` and ``stop`` are those of the first scan header. A scan of all channels may also be
    one of several (progressive files), so what follows it has to look right, whatever the frame.
    """
    while True:
        found = _NEXT_MARKER.search(data, stop)
        if found is None:
            return False
        if data[found.start() + 1] == _EOI:
            return True
        marker, start, stop = _segment(data, found.start())
        while (marker == _DHT and _is_huffman_table(data[start:stop])) or (
            marker == _DRI and stop - start == 2
        ):
            marker, start, stop = _segment(data, stop)
        if marker != _SOS or not _is_scan(data[start:stop], channels):
            return False
