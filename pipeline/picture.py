"""Pictures of examples: thumbnails from payload values, and the contact sheet of a run."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

THUMB_PX = 84
GAP_PX = 8
CAPTION_PX = 30
HEAD_PX = 56
QUERY_PX = 190
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
INK, FAINT, PAPER, GOOD, BAD = "#1b1f24", "#6b7280", "#ffffff", "#15803d", "#b91c1c"


@dataclass(frozen=True)
class Tile:
    """One example on the sheet: its picture and up to two short lines under it."""

    picture: Image.Image
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Strip:
    """One query on the sheet, beside its strongest proponents and opponents."""

    query: Tile
    proponents: Sequence[Tile]
    opponents: Sequence[Tile]


def picture_of(pixels: np.ndarray) -> Image.Image:
    """Numbers [H, W] or [C, H, W] as a thumbnail, stretched to the full range of gray or colour."""
    pixels = pixels.transpose(1, 2, 0).squeeze() if pixels.ndim == 3 else pixels
    low, high = float(pixels.min()), float(pixels.max())
    return _fitted(Image.fromarray(((pixels - low) / ((high - low) or 1) * 255).astype(np.uint8)).convert("RGB"))


def _fitted(image: Image.Image) -> Image.Image:
    """Scaled to a thumbnail: by whole pixels when small, so that what the model saw stays visible."""
    scale = THUMB_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def contact_sheet(title: str, strips: Sequence[Strip]) -> bytes:
    """Each query beside its strongest proponents and opponents, as PNG."""
    left = max((len(strip.proponents) for strip in strips), default=0)
    right = max((len(strip.opponents) for strip in strips), default=0)
    cell, row_px = THUMB_PX + GAP_PX, THUMB_PX + CAPTION_PX + 2 * GAP_PX
    opponents_x = QUERY_PX + left * cell + 2 * GAP_PX
    sheet = Image.new("RGB", (opponents_x + right * cell + GAP_PX, HEAD_PX + len(strips) * row_px), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP_PX, GAP_PX), title, INK, _font(15))
    draw.text((GAP_PX, HEAD_PX - 20), "query", FAINT, _font(13))
    draw.text((QUERY_PX, HEAD_PX - 20), "strongest proponents, left to right", GOOD, _font(13))
    if right:
        draw.text((opponents_x, HEAD_PX - 20), "strongest opponents", BAD, _font(13))
    for i, strip in enumerate(strips):
        y = HEAD_PX + i * row_px
        draw.line((GAP_PX, y - 2, sheet.width - GAP_PX, y - 2), "#e5e7eb")
        _query(sheet, draw, strip.query, y + GAP_PX)
        for x0, tiles in ((QUERY_PX, strip.proponents), (opponents_x, strip.opponents)):
            for j, tile in enumerate(tiles):
                _tile(sheet, draw, tile, x0 + j * cell, y + GAP_PX)
    return to_png(sheet)


def _query(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, y: int) -> None:
    sheet.paste(tile.picture, (GAP_PX, y))
    for line, text in enumerate(tile.lines):
        x = GAP_PX if line == 0 else GAP_PX + THUMB_PX + GAP_PX
        top = y + THUMB_PX + 2 if line == 0 else y + 4 + (line - 1) * 15
        width = QUERY_PX - 2 * GAP_PX if line == 0 else QUERY_PX - THUMB_PX - 3 * GAP_PX
        draw.text((x, top), _clipped(draw, text, 13 if line == 0 else 11, width), INK, _font(13 if line == 0 else 11))


def _tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    sheet.paste(tile.picture, (x, y))
    for line, text in enumerate(tile.lines):
        draw.text(
            (x, y + THUMB_PX + 2 + line * 13),
            _clipped(draw, text, 11, THUMB_PX),
            INK if line == 0 else FAINT,
            _font(11),
        )


def _clipped(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """The text, shortened until it fits."""
    if draw.textlength(text, _font(size)) <= width:
        return text
    while text and draw.textlength(text + "…", _font(size)) > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def to_png(image: Image.Image) -> bytes:
    """PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def png_problem(data: bytes) -> str:
    """Why a PNG is not as it was written, by the checksum of each of its chunks; empty if it is."""
    at = len(_PNG_SIGNATURE)
    if data[:at] != _PNG_SIGNATURE:
        return "is no PNG"
    kind = b""
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, at) if at + 8 <= len(data) else (0, b"")
        stop = at + 8 + size
        if stop + 4 > len(data) or zlib.crc32(data[at + 4 : stop]) != int.from_bytes(data[stop : stop + 4]):
            return f"is damaged at byte {at:,}: a wrong checksum"
        at = stop + 4
    return "" if at == len(data) else f"has {len(data) - at:,} bytes behind its end"
