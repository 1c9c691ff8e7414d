"""Pictures that are made to harm: damaged copies, headers that claim what is not there, bombs. All from a seed."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from PIL import Image as Pillow

Item: TypeAlias = tuple[str, bytes]
"""A name and a file."""
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 50_000, 0x7FFF_FFFF, 0xFFFF_FFFF)


def seeds() -> list[bytes]:
    """Good pictures of every format and of unusual modes."""
    dice = random.Random(0)
    plain = Pillow.frombytes("RGB", (24, 17), dice.randbytes(24 * 17 * 3))
    frames = [Pillow.frombytes("L", (16, 16), dice.randbytes(256)) for _ in range(3)]
    exif = Pillow.Exif()
    exif[0x0112] = 6
    made: list[tuple[Pillow.Image, str, dict[str, Any]]] = [
        (plain, "PNG", {}),
        (plain.convert("P"), "PNG", {"transparency": 3}),
        (plain.convert("LA"), "PNG", {}),
        (Pillow.new("I;16", (9, 9), 40_000), "PNG", {}),
        (plain, "JPEG", {"exif": exif}),
        (plain, "JPEG", {"progressive": True}),
        (plain.convert("CMYK"), "JPEG", {}),
        (plain, "WEBP", {}),
        (plain.convert("RGBA"), "WEBP", {"lossless": True}),
        (frames[0], "WEBP", {"save_all": True, "append_images": frames[1:]}),
        (plain, "GIF", {}),
        (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),
        (plain, "BMP", {}),
        (plain.convert("1"), "BMP", {}),
        (plain, "TIFF", {}),
        (plain, "TIFF", {"compression": "tiff_lzw"}),
        (plain, "TIFF", {"compression": "tiff_deflate"}),
        (plain, "TIFF", {"compression": "jpeg"}),
        (plain.convert("1"), "TIFF", {"compression": "group4"}),
    ]
    return [saved(picture, kind, **how) for picture, kind, how in made]


def mutated(count: int) -> Iterator[Item]:
    """Damaged copies of the seeds."""
    pool = seeds()
    for number in range(count):
        dice = random.Random(number)
        data = damaged(dice, pool)
        if data[:4] == b"\x89PNG" and dice.random() < 0.7:
            data = _resealed(data)
        yield f"mutated {number}", bytes(data)


def damaged(dice: random.Random, pool: list[bytes]) -> bytearray:
    """One of these files, changed in one place or in a few."""
    data = bytearray(dice.choice(pool))
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        change = dice.choice(CHANGES)
        data = change(data, dice, pool)
    return data


def _flip(data: bytearray, dice: random.Random, pool: list[bytes]) -> bytearray:
    for _ in range(dice.randint(1, 12)):
        if data:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return data


def _noise(data: bytearray, dice: random.Random, pool: list[bytes]) -> bytearray:
    at = dice.randrange(len(data) + 1)
    data[at : at + dice.randint(1, 40)] = dice.randbytes(dice.randint(1, 40))
    return data


def _cut(data: bytearray, dice: random.Random, pool: list[bytes]) -> bytearray:
    return data[: dice.randrange(len(data) + 1)]


def _remove(data: bytearray, dice: random.Random, pool: list[bytes]) -> bytearray:
    at = dice.randrange(len(data) + 1)
    return data[:at] + data[at + dice.randint(1, 30) :]


def _double(data: bytearray, dice: random.Random, pool: list[bytes]) -> bytearray:
    at = dice.randrange(len(data) + 1)
    return data[:at] + data[at : at + dice.randint(1, 200)] * dice.randint(2, 20) + data[at:]


def _extreme(data: bytearray, dice: random.Random, pool: list[bytes]) -> bytearray:
    width, order = dice.choice((1, 2, 4)), dice.choice(("big", "little"))
    value = dice.choice(EXTREMES) & ((1 << 8 * width) - 1)
    at = dice.randrange(min(len(data), 80) + 1) if dice.random() < 0.6 else dice.randrange(len(data) + 1)
    data[at : at + width] = value.to_bytes(width, order)  # type: ignore[arg-type]
    return data


def _splice(data: bytearray, dice: random.Random, pool: list[bytes]) -> bytearray:
    other = dice.choice(pool)
    return data[: dice.randrange(len(data) + 1)] + other[dice.randrange(len(other)) :]


def _prefix(data: bytearray, dice: random.Random, pool: list[bytes]) -> bytearray:
    return bytearray(dice.choice(pool)[: dice.randint(2, 16)]) + data


def _zero(data: bytearray, dice: random.Random, pool: list[bytes]) -> bytearray:
    at = dice.randrange(len(data) + 1)
    data[at : at + 16] = bytes(16)
    return data


CHANGES: tuple[Callable[[bytearray, random.Random, list[bytes]], bytearray], ...] = (
    _flip,
    _noise,
    _cut,
    _remove,
    _double,
    _extreme,
    _splice,
    _prefix,
    _zero,
)


def _resealed(data: bytearray) -> bytearray:
    """A PNG whose chunks carry right checksums again, so that damage gets past them."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4)
        at = end + 4
    return data


