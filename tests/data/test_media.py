"""Every kind of picture that people have, good and bad, through the one door."""

from __future__ import annotations

import hashlib
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from isthmus.data import media
from isthmus.types import DataError, Image


def encoded(image, format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Pillow.fromarray(values)


def values(image):
    return np.asarray(image).tolist()


class Dot:
    """A picture that draws itself."""

    key = "dot-1"

    def draw(self):
        return Pillow.new("RGB", (2, 2), "red")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_from_bytes_path_and_memory(format, tmp_path):
    image = Pillow.new("RGB", (5, 3), (255, 0, 0))
    raw = encoded(image, format)
    path = tmp_path / f"picture.{format.lower()}"
    path.write_bytes(raw)
    for source in (raw, path, str(path), image):
        opened = media.open_image(source)
        assert (opened.mode, opened.size) == ("RGB", (5, 3))
        assert np.abs(np.asarray(opened).astype(int) - [255, 0, 0]).max() <= 2  # JPEG is not exact


def test_one_pixel_and_a_drawn_picture():
    assert values(media.open_image(encoded(Pillow.new("RGB", (1, 1), (1, 2, 3))))) == [[[1, 2, 3]]]
    assert media.open_image(Dot()).getpixel((0, 0)) == (255, 0, 0)
    assert media.content_key(Dot()) == "dot-1"


def test_sixteen_bits_keep_their_range():
    wide = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        opened = media.open_image(encoded(Pillow.fromarray(wide), format))
        assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 128, 255]
    integers = Pillow.fromarray(wide.astype(np.int32))
    integers.format = "PNG"  # whose 16 bits some versions of Pillow open in this mode
    assert integers.mode == "I"
    assert np.asarray(media.open_image(integers))[0, :, 2].tolist() == [0, 1, 128, 255]


def test_twelve_bits_of_a_tiff_keep_their_range():
    """Levels 4095, 2048 and 0, packed as the format has them; Pillow writes none."""
    levels = bytes([0xFF, 0xF8, 0x00, 0x00, 0x00])
    tags = ((256, 3), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 5))
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    file = b"II*\0" + struct.pack("<I", 14) + levels + b"\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert np.asarray(media.open_image(file))[0, :, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.int16])
def test_integers_that_do_not_tell_what_is_white_are_refused(kind):
    """Levels of 0 to 255, as tools of segmentation write them, would be shown as black."""
    grey = np.arange(256).reshape(16, 16).astype(kind)
    raw = Pillow.fromarray(grey.astype(np.int32))
    for source in (encoded(raw, "TIFF"), raw) if kind is not np.int16 else (sixteen_signed(grey),):
        with pytest.raises(DataError, match="nothing tells which is white") as caught:
            media.open_image(source)
        assert "8 or 16 bits" in caught.value.remedy


def sixteen_signed(grey):
    """A TIFF of signed numbers, which Pillow reads and does not write."""
    tags = ((256, 16), (257, 16), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16), (279, 512), (339, 2))
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    start = struct.pack("<I", 8 + 512)
    return b"II*\0" + start + grey.astype("<i2").tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_transparency_is_white():
    half = Pillow.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert values(media.open_image(encoded(half))) == [[[255, 255, 255]]]
    grey = Pillow.new("LA", (1, 1), (0, 128))
    assert media.open_image(encoded(grey)).getpixel((0, 0)) == (127, 127, 127)
    palette = Pillow.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert values(media.open_image(encoded(palette, transparency=0))) == [[[255, 255, 255], [0, 0, 255]]]
    named = encoded(Pillow.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9))
    assert values(media.open_image(named)) == [[[255, 255, 255]]]


