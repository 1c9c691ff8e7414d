"""Pictures from anywhere to RGB, to a square, to pixels; nothing that a file may contain gets past this door."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as Pillow
from torch import Tensor

from isthmus.types import DataError, Drawn, Source

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings of files of these formats."""
MOST_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded. Below Pillow's own threshold, so its warning never decides."""
CHUNK = 1 << 20
PNG = b"\x89PNG\r\n\x1a\n"
MOST_TEXTS = 16
"""Compressed texts of a PNG, each of which Pillow unpacks to a MiB when it reads the header."""

Aspect: TypeAlias = Literal["crop", "pad", "squash"]
Colour: TypeAlias = tuple[int, int, int]
Corners: TypeAlias = tuple[float, float, float, float]

ROUNDED = 1e-3
"""How far outside a picture a point may be read: written numbers are rounded."""


def open_image(source: Source, where: str = "") -> Pillow.Image:
    """An upright RGB picture, transparent parts white; the first frame of an animation.

    `where` names the picture in errors; by default a path names itself.

    Raises:
        DataError: missing, unreadable, truncated, larger than `MOST_PIXELS`, of no size, in floating point, or in
            integers of which nothing tells the range.
    """
    where = where or _name(source)
    if isinstance(source, Drawn):
        return _rgb(source.draw(), where)
    if isinstance(source, Pillow.Image):
        _check_size(source, where)
        return _decode(source, where)
    with _open_bytes(source, where) as file:
        try:
            picture = _opened(file)
        except DataError as error:
            raise DataError(f"{where}: {error.cause}", error.remedy) from None
        except UnidentifiedImageError:
            raise DataError(f"{where}: not a picture in {', '.join(FORMATS)}", "convert it, or remove it") from None
        except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
            raise _too_large(where) from None
        except Exception:  # decoders raise whatever their format makes them stumble over
            raise _unreadable(where) from None
        _check_size(picture, where)
        return _decode(picture, where)


def content_key(source: Source) -> str:
    """A name for what is in a picture, equal for equal contents: the sha256 of a file's bytes or of raw pixels.

    Where a palette, a transparent colour or EXIF says how raw pixels are shown, it is of what `open_image` shows.

    Raises:
        DataError: the file cannot be read, or `open_image` refuses what it is to show.
    """
    if isinstance(source, Drawn):
        return source.key
    digest = hashlib.sha256()
    if isinstance(source, Pillow.Image):
        picture = open_image(source) if _is_shown_otherwise(source) else source
        digest.update(f"{picture.mode} {picture.size} ".encode())
        digest.update(picture.tobytes())
    else:
        with _open_bytes(source, _name(source)) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _is_shown_otherwise(picture: Pillow.Image) -> bool:
    """Whether the pixels alone do not say what a picture shows."""
    if picture.mode in ("P", "PA") or ("transparency" in picture.info and not picture.mode.endswith(("A", "a"))):
        return True
    picture.load()  # turns a TIFF, and finds what a PNG says behind its pixels
    try:
        return picture.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # see _decode
        return False


def square(
    image: Pillow.Image, aspect: Aspect, size: int, mean: Colour, resample: int = Pillow.Resampling.BICUBIC
) -> Pillow.Image:
    """The picture as size × size: its centre, or letter-boxed in the mean colour, or stretched. One resampling."""
    return SQUARES[aspect](image, size, mean, Pillow.Resampling(resample))


def pixels(image: Pillow.Image, processor: Any, aspect: Aspect) -> Tensor:
    """An RGB picture as an encoder wants it, [C, H, W]; `processor` is an image processor of transformers.

    The processor rescales and normalises; making the picture square is ours, so that every encoder offers the same
    three ways.
    """
    red, green, blue = (round(255 * channel) for channel in processor.image_mean or (0.5, 0.5, 0.5))
    picture = square(image, aspect, side(processor), (red, green, blue), processor.resample)
    out = processor(images=picture, do_resize=False, do_center_crop=False, return_tensors="pt")
    return out["pixel_values"][0]


def side(processor: Any) -> int:
    """Side in pixels of the square that an image processor of transformers makes."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    return size["height"] if size.get("height") else size["shortest_edge"]


# ---------------------------------------------------------------------------------------------- squares


def upright_size(source: Source) -> tuple[int, int]:
    """Width and height of a picture as `open_image` gives it; a file's pixels are not decoded.

    Raises:
        DataError: as `open_image`.
    """
    if isinstance(source, Drawn | Pillow.Image):
        return open_image(source).size
    with _open_bytes(source, _name(source)) as file:
        try:
            picture = _opened(file)
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        except Exception:  # whatever is wrong, opening it says so in our words
            return open_image(source).size
    if not turned:
        return picture.size
    stored = getattr(picture, "tag_v2", {})  # of a TIFF, whose size Pillow may have turned already
    return stored.get(ExifTags.Base.ImageLength, picture.height), stored.get(ExifTags.Base.ImageWidth, picture.width)


@dataclass(frozen=True)
class Frame:
    """Where a picture lies in its square: x of the picture is x * scale + shift of the square, likewise y."""

    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, size: tuple[int, int], aspect: Aspect) -> Frame:
        """What `square` does to a picture of this width and height; of huge strips, to a pixel of the square."""
        if aspect == "squash":
            return cls()
        if aspect == "crop":
            side = min(size)
            starts = [(side - length) / 2 for length in size]
        else:
            side = max(size)
            starts = [(side - length) // 2 for length in size]
        width, height = (length / side for length in size)
        return cls((width, height), (starts[0] / side, starts[1] / side))

    def onto(self, xyxy: Corners) -> Corners | None:
        """A region of the picture as one of the square, cut at its edges; None if it lies outside."""
        x1, y1, x2, y2 = (self.scale[n % 2] * value + self.shift[n % 2] for n, value in enumerate(xyxy))
        return _inside((x1, y1, x2, y2))

    def back(self, xyxy: Corners) -> Corners | None:
        """A region of the square as one of the picture; None if it lies in the margin."""
        x1, y1, x2, y2 = ((value - self.shift[n % 2]) / self.scale[n % 2] for n, value in enumerate(xyxy))
        return _inside((x1, y1, x2, y2), (ROUNDED / self.scale[0], ROUNDED / self.scale[1]))


def _inside(xyxy: Corners, slack: tuple[float, float] = (0.0, 0.0)) -> Corners | None:
    """The part of a region within [0, 1]; None if an area loses all of it, or a point lies further outside."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in xyxy)
    lost = (x1 == x2) > (xyxy[0] == xyxy[2]) or (y1 == y2) > (xyxy[1] == xyxy[3])
    outside = any(high < -some or low > 1 + some for low, high, some in zip(xyxy[:2], xyxy[2:], slack))
    return None if lost or outside else (x1, y1, x2, y2)