def headers() -> Iterator[Item]:
    """Three hundred headers that claim every extreme size in every format."""
    sizes = [(w, h) for w in EXTREMES for h in (0, 1, 30_000, 50_000, 0x7FFF_FFFF)]
    for number in range(300):
        width, height = sizes[number // 6 % len(sizes)]
        kind = HEADERS[number % 6]
        yield f"{kind.__name__.strip('_')} {width} x {height}", kind(width, height)


def png(width: int, height: int, body: bytes = b"", more: bytes = b"", depth: bytes = b"\x08\x02") -> bytes:
    shape = width.to_bytes(4) + height.to_bytes(4) + depth + b"\0\0\0"
    data = chunk(b"IDAT", body or zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", shape) + more + data + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)


def _jpeg(width: int, height: int) -> bytes:
    data = bytearray(saved(Pillow.new("RGB", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (height & 0xFFFF).to_bytes(2) + (width & 0xFFFF).to_bytes(2)
    return bytes(data)


def _gif(width: int, height: int) -> bytes:
    data = bytearray(saved(Pillow.new("P", (8, 8)), "GIF"))
    size = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    at = data.index(b",\0\0\0\0") + 5
    data[6:10] = data[at : at + 4] = size
    return bytes(data)


def _bmp(width: int, height: int) -> bytes:
    data = bytearray(saved(Pillow.new("RGB", (8, 8)), "BMP"))
    data[18:26] = struct.pack("<II", width, height)
    return bytes(data)


def tiff(width: int, height: int, strips: int = 99) -> bytes:
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, strips),
    ]
    listed = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + listed + bytes(4)


def webp(width: int, height: int) -> bytes:
    """An extended header of up to 2**24 a side over a tiny picture."""
    inner = saved(Pillow.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    sides = b"".join(((side - 1) & 0xFF_FFFF).to_bytes(3, "little") for side in (width, height))
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


HEADERS = (png, _jpeg, _gif, _bmp, tiff, webp)


def bombs() -> Iterator[Item]:
    """Small files that would become large."""
    zeros = zlib.compress(bytes(1 << 28), 9)
    large = zlib.compress(bytes(50_001) * 2000, 9)
    yield "50 000 x 50 000 PNG", png(50_000, 50_000, large, depth=b"\x08\x00")
    yield "one-bit 60 000 x 60 000 PNG", png(60_000, 60_000, large, depth=b"\x01\x00")
    yield "more pixels than claimed", png(8, 8, zeros)
    yield "zTXt of 256 MiB", png(8, 8, more=chunk(b"zTXt", b"Comment\0\0" + zeros))
    yield "iTXt of 256 MiB", png(8, 8, more=chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros))
    yield "400 texts of 1 MiB", png(8, 8, more=chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(1 << 20))) * 400)
    yield "iCCP of 256 MiB", png(8, 8, more=chunk(b"iCCP", b"x\0\0" + zeros))
    yield "zip in a PNG's text", png(8, 8, more=chunk(b"tEXt", b"Comment\0PK\x03\x04" + zeros))
    yield "TIFF that claims 4 GB", tiff(0xFFFF, 0xFFFF, 0xFFFF_FFFF)
    yield "TIFF strip of 4 GB", tiff(64, 64, 0xFFFF_FFFF)
    yield "TIFF directory that is its own next", tiff(8, 8)[:-4] + struct.pack("<I", 8)
    yield "gzip FITS", zlib.compress(b"SIMPLE  =                    T" + bytes(1 << 26), 9, 31)
    yield "WebP canvas of 2**14 a side", webp(1 << 14, 1 << 14)
    yield "WebP picture of 16 383 a side", _saved_large_webp()
    yield "GIF of 65 535 a side", _gif(0xFFFF, 0xFFFF)
    yield "JPEG of 65 535 a side", _jpeg(0xFFFF, 0xFFFF)
    yield "EXIF of 64 KiB of directories", _exif()
    yield "SVG that includes itself", b'<svg xmlns="http://www.w3.org/2000/svg"><use href="#a"/></svg>'
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60000 60000\nshowpage\n"


def _saved_large_webp() -> bytes:
    """A lossless WebP whose own header says 16 383 a side."""
    data = bytearray(saved(Pillow.new("RGB", (8, 8)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") >> 28 << 28 | 0x3FFE << 14 | 0x3FFE
    data[at : at + 4] = bits.to_bytes(4, "little")
    return bytes(data)


def _exif() -> bytes:
    body = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000) + struct.pack("<HHII", 0x8769, 4, 1, 8) * 5000
    plain = saved(Pillow.new("RGB", (8, 8)), "JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", min(len(body) + 2, 0xFFFF)) + body[:0xFFFD] + plain[2:]


def saved(picture: Pillow.Image, kind: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **how)
    return stream.getvalue()
