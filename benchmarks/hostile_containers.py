"""Archives and videos that are made to harm: tars that leave their place, damaged films, false lengths. From a seed."""

from __future__ import annotations

import io
import random
import struct
import tarfile
from collections.abc import Iterator

import numpy as np

from hostile_pictures import Item, damaged, seeds


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


# ---------------------------------------------------------------------------------------------- videos

FILMS = (("mp4", "mpeg4"), ("mov", "mjpeg"), ("matroska", "mpeg4"), ("webm", "libvpx"), ("avi", "mjpeg"))
"""Every container that is read, and codecs that PyAV's own build can write."""
HOURS = 10
FTYP = b"\0\0\0\x18ftypmp42" + bytes(12)
"""How an MP4 begins."""


def films() -> list[bytes]:
    """Good videos of a second."""
    return [film(kind, codec) for kind, codec in FILMS]


def film(kind: str, codec: str, apart: int = 1) -> bytes:
    """Twelve frames of noise, so many tenths of a second apart."""
    import av

    dice, out = np.random.default_rng(0), io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(dice.integers(0, 256, (32, 48, 3), np.uint8), format="rgb24")
            frame.pts = number * apart
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def videos(count: int) -> Iterator[Item]:
    """Damaged copies of the films."""
    pool = films()
    for number in range(count):
        yield f"video {number}", bytes(damaged(random.Random(number), pool))


def claims() -> Iterator[Item]:
    """Small films whose heads claim ten hours, huge frames, or more than the file holds."""
    whole, small = film("mp4", "mpeg4"), film("webm", "libvpx")
    yield f"{HOURS} hours", film("matroska", "mpeg4", apart=HOURS * 36_000 // 12)
    at = whole.index(b"mp4v") + 28
    yield "frames of 65 535 a side", whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :]
    at = small.index(b"\x9d\x01\x2a") + 3
    yield "a first frame of 16 383 a side", small[:at] + struct.pack("<HH", 0x3FFF, 0x3FFF) + small[at + 4 :]
    for table in (b"stts", b"stsz", b"stsc", b"stco"):
        at = whole.index(table) + (12 if table == b"stsz" else 8)
        yield f"{table.decode()} of 4 G entries", whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :]
    at = whole.index(b"moov") - 4
    yield "a head of 4 GB", whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :]
    yield "boxes in boxes", FTYP + b"".join(struct.pack(">I", 8 * level) + b"moov" for level in range(5000, 0, -1))
    yield "a playlist behind a head", FTYP + b"#EXTM3U\nfile:///etc/passwd\n" * 200
    yield "an empty Matroska", b"\x1a\x45\xdf\xa3" + b"\xff" * 4096
