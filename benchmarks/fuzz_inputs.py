"""What hostile files do to the door that all pictures and tars pass: nothing but an error, soon, in little memory.

    python benchmarks/fuzz_inputs.py [--steps IMAGES] [--json FILE]

Pictures of six formats are damaged in nine ways and headers claim what is not there (D1), bombs are small files that
would become large (D2), and tars try to leave their place (D3). Every kind runs in a process of its own, so that a
crash is seen, and says its slowest item, in seconds of the processor, and what it added to its largest resident set.
Everything follows from a seed.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image as Pillow

import harness
from isthmus.data import formats
from isthmus.data.media import open_image, upright_size
from isthmus.types import DataError

SLOWEST = {"mutated": 2.0, "headers": 2.0, "bombs": 0.1, "tars": 2.0}
"""Seconds of the processor that an item may take."""
MORE = {"mutated": 1024.0, "headers": 1024.0, "bombs": 50.0, "tars": 50.0}
"""MiB that a kind may add to the resident set of a process that has decoded one picture."""
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 50_000, 0x7FFF_FFFF, 0xFFFF_FFFF)
NAMES = re.compile(r"[^\w .,-]")
Item = tuple[str, bytes]


# ---------------------------------------------------------------------------------------------- pictures


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
    return [_saved(picture, kind, **how) for picture, kind, how in made]


def mutated(count: int) -> Iterator[Item]:
    """Damaged copies of the seeds."""
    pool = seeds()
    for number in range(count):
        dice = random.Random(number)
        data = bytearray(dice.choice(pool))
        for _ in range(dice.choice((1, 1, 1, 2, 4))):
            change = dice.choice(CHANGES)
            data = change(data, dice, pool)
        if data[:4] == b"\x89PNG" and dice.random() < 0.7:
            data = _resealed(data)
        yield f"mutated {number}", bytes(data)


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


def _png(width: int, height: int, body: bytes = b"", more: bytes = b"", depth: bytes = b"\x08\x02") -> bytes:
    shape = width.to_bytes(4) + height.to_bytes(4) + depth + b"\0\0\0"
    data = _chunk(b"IDAT", body or zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", shape) + more + data + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)


def _jpeg(width: int, height: int) -> bytes:
    data = bytearray(_saved(Pillow.new("RGB", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (height & 0xFFFF).to_bytes(2) + (width & 0xFFFF).to_bytes(2)
    return bytes(data)


def _gif(width: int, height: int) -> bytes:
    data = bytearray(_saved(Pillow.new("P", (8, 8)), "GIF"))
    size = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    at = data.index(b",\0\0\0\0") + 5
    data[6:10] = data[at : at + 4] = size
    return bytes(data)


def _bmp(width: int, height: int) -> bytes:
    data = bytearray(_saved(Pillow.new("RGB", (8, 8)), "BMP"))
    data[18:26] = struct.pack("<II", width, height)
    return bytes(data)


def _tiff(width: int, height: int, strips: int = 99) -> bytes:
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


def _webp(width: int, height: int) -> bytes:
    """An extended header of up to 2**24 a side over a tiny picture."""
    inner = _saved(Pillow.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    sides = b"".join(((side - 1) & 0xFF_FFFF).to_bytes(3, "little") for side in (width, height))
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


HEADERS = (_png, _jpeg, _gif, _bmp, _tiff, _webp)


def bombs() -> Iterator[Item]:
    """Small files that would become large."""
    zeros = zlib.compress(bytes(1 << 28), 9)
    large = zlib.compress(bytes(50_001) * 2000, 9)
    yield "50 000 x 50 000 PNG", _png(50_000, 50_000, large, depth=b"\x08\x00")
    yield "one-bit 60 000 x 60 000 PNG", _png(60_000, 60_000, large, depth=b"\x01\x00")
    yield "more pixels than claimed", _png(8, 8, zeros)
    yield "zTXt of 256 MiB", _png(8, 8, more=_chunk(b"zTXt", b"Comment\0\0" + zeros))
    yield "iTXt of 256 MiB", _png(8, 8, more=_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros))
    yield "400 texts of 1 MiB", _png(8, 8, more=_chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(1 << 20))) * 400)
    yield "iCCP of 256 MiB", _png(8, 8, more=_chunk(b"iCCP", b"x\0\0" + zeros))
    yield "zip in a PNG's text", _png(8, 8, more=_chunk(b"tEXt", b"Comment\0PK\x03\x04" + zeros))
    yield "TIFF that claims 4 GB", _tiff(0xFFFF, 0xFFFF, 0xFFFF_FFFF)
    yield "TIFF strip of 4 GB", _tiff(64, 64, 0xFFFF_FFFF)
    yield "TIFF directory that is its own next", _tiff(8, 8)[:-4] + struct.pack("<I", 8)
    yield "gzip FITS", zlib.compress(b"SIMPLE  =                    T" + bytes(1 << 26), 9, 31)
    yield "WebP canvas of 2**14 a side", _webp(1 << 14, 1 << 14)
    yield "WebP picture of 16 383 a side", _saved_large_webp()
    yield "GIF of 65 535 a side", _gif(0xFFFF, 0xFFFF)
    yield "JPEG of 65 535 a side", _jpeg(0xFFFF, 0xFFFF)
    yield "EXIF of 64 KiB of directories", _exif()
    yield "SVG that includes itself", b'<svg xmlns="http://www.w3.org/2000/svg"><use href="#a"/></svg>'
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60000 60000\nshowpage\n"


def _saved_large_webp() -> bytes:
    """A lossless WebP whose own header says 16 383 a side."""
    data = bytearray(_saved(Pillow.new("RGB", (8, 8)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") >> 28 << 28 | 0x3FFE << 14 | 0x3FFE
    data[at : at + 4] = bits.to_bytes(4, "little")
    return bytes(data)


def _exif() -> bytes:
    body = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000) + struct.pack("<HHII", 0x8769, 4, 1, 8) * 5000
    plain = _saved(Pillow.new("RGB", (8, 8)), "JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", min(len(body) + 2, 0xFFFF)) + body[:0xFFFD] + plain[2:]


def _saved(picture: Pillow.Image, kind: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **how)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------- tars


def tars() -> Iterator[Item]:
    """Thirty archives that try to leave their place, or to take more than there is."""
    data = seeds()[0]
    body = data + bytes(-len(data) % 512)
    names = (
        "../up.png",
        "a/../../up.png",
        "/etc/evil.png",
        "..",
        ".",
        "..\\up.png",
        "C:\\up.png",
        "//a.png",
        "a/\0/b.png",
    )
    for name in names:
        yield f"named {name!r}", _head(name, size=len(data)) + body
    for name in names[:3]:
        yield f"named {name!r} by pax", _head("ok.png", size=len(data), path=name) + body
    for name in names[:2]:
        yield f"named {name!r} at length", _head("x/" * 60 + name, size=len(data)) + body
    kinds = {"symlink": b"2", "hard link": b"1", "character": b"3", "block": b"4", "pipe": b"6", "sparse": b"S"}
    for name, kind in kinds.items():
        yield name, _head("a.png", kind, link="/etc/passwd") + _head("a.txt", size=1) + b"x" + bytes(511)
    yield "link, then a file through it", _head("d", b"2", link="/tmp") + _head("d/a.png", size=len(data)) + body
    yield "the same name twice", (_head("a.png", size=len(data)) + body) * 2
    yield (
        "names that differ in case",
        b"".join(_head(name, size=len(data)) + body for name in ("a.png", "A.png", "a.PNG")),
    )
    yield "4 GB claimed", _head("a.png", size=4 << 30) + body
    yield (
        "8 EB claimed by pax",
        _head("a.png", size=1) + _pax(b"size=9223372036854775807") + _head("b.png"),
    )
    yield "long name of 8 MB", _head("x", b"L", size=8 << 20) + bytes(8 << 20)
    yield "pax header of 8 MB", _head("x", b"x", size=8 << 20) + bytes(8 << 20)
    yield "global pax header", _head("x", b"g", size=512) + b"20 path=../../up.png\n".ljust(512, b"\0") + _head("a.png")
    yield "ten thousand files of one sample", b"".join(_head(f"a.{number}") for number in range(10_000))
    yield "noise", random.Random(0).randbytes(50_000)


def _head(name: str, kind: bytes = b"0", size: int = 0, link: str = "", **pax: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.pax_headers = kind, size, link, pax
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def _pax(said: bytes) -> bytes:
    line = b"%d %s\n" % (len(said) + 4, said)
    return _head("x", b"x", size=len(line)) + line.ljust(512, b"\0")


# ---------------------------------------------------------------------------------------------- judging


def look(data: bytes) -> str:
    """What comes of a picture."""
    try:
        upright_size(data)
        open_image(data, "it")
    except DataError as error:
        assert error.remedy and "\n" not in error.cause
        return "refused"
    return "read"


def unpack(data: bytes) -> str:
    """What comes of a tar; files that it puts anywhere near are an escape."""
    with tempfile.TemporaryDirectory(prefix="isthmus-fuzz-") as scratch:
        file = Path(scratch) / "in" / "in" / "a.tar"
        file.parent.mkdir(parents=True)
        file.write_bytes(data)
        before = sorted(Path(scratch).rglob("*"))
        faults = formats.check(file)
        if sorted(Path(scratch).rglob("*")) != before:
            return "escaped"
        return "refused" if faults else "read"


def work(kind: str, count: int, folder: Path) -> dict[str, Any]:
    """All items of a kind, in this process; large ones are made in another and lie in a folder."""
    judge = unpack if kind == "tars" else look
    judge(seeds()[0])
    items = (
        mutated(count) if kind == "mutated" else ((file.name, file.read_bytes()) for file in sorted(folder.iterdir()))
    )
    before = _reset()
    outcomes, slowest, others = Counter[str](), (0.0, ""), list[str]()
    for name, data in items:
        began = time.process_time()
        try:
            outcome = judge(data)
        except Exception as error:
            outcome = "other error"
            others.append(f"{name}: {type(error).__name__}: {str(error)[:80]}")
        slowest = max(slowest, (time.process_time() - began, name))
        outcomes[outcome] += 1
    return {
        "items": sum(outcomes.values()),
        "outcomes": outcomes,
        "other errors": others[:20],
        "slowest": slowest,
        "more MiB": round(_peak() - before, 1),
        "peak MiB": round(_peak(), 1),
    }


def _reset() -> float:
    """Forget the largest resident set so far; the present one in MiB. Where that cannot be done, the largest."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return harness.peak_mib()
    return _peak()


