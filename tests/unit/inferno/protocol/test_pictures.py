"""Sizes of pictures from their headers, against Pillow's, and files that lie."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from typing import Any

import pytest
from PIL import Image

from inferno.errors import InvalidInput
from inferno.protocol import pictures
from inferno.protocol.limits import Limits
from inferno.protocol.signature import Signature
from tests.pictures import PNG_MAGIC, png_chunk, png_header

SIGNATURE = Signature.model_validate(
    {
        "inputs": [{"name": "image", "dtype": "bytes", "shape": ["batch"], "content": "image"}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
    }
)
LIMITS = Limits(image_pixels=1000, total_pixels=2500)


def saved(mode: str, size: tuple[int, int], form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1).save(file, form, **options)
    return file.getvalue()


def frames(form: str) -> bytes:
    file = io.BytesIO()
    several = [Image.new("RGB", (31, 17), (n, 0, 0)) for n in range(3)]
    several[0].save(file, form, save_all=True, append_images=several[1:])
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
FILES = {
    "png": saved("RGBA", (31, 17), "PNG"),
    "png with texts": saved("RGB", (31, 17), "PNG", icc_profile=b"profile" * 999),
    "jpeg": saved("RGB", (31, 17), "JPEG"),
    "progressive jpeg": saved("RGB", (31, 17), "JPEG", progressive=True),
    "grey jpeg with exif": saved("L", (31, 17), "JPEG", exif=EXIF, comment=b"\xff\xda\xff\xc0"),
    "jpeg with a profile": saved("RGB", (31, 17), "JPEG", icc_profile=b"\xff\xc0" * 70_000),
    "gif": saved("P", (31, 17), "GIF", comment=b"long " * 200),
    "animated gif": frames("GIF"),
    "webp": saved("RGB", (31, 17), "WEBP"),
    "lossless webp": saved("RGB", (31, 17), "WEBP", lossless=True),
    "webp with alpha": saved("RGBA", (31, 17), "WEBP", exif=EXIF),
    "animated webp": frames("WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_size_is_what_pillow_says(name: str) -> None:
    with Image.open(io.BytesIO(FILES[name])) as picture:
        assert pictures.size(FILES[name]) == picture.size == (31, 17)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_off_is_measured_or_refused(name: str) -> None:
    found = {_measured(FILES[name][:end]) for end in range(12, min(len(FILES[name]), 1500))}
    assert found <= {(31, 17), "the image is truncated", "the image has 0x0 pixels"}


def _measured(raw: bytes) -> object:
    try:
        return pictures.size(raw)
    except ValueError as exc:
        return str(exc)


def test_other_bytes_have_no_size() -> None:
    for raw in (b"", b"text", b"RIFF\x24\0\0\0WAVEfmt ", b"BM" + bytes(60)):
        assert pictures.size(raw) is None


def gif(screen: int, frame: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0, 0, 0)
    return head + b"\x2c" + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\2\1\0\0\x3b"


def jpeg(*sides: int) -> bytes:
    frame = b"".join(
        b"\xff\xc0\0\x0b\x08" + struct.pack(">HH", n, n) + b"\1\1\x11\0" for n in sides
    )
    return b"\xff\xd8" + frame + b"\xff\xda"


SECOND_HEADER = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 6, 0, 0, 0))
TEXTS = [png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10_000_000), 9)) for _ in range(20)]


@pytest.mark.parametrize(
    ("raw", "detail"),
    [
        (png_header(50_000, 50_000), "at most 1000 pixels, got 50000x50000"),
        (png_header(2**31 - 1, 2**31 - 1), "got 2147483647x2147483647"),
        (png_header(0, 0), "the image has 0x0 pixels"),
        (png_header(3, 3, SECOND_HEADER), "got 9000x9000"),
        (png_header(3, 3, png_chunk(b"tEXt", b"IDAT"), SECOND_HEADER), "got 9000x9000"),
        (png_header(3, 3, *[png_chunk(b"tEXt", b"")] * 3000), "more than 2000 parts"),
        (PNG_MAGIC + b"...", "truncated"),
        (gif(65_535, 1), "got 65535x65535"),
        (gif(1, 65_535), "got 65535x65535"),
        (b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\1a" * 99_999, "more than 2000 parts"),
        (b"GIF89a" + bytes(99_999), "more than 2000 parts"),
        (jpeg(1, 60_000), "got 60000x60000"),
        (jpeg(60_000, 1), "got 60000x60000"),
        (b"\xff\xd8" + b"\xff\xe0\0\2" * 99_999, "more than 2000 parts"),
        (b"\xff\xd8" + b"\xff" * 99_999, "truncated"),
        (jpeg(10) + b"\xff\xda" * 200, "more than 100 scans"),
        (b"RIFF\0\0\0\0WEBPVP8X\0\0\0\0\0\0\0\0" + b"\xff" * 6, "got 16777216x16777216"),
    ],
)
def test_hostile_files_are_refused(raw: bytes, detail: str) -> None:
    began = time.perf_counter()
    with pytest.raises(InvalidInput, match=detail) as raised:
        SIGNATURE.parse({"image": {"shape": [1], "data": [_b64(raw)]}}, LIMITS)
    assert raised.value.field == "inputs.image"
    assert time.perf_counter() - began < 0.2


def test_compressed_texts_are_not_inflated() -> None:
    raw = png_header(3, 3, *TEXTS)
    began = time.process_time()
    assert pictures.size(raw) == (3, 3)
    assert time.process_time() - began < 0.01


def test_pixels_count_for_all_rows_together() -> None:
    row = _b64(png_header(30, 30))
    assert len(SIGNATURE.parse({"image": [row] * 2}, LIMITS)["image"]) == 2
    with pytest.raises(InvalidInput, match="at most 2500 pixels in all, got 2700"):
        SIGNATURE.parse({"image": [row] * 3}, LIMITS)


def test_pictures_are_measured_without_a_declared_content() -> None:
    declared = SIGNATURE.model_dump()
    declared["inputs"][0]["content"] = None
    free = Signature.model_validate(declared)
    with pytest.raises(InvalidInput, match="at most 1000 pixels"):
        free.parse({"image": _b64(png_header(300, 300))}, LIMITS)
    # Any bytes may begin like a picture.
    assert free.parse({"image": _b64(PNG_MAGIC)}, LIMITS)["image"].tolist() == [PNG_MAGIC]


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
