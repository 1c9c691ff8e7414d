"""Pictures that strangers send: from data URLs, checked by their header before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import re
import warnings
from collections.abc import Callable
from io import BytesIO

from PIL import Image as Pillow

from isthmus.data import media
from isthmus.serving.limits import Limits
from isthmus.serving.refusals import Refusal, invalid
from isthmus.types import DataError, Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
HEADER = re.compile(r"data:image/(png|jpeg|jpg|webp|gif);base64,", re.IGNORECASE)
UNSUPPORTED = "a picture must be PNG, JPEG, WebP or GIF"


class Intake:
    """Takes in the pictures of one request, which share a budget of pixels.

    Args:
        limits: of one request.
        fetch: the bytes behind a URL of the web.
    """

    def __init__(self, limits: Limits, fetch: Callable[[str], bytes]):
        self.limits, self.fetch, self.pixels = limits, fetch, 0

    def __call__(self, url: str) -> Image:
        """The picture behind an image_url.

        Raises:
            Refusal: it is no PNG, JPEG, WebP or GIF, damaged or too large, or may not be fetched.
        """
        return self.decode(from_data_url(url, self.limits.encoded) if url[:5].lower() == "data:" else self.fetch(url))

    def decode(self, raw: bytes) -> Image:
        """A picture from a file's bytes: the first frame, upright, RGB, without metadata.

        Raises:
            Refusal: as above.
        """
        width, height = _size(raw)
        short, long = sorted((width, height))
        self.pixels += width * height
        if width * height > self.limits.pixels or long > self.limits.longest:
            raise _too_large(f"a picture of {width} x {height} pixels is too large")
        if self.pixels > self.limits.all_pixels:
            raise _too_large(f"the pictures have more than {self.limits.all_pixels} pixels together")
        if short < self.limits.shortest or long > self.limits.aspect * short:
            raise _bad(f"a picture of {width} x {height} pixels is too narrow")
        try:
            return Image(media.open_image(raw))
        except DataError:
            raise _bad("a picture is damaged or cut short") from None


def from_data_url(url: str, most: int) -> bytes:
    """The file in a data URL of at most `most` characters; the type that it claims only has to be one of the four.

    Raises:
        Refusal: it is no such URL, too long, or no base64.
    """
    header = HEADER.match(url[:64])
    if header is None:
        raise invalid("an image_url must be data:image/(png|jpeg|webp|gif);base64,...", "messages", "invalid_image_url")
    if len(url) > most:
        raise _too_large(f"a picture has more than {most} encoded bytes")
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise _bad("a picture's base64 is invalid") from None


def _size(raw: bytes) -> tuple[int, int]:
    """Width and height as the file's header says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Pillow.DecompressionBombWarning)  # our own limit is below it
            return Pillow.open(BytesIO(raw), formats=FORMATS).size
    except Pillow.DecompressionBombError:
        raise _too_large("a picture is too large") from None
    except Exception:  # decoders raise whatever their format makes them stumble over; their words stay here
        raise _bad(UNSUPPORTED) from None


def _bad(message: str) -> Refusal:
    return invalid(message, "messages", "invalid_image")


def _too_large(message: str) -> Refusal:
    return Refusal(413, message, "image_too_large", "messages")
