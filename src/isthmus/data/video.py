"""Videos as pictures: frames evenly spread over their length, decoded by PyAV; nothing hostile gets past this door.

The container is told by its first bytes and opened as that and nothing else, so a playlist that names other files is
no video. Containers and codecs are on lists; bytes, sides, length and frames are limited before anything is decoded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import SEEK_END, BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeAlias

from PIL import Image as Pillow

from isthmus.data.media import content_key
from isthmus.types import ConfigError, DataError, Image

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

Footage: TypeAlias = str | Path | bytes
"""Where a video comes from: a path or encoded bytes."""
Span: TypeAlias = tuple[float, float]
"""Seconds of a video, from where to where."""

CODECS = ("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mjpeg")
"""What may decode a video, under the names of the library."""
MOST_BYTES = 2 << 30
MOST_PIXELS = 1 << 24
"""Of a frame: 4096 × 4096."""
MOST_TOGETHER = 1 << 28
"""Pixels of all frames that are taken of a video."""
MOST_SECONDS = 6 * 3600
MOST_FRAMES = 256
"""That are taken of a video."""
MOST_DECODED = 20_000
"""Frames that are decoded on the way to the next one that is taken; a quarter of an hour."""
LEAP = 20.0
"""Seconds between frames from which on a place is looked up in the file rather than walked to."""
SLACK = 1.0
"""Seconds that a video may be shorter than it says."""
PROBED = 5_000_000
"""Bytes and microseconds that are read to learn what streams a file has."""
_DECODING = threading.Lock()
"""Several threads may want frames of one clip, which is decoded once; its decoder has threads of its own."""


@dataclass(frozen=True)
class Facts:
    """What the head of a video says."""

    seconds: float
    width: int
    height: int


@dataclass(frozen=True)
class Clip:
    """A video, or the seconds `span` of it, of which `count` frames are shown: those amid as many equal stretches.

    All are decoded when the first is wanted; each is handed out once and then forgotten, so a clip that nobody looks
    at holds nothing.
    """

    source: Footage
    count: int
    span: Span | None = None
    _ready: dict[int, Pillow.Image] = field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def key(self) -> str:
        """A name for what is in the file; all frames share it, so it is read through once."""
        return content_key(self.source)

    def frame(self, number: int) -> Pillow.Image:
        """One of the `count` frames, from 0, in upright RGB.

        Raises:
            DataError: the video is refused, damaged, or cut short.
        """
        with _DECODING:
            if number not in self._ready:
                self._ready.update(enumerate(decoded(self.source, self.count, self.span)))
            return self._ready.pop(number)


@dataclass(frozen=True)
class Frame:
    """One frame of a clip: a picture that is decoded when it is needed."""

    clip: Clip
    number: int

    @property
    def key(self) -> str:
        place = f"{self.clip.key} {self.number} of {self.clip.count}"
        if self.clip.span is not None:
            place += f" from {self.clip.span[0]!r} to {self.clip.span[1]!r}"
        return hashlib.sha256(place.encode()).hexdigest()

    def draw(self) -> Pillow.Image:
        return self.clip.frame(self.number)


def frames(source: Footage, count: int = 8, fps: float | None = None, span: Span | None = None) -> tuple[Image, ...]:
    """A video as pictures for a model that sees pictures: `Turn.say("user", *frames("cat.mp4"), "What happens?")`.

    Args:
        count: how many.
        fps: so many per second of the video instead, and then at most `count`; the head of the file is read for it.
        span: the seconds that are shown, from where to where; None is the whole video.

    Raises:
        ConfigError: there are to be none, or too many; or PyAV, which is needed for `fps` already, is not installed.
        DataError: `fps` is given and the video is refused.
    """
    if not 1 <= count <= MOST_FRAMES or (fps is not None and fps <= 0):
        raise ConfigError(f"cannot show {count} frames at {fps} per second", f"choose 1 to {MOST_FRAMES}, and fps > 0")
    if fps is not None:
        start, end = _within(span, facts(source).seconds, _name(source))
        count = min(count, max(1, round((end - start) * fps)))
    clip = Clip(source, count, span)
    return tuple(Image(Frame(clip, number)) for number in range(count))


def facts(source: Footage) -> Facts:
    """Length and size of a video; nothing is decoded.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: it is refused.
    """
    with _opened(source) as (container, stream):
        return Facts(
            _seconds(container, stream, _name(source)), stream.codec_context.width, stream.codec_context.height
        )


def decoded(source: Footage, count: int, span: Span | None = None) -> list[Pillow.Image]:
    """`count` frames in upright RGB, in order; a short video shows some of them more than once.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: the video is refused, damaged, cut short, or ends before `span` does.
    """
    where = _name(source)
    with _opened(source) as (container, stream):
        start, end = _within(span, _seconds(container, stream, where), where)
        context = stream.codec_context
        if count * context.width * context.height > MOST_TOGETHER:
            raise DataError(f"{where}: {count} frames of its size are too much at once", "show fewer, or scale it down")
        begin = (stream.start_time or 0) * _tick(stream)
        times = [begin + start + (end - start) * (number + 0.5) / count for number in range(count)]
        return [_upright(frame) for frame in _at(container, stream, times, where)]


def _within(span: Span | None, seconds: float, where: str) -> Span:
    """The seconds that are shown of a video that lasts so many."""
    start, end = span or (0.0, seconds)
    if end > seconds + SLACK or start >= seconds:
        raise DataError(
            f"{where}: lasts {seconds:.1f} seconds, and {start:g} to {end:g} are to be shown",
            "name a stretch within it",
        )
    return start, min(end, seconds)


# ---------------------------------------------------------------------------------------------- frames by time


def _at(container: InputContainer, stream: VideoStream, times: list[float], where: str) -> Iterator[av.VideoFrame]:
    """The frame that is seen at each of these times, which ascend."""
    playing = container.decode(stream)
    shown = following = next(playing, None)
    if shown is None:
        _damaged(where)
    for time in times:
        if time - _time(shown) > LEAP:
            container.seek(int(time / _tick(stream)), stream=stream)  # to the key frame before it
            playing = container.decode(stream)
            following = next(playing, None)
        shown, following = _walk(playing, shown, following, time, where)
        yield shown


def _walk(
    playing: Iterator[av.VideoFrame], shown: av.VideoFrame, following: av.VideoFrame | None, time: float, where: str
) -> tuple[av.VideoFrame, av.VideoFrame | None]:
    """Play on to a time: what is seen then, and the frame behind it."""
    steps = 0
    while following is not None and _time(following) <= time:
        shown, following = following, next(playing, None)
        steps += 1
        if steps > MOST_DECODED:
            raise DataError(
                f"{where}: too many frames between two of those to be shown", "encode it again, or show more"
            )
    if following is None and time > _time(shown) + max(SLACK, _lasts(shown)):
        _damaged(where)
    return shown, following


def _time(frame: av.VideoFrame) -> float:
    return frame.time or 0.0


def _lasts(frame: av.VideoFrame) -> float:
    return float((frame.duration or 0) * (frame.time_base or 0))


def _upright(frame: av.VideoFrame) -> Pillow.Image:
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


# ---------------------------------------------------------------------------------------------- the door


@contextlib.contextmanager
def _opened(source: Footage) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video whose head is allowed; whatever the library stumbles over is said in our words."""
    library, where = _library(), _name(source)
    with _bytes(source, where) as file:
        try:
            limits = {"codec_whitelist": ",".join(CODECS), "probesize": str(PROBED), "analyzeduration": str(PROBED)}
            own = {"max_pixels": str(MOST_PIXELS)}
            with library.open(
                file, format=_format(file, where), options=limits | own, io_open=_nothing_else
            ) as container:
                yield container, _stream(container, where)
        except DataError:
            raise
        except Exception:  # decoders raise whatever their format makes them stumble over
            _damaged(where)