def _peak() -> float:
    """The largest resident set since `_reset`, in MiB."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return harness.peak_mib()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _measured(kind: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="isthmus-fuzz-") as folder:
        for number, (name, data) in enumerate(
            {"headers": headers, "bombs": bombs, "tars": tars}.get(kind, lambda: ())()
        ):
            (Path(folder) / f"{number:03d} {NAMES.sub('_', name)}").write_bytes(data)
        return harness.child(Path(__file__), {"kind": kind, "count": count, "folder": folder})


def passed(kind: str, found: dict[str, Any]) -> bool:
    """Whether a kind kept its promise."""
    bad = found["outcomes"].get("other error", 0) + found["outcomes"].get("escaped", 0)
    return not bad and found["slowest"][0] < SLOWEST[kind] and found["more MiB"] < MORE[kind]


def main(arguments: list[str] | None = None) -> int:
    options = harness.parser(__doc__, 20_000, "damaged pictures").parse_args(arguments)
    count = 200 if options.tiny else options.steps
    result: dict[str, Any] = {"machine": harness.machine(), "kinds": {}}
    print(harness.in_words(result["machine"]), end="\n\n")
    rows = []
    for kind in SLOWEST:
        found = _measured(kind, count)
        result["kinds"][kind] = found | {"passed": passed(kind, found)}
        told = ", ".join(f"{number:,} {outcome}" for outcome, number in found["outcomes"].items())
        seconds, name = found["slowest"]
        more, kept = f"{found['more MiB']:.0f}", "kept" if passed(kind, found) else "missed"
        rows.append([kind, f"{found['items']:,}", told, f"{seconds * 1000:.0f}", name, more, kept])
    print(harness.table(["kind", "items", "outcomes", "slowest ms", "which", "more MiB", "promise"], rows))
    print(f"\n{harness.save('fuzz_inputs', result, options)}")
    return 0 if all(found["passed"] for found in result["kinds"].values()) else 1


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith("job.json"):
        job = json.loads(Path(sys.argv[1]).read_text())
        Path(sys.argv[2]).write_text(json.dumps(work(job["kind"], job["count"], Path(job["folder"]))))
    else:
        raise SystemExit(main())
