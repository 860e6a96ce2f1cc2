"""Pictures: only what Pillow decodes itself, by its header first; whatever a decoder raises is a reject with its reason."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, PngImagePlugin

from pipeline.decode import PICTURES, decode
from pipeline.records import Column

SHAPE = (3, 8, 8)
RGB = (np.arange(192, dtype=np.uint8).reshape(8, 8, 3) * 5) % 251
BOMB_PX = 13_000


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data, shape=SHAPE):
    """The picture's array, or what was got."""
    arrays, good_N, rejects = decode(pa.table({"x": [data]}), np.arange(1), [Column("x", ("x",), "float32", shape)])
    return arrays["x"][0] if good_N[0] else rejects[0].got


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *chunks):
    """A PNG by its parts: gray, 8 bits."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def rows(width, height):
    """Black rows of a PNG, compressed without ever being there as a whole."""
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(bytes(width + 1)) for _ in range(height)), packer.flush()])


IMAGE = Image.fromarray(RGB)
PALETTE = IMAGE.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
RIGHT = {
    "PNG": (saved(IMAGE), RGB),
    "BMP": (saved(IMAGE, "BMP"), RGB),
    "TIFF": (saved(IMAGE, "TIFF", compression="tiff_lzw"), RGB),
    "PPM": (saved(IMAGE, "PPM"), RGB),
    "WEBP": (saved(IMAGE, "WEBP", lossless=True), RGB),
    "JPEG 2000": (saved(IMAGE, "JPEG2000", irreversible=False), RGB),
    "palette": (saved(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "GIF": (saved(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB"))),
    "first of an animation": (
        saved(PALETTE, "GIF", save_all=True, append_images=[Image.new("P", (8, 8))] * 3),
        np.asarray(PALETTE.convert("RGB")),
    ),
    "CMYK": (saved(IMAGE.convert("CMYK"), "TIFF"), np.asarray(IMAGE.convert("CMYK").convert("RGB"))),
    "alpha": (saved(IMAGE.convert("RGBA")), RGB),
}


@pytest.mark.parametrize(("data", "expected"), RIGHT.values(), ids=RIGHT)
def test_pictures_of_every_kind_become_their_pixels(data, expected):
    """Lossless formats to the bit; palettes, alpha and four inks as Pillow turns them into RGB."""
    assert np.array_equal(np.float32(expected.transpose(2, 0, 1)) / np.float32(255), decoded(data))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
PSD = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 8, 8, 3) + bytes(14 + 3 * 64)
OTHERS = {
    "EPS": EPS,
    "PSD": PSD,
    "ICO": saved(IMAGE, "ICO", sizes=[(8, 8)]),
    "TGA": saved(IMAGE, "TGA"),
    "XBM": b"#define x_width 8\n#define x_height 8\nstatic char x_bits[] = {0,0,0,0,0,0,0,0};\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
    "FITS": b"SIMPLE  =                    T" + b" " * 2850,
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_formats_that_need_other_programs_or_lie_about_their_size_are_rejected(data):
    """No EPS, which starts Ghostscript; nothing by chance of what else is installed."""
    assert "an image that cannot be decoded" in decoded(data)


def test_every_format_that_is_read_is_known_to_pillow():
    """A build without one would fail for all pictures."""
    Image.init()
    assert set(PICTURES) <= set(Image.OPEN)


REJECTED = {
    "16 bits": (saved(Image.fromarray(np.zeros((8, 8), np.uint16))), "an image of mode I;16"),
    "floats": (saved(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "an image of mode F"),
    "another size": (saved(Image.new("RGB", (9, 8))), "an image of 8x9"),
    "cut in its pixels": (saved(IMAGE, "JPEG", quality=95)[:-200], "an image that cannot be decoded (OSError: "),
    "a header without pixels": (png(8, 8), "an image that cannot be decoded ("),
    "text": (b"hello", "an image that cannot be decoded (UnidentifiedImageError: "),
    "nothing": (b"", "an image that cannot be decoded (UnidentifiedImageError: "),
    "no pixels at all": (png(0, 0), "an image that cannot be decoded ("),
    "a text of 100 MB in 100 kB": (
        png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100 << 20))), chunk(b"IDAT", rows(8, 8))),
        "an image that cannot be decoded (ValueError: Decompressed data too large",
    ),
}


@pytest.mark.parametrize(("data", "got"), REJECTED.values(), ids=REJECTED)
def test_a_picture_that_cannot_be_used_is_a_reject_with_its_reason(data, got):
    """What a decoder raises, of whatever kind, is shown in one line."""
    found = decoded(data)
    assert (got, True) == (found[: len(got)], found.isprintable())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixels_are_not_decoded_where_the_size_is_wrong(monkeypatch):
    """The header says how large a picture is, and nothing else of it is looked at."""
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("decoded"))
    bomb = png(BOMB_PX, BOMB_PX, chunk(b"IDAT", b""))
    assert f"an image of {BOMB_PX}x{BOMB_PX}" == decoded(bomb)


MEASURE = """
import resource, sys, warnings
import numpy as np, pyarrow as pa
from pipeline.decode import decode
from pipeline.records import Column

warnings.simplefilter("ignore")
column = Column("x", ("x",), "float32", (3, 8, 8))
small, *bombs = (open(path, "rb").read() for path in sys.argv[1:])
assert decode(pa.table({"x": [small]}), np.arange(1), [column])[1].all()  # what importing takes is no part of it
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, good_N, rejects = decode(pa.table({"x": bombs}), np.arange(len(bombs)), [column])
print(good_N.sum(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def resized(kind, **options):
    """A picture of 64 x 64 whose header says that it is huge: opening it reads no more than that."""
    small, huge = (
        {"WEBP": struct.pack("<I", (side - 1) | (side - 1) << 14)[:3], "TIFF": struct.pack("<HHII", 256, 4, 1, side)}[
            kind
        ]
        for side in (64, BOMB_PX)
    )
    data = saved(Image.new("RGB", (64, 64)), kind, **options)
    assert small in data
    return data.replace(small, huge, 1)


def test_small_files_of_huge_pictures_cost_no_memory(tmp_path):
    """13,000 x 13,000 pixels are 500 MB decoded; the peak of the process grows by less than 32 MiB."""
    real = png(BOMB_PX, BOMB_PX, chunk(b"IDAT", rows(BOMB_PX, BOMB_PX)))
    bombs = {"png": real, "webp": resized("WEBP", lossless=True), "tif": resized("TIFF")}
    assert max(map(len, bombs.values())) < 200_000
    for name, data in {"small": saved(IMAGE), **bombs}.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in ("small", *bombs)]
    command = [sys.executable, "-c", MEASURE, *paths]
    good, grown_kib = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert good == 0
    assert grown_kib < 32 << 10