def test_cmyk_and_one_bit():
    cmyk = Pillow.new("CMYK", (1, 1), (0, 255, 255, 0))
    red = media.open_image(encoded(cmyk, "TIFF")).getpixel((0, 0))
    assert red == (255, 0, 0)
    assert media.open_image(encoded(Pillow.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame():
    frames = [Pillow.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        raw = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        red, _, blue = media.open_image(raw).getpixel((0, 0))
        assert red > 240 and blue < 15


def test_exif_orientation_is_applied_and_a_damaged_block_ignored():
    image = Pillow.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Pillow.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = media.open_image(encoded(image, exif=exif))
    assert turned.size == (1, 2) and turned.getpixel((0, 0)) == (255, 0, 0)
    damaged = encoded(image, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert media.open_image(damaged).size == (2, 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_of_a_turned_picture_is_that_of_what_is_seen(format):
    image = Pillow.new("RGB", (6, 4), "red")
    for orientation in range(1, 9):
        exif = Pillow.Exif()
        exif[0x0112] = orientation
        raw = encoded(image, format, exif=exif)
        seen = (4, 6) if orientation >= 5 else (6, 4)
        assert media.upright_size(raw) == media.open_image(raw).size == seen, orientation


BAD = {
    "text": b"this is no picture",
    "empty": b"",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "header only": b"\x89PNG\r\n\x1a\n",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused_by_name(name, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(BAD[name])
    with pytest.raises(DataError) as caught:
        media.open_image(path)
    assert str(path) in caught.value.cause and caught.value.remedy
    assert " at 0x" not in str(caught.value) and "<" not in caught.value.cause


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_cut_short_is_refused_by_name(format):
    raw = encoded(noise(64, 64), format)
    with pytest.raises(DataError, match="row 7"):
        media.open_image(raw[: len(raw) // 2], where="row 7")


@pytest.mark.filterwarnings("error")
def test_a_huge_picture_is_refused_before_it_is_decoded():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    for side in (8_001, 12_000, 60_000):  # above our cap, Pillow's warning and Pillow's error
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
        with pytest.raises(DataError, match="64 megapixels"):
            media.open_image(bomb)


def test_other_refusals(tmp_path):
    with pytest.raises(DataError, match="no such picture"):
        media.open_image(tmp_path / "missing.png")
    with pytest.raises(DataError, match="cannot be opened"):
        media.open_image(tmp_path)
    with pytest.raises(DataError, match="not fetched from the network"):
        media.open_image("https://example.org/cat.png")
    with pytest.raises(DataError, match="floating-point"):
        media.open_image(encoded(Pillow.new("F", (2, 2)), "TIFF"))
    with pytest.raises(DataError, match="no pixels"):
        media.open_image(Pillow.new("RGB", (0, 3)))


def test_content_key_is_the_contents(tmp_path):
    raw = encoded(noise(9, 9))
    path = tmp_path / "a.png"
    path.write_bytes(raw)
    assert media.content_key(path) == media.content_key(raw) == hashlib.sha256(raw).hexdigest()
    one, other = Pillow.new("L", (2, 3), 5), Pillow.new("L", (3, 2), 5)
    assert media.content_key(one) == media.content_key(one.copy()) != media.content_key(other)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1", "CMYK"])
def test_the_key_of_plain_pixels_is_their_hash(mode):
    """Caches on the disk go by it."""
    picture = noise(5, 4).convert(mode)
    assert media.content_key(picture) == hashlib.sha256(f"{mode} (5, 4) ".encode() + picture.tobytes()).hexdigest()


def opened(image, format="PNG", **options):
    return Pillow.open(BytesIO(encoded(image, format, **options)))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palettes_tell_pictures_in_memory_apart(format):
    def painted(colours):
        picture = Pillow.new("P", (2, 1))
        picture.putpalette(colours)
        picture.putpixel((1, 0), 1)
        return picture

    red_blue, green_grey = ([255, 0, 0, 0, 0, 255], [0, 255, 0, 9, 9, 9])
    one, other = (opened(painted(colours), format) for colours in (red_blue, green_grey))
    assert one.mode == other.mode == "P" and one.tobytes() == other.tobytes()
    plain = Pillow.new("RGB", (2, 1), (255, 0, 0))
    plain.putpixel((1, 0), (0, 0, 255))
    assert media.content_key(one) == media.content_key(one.copy()) == media.content_key(plain)
    assert media.content_key(other) not in (media.content_key(one), media.content_key(painted(red_blue)))
    seen_through = opened(painted(red_blue), format, transparency=1)
    plain.putpixel((1, 0), (255, 255, 255))
    assert media.content_key(seen_through) == media.content_key(plain)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_colour_and_an_orientation_tell_pictures_in_memory_apart(mode):
    picture = noise(3, 2).convert(mode)
    key = media.content_key(picture)
    assert media.content_key(opened(picture)) == key
    assert media.content_key(opened(picture, transparency=picture.getpixel((0, 0)))) != key
    for orientation, turned in ((1, None), (2, Pillow.Transpose.FLIP_LEFT_RIGHT), (6, Pillow.Transpose.ROTATE_270)):
        exif = Pillow.Exif()
        exif[0x0112] = orientation
        for source in (opened(picture, exif=exif), opened(picture, "TIFF", exif=exif)):
            shown = picture if turned is None else picture.transpose(turned)
            keys = {media.content_key(shown), media.content_key(shown.convert("RGB"))}
            assert media.content_key(source) in keys and media.content_key(source) == media.content_key(source)
    assert media.content_key(opened(picture, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")) == key


GREY = (10, 20, 30)


def test_square_by_hand():
    image = Pillow.new("RGB", (4, 2), "white")
    image.paste("red", (1, 0, 3, 2))
    assert set(media.square(image, "crop", 2, GREY, Pillow.Resampling.NEAREST).getdata()) == {(255, 0, 0)}
    padded = np.asarray(media.square(image, "pad", 4, GREY, Pillow.Resampling.NEAREST))
    assert (padded[[0, 3]] == GREY).all() and (padded[1:3] == np.asarray(image)).all()
    squashed = media.square(image, "squash", 2, GREY, Pillow.Resampling.BOX)
    assert squashed.getpixel((0, 0)) == (255, 128, 128)


@pytest.mark.parametrize("aspect", ["crop", "pad", "squash"])
def test_a_long_strip_becomes_a_square_without_a_huge_canvas(aspect):
    strip = Pillow.new("RGB", (40_000, 1), "red")
    assert media.square(strip, aspect, 8, GREY).size == (8, 8)


def test_crop_equals_clips_own_processor():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = noise(128, 64)
    assert media.side(processor) == 32
    ours = media.pixels(image, processor, "crop")
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert ours.shape == (3, 32, 32)
    assert torch.equal(ours, theirs)


def test_levels_in_an_array_are_a_picture():
    levels = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(4, 5, 3)
    for given in (levels, np.moveaxis(levels, 2, 0), torch.tensor(levels)):
        assert np.array_equal(np.asarray(media.open_image(Image(given).source)), levels)
    for wrong in (
        levels / 255,
        levels[0, 0],
        levels.sum(dtype=np.uint8)[...],
        levels[:0],
        torch.ones(2, 2, dtype=torch.bfloat16),
    ):
        with pytest.raises(DataError, match="a picture is an array"):
            Image(wrong)


def test_squash_equals_siglips_own_processor():
    processor = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    image = noise(50, 31)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(media.pixels(image, processor, "squash"), theirs)


def test_pad_is_llavas_letter_box():
    """A square of the mean colour is around the picture before the processor sees it, so it is black to the model."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = noise(64, 32)
    colour = tuple(int(round(255 * mean)) for mean in processor.image_mean)
    canvas = Pillow.new("RGB", (64, 64), colour)
    canvas.paste(image, (0, 16))
    ours = media.pixels(image, processor, "pad")
    assert torch.equal(ours, processor(images=canvas, return_tensors="pt")["pixel_values"][0])
    assert ours[:, 0].abs().max() < 0.01