def _crop(image: Pillow.Image, size: int, mean: Colour, resample: Pillow.Resampling) -> Pillow.Image:
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    return image.resize((size, size), resample, box=(left, top, left + short, top + short))


def _pad(image: Pillow.Image, size: int, mean: Colour, resample: Pillow.Resampling) -> Pillow.Image:
    long = max(image.size)
    if long * long > MOST_PIXELS:  # a narrow strip must not become a huge square
        return ImageOps.pad(image, (size, size), resample, color=mean)
    canvas = Pillow.new("RGB", (long, long), mean)
    canvas.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
    return canvas.resize((size, size), resample)


def _squash(image: Pillow.Image, size: int, mean: Colour, resample: Pillow.Resampling) -> Pillow.Image:
    return image.resize((size, size), resample)


SQUARES: dict[Aspect, Callable[[Pillow.Image, int, Colour, Pillow.Resampling], Pillow.Image]] = {
    "crop": _crop,
    "pad": _pad,
    "squash": _squash,
}


# ---------------------------------------------------------------------------------------------- decoding


def _decode(picture: Pillow.Image, where: str) -> Pillow.Image:
    """Decode the pixels, turn them upright and make them RGB."""
    try:
        picture.load()
    except Exception:  # see open_image
        raise _unreadable(where) from None
    try:
        upright = ImageOps.exif_transpose(picture)
    except Exception:  # a damaged EXIF block does not make the pixels unreadable
        upright = picture
    return _rgb(upright, where, _white(picture, where))


def _white(picture: Pillow.Image, where: str) -> int:
    """The level that is white, in a picture of more than 8 bits per pixel."""
    if picture.mode == "I" and picture.format != "PNG":  # of a PNG it is 16 bits, of others 32 or signed ones
        remedy = "save the picture with 8 or 16 bits per channel"
        raise DataError(f"{where}: pixels are wide integers, and nothing tells which is white", remedy)
    twelve = getattr(picture, "tag_v2", {}).get(ExifTags.Base.BitsPerSample) == (12,)
    return 4095 if twelve else 65535


def _rgb(picture: Pillow.Image, where: str, top: int = 65535) -> Pillow.Image:
    if picture.mode == "F":
        raise DataError(f"{where}: pixels are floating-point numbers", "save the picture with 8 or 16 bits per channel")
    if picture.mode.startswith("I"):  # Pillow would clip at 255
        wide = np.asarray(picture).clip(0, top)
        picture = Pillow.fromarray((wide / (top / 255)).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Pillow.new("RGBA", picture.size, "white")
        picture = Pillow.alpha_composite(white, picture)
    return picture.convert("RGB")


def _open_bytes(source: str | Path | bytes, where: str) -> BinaryIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    if str(source).startswith(("http://", "https://")):
        raise DataError(f"{where}: pictures are not fetched from the network", "download it and name the file")
    try:
        return Path(source).open("rb")
    except FileNotFoundError:
        raise DataError(f"{where}: no such picture", "check the path, and the folder that paths start from") from None
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else "not a valid path"
        raise DataError(f"{where}: cannot be opened ({cause})", "check the path and its permissions") from None


def _opened(file: BinaryIO) -> Pillow.Image:
    """The picture with its header read; a PNG that carries a bomb of texts is left alone.

    Raises:
        DataError: it carries one.
    """
    texts, at = 0, len(PNG)
    if file.read(at) == PNG:
        while len(head := file.read(8)) == 8 and texts <= MOST_TEXTS:
            texts += head[4:] in (b"zTXt", b"iTXt")
            at += 12 + int.from_bytes(head[:4])
            file.seek(at)
    if texts > MOST_TEXTS:
        raise DataError("more texts than a picture needs", "save it again without them")
    file.seek(0)
    return Pillow.open(file, formats=FORMATS)


def _check_size(picture: Pillow.Image, where: str) -> None:
    if min(picture.size) < 1:
        raise DataError(f"{where}: the picture has no pixels", "remove it")
    if picture.width * picture.height > MOST_PIXELS:
        raise _too_large(where)


def _too_large(where: str) -> DataError:
    limit = MOST_PIXELS // 1_000_000
    return DataError(
        f"{where}: more than {limit} megapixels", "scale it down; encoders see a few hundred pixels a side"
    )


def _unreadable(where: str) -> DataError:
    return DataError(f"{where}: the picture is damaged or cut short", "replace the file, or remove the record")


def _name(source: Source) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return "a picture in memory"