def _stream(container: InputContainer, where: str) -> VideoStream:
    """The first stream of pictures, unless its head asks for too much."""
    stream = next(iter(container.streams.video), None)
    if stream is None:
        raise DataError(f"{where}: holds no pictures", "name a video")
    context = stream.codec_context
    if context is None or context.name not in CODECS:
        raise DataError(
            f"{where}: a codec that is not read here", "encode it as H.264: ffmpeg -i IN -c:v libx264 OUT.mp4"
        )
    if not 0 < context.width * context.height <= MOST_PIXELS:
        raise DataError(f"{where}: frames of more than {MOST_PIXELS >> 20} megapixels, or none", "scale it down")
    context.options = {"max_pixels": str(MOST_PIXELS)}  # frames may grow on the way
    context.thread_count = 1  # many processes prepare batches at once
    return stream


def _seconds(container: InputContainer, stream: VideoStream, where: str) -> float:
    """How long a video lasts, by its head, or by its packets where the head does not say."""
    if stream.duration:
        seconds = stream.duration * _tick(stream)
    elif container.duration:
        seconds = container.duration / 1_000_000
    else:
        ends = [(packet.pts or 0) + (packet.duration or 0) for packet in islice(container.demux(stream), 1 << 20)]
        seconds = (max(ends, default=0) - (stream.start_time or 0)) * _tick(stream)
        container.seek(0)
    if not 0 < seconds <= MOST_SECONDS:
        raise DataError(f"{where}: lasts no time, or more than {MOST_SECONDS // 3600} hours", "cut it")
    return seconds


def _tick(stream: VideoStream) -> float:
    """Seconds of a step of the stream's own clock."""
    return float(stream.time_base or 0)


def _format(file: BinaryIO, where: str) -> str:
    """What kind of container a file is, by its first bytes, if it is not too large."""
    if file.seek(0, SEEK_END) > MOST_BYTES:
        raise DataError(f"{where}: more than {MOST_BYTES >> 30} GiB", "cut it, or encode it smaller")
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
        return "avi"
    raise DataError(f"{where}: not a video in MP4, MOV, MKV, WebM or AVI", "convert it, or remove it")


def _bytes(source: Footage, where: str) -> BinaryIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    if str(source).startswith(("http://", "https://")):
        raise DataError(f"{where}: videos are not fetched from the network", "download it and name the file")
    try:
        return Path(source).open("rb")
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else "not a valid path"
        raise DataError(f"{where}: cannot be opened ({cause})", "check the path and its permissions") from None


def _nothing_else(*asked: Any) -> NoReturn:
    raise PermissionError("a video opens no other file")


def _damaged(where: str) -> NoReturn:
    raise DataError(f"{where}: the video is damaged or cut short", "replace the file, or remove the record") from None


def _library() -> Any:
    try:
        import av
    except ModuleNotFoundError:
        raise ConfigError("videos need the package av", "pip install 'isthmus[video]'") from None
    return av


def _name(source: Footage) -> str:
    return "a video in memory" if isinstance(source, bytes) else str(source)
