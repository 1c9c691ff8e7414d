"""Videos that the test itself writes: which frames are taken, what is refused, and that a model learns from them."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from typer.testing import CliRunner

from isthmus.cli.app import app
from isthmus.data import formats, video, writers
from isthmus.data.media import content_key, open_image
from isthmus.data.records import Records, found
from isthmus.training.run import Run
from isthmus.training.toy import toy
from isthmus.types import ConfigError, DataError, Video

av = pytest.importorskip("av")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))


def film(
    greys: Sequence[int],
    rate: int = 10,
    format: str = "mp4",
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 48),
) -> bytes:
    """A video whose frames are of these greys, a key frame every twelfth."""
    out = BytesIO()
    with av.open(out, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for grey in greys:
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def greys(pictures: Sequence[Pillow.Image]) -> list[int]:
    return [round(float(np.asarray(picture, np.float64).mean())) for picture in pictures]


STEPS = [15 * number + 8 for number in range(16)]
"""Greys far enough apart for what coding takes from them."""


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mp4", "mpeg4"), ("mov", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mjpeg"), ("webm", "libvpx")],
)
def test_frames_are_those_in_the_middle_of_equal_stretches(format: str, codec: str) -> None:
    data = film(STEPS, format=format, codec=codec)
    for count in (1, 3, 16):
        seen = greys(video.decoded(data, count))
        expected = [STEPS[int(16 * (number + 0.5) / count)] for number in range(count)]
        assert near(seen, expected), (seen, expected)
    assert (video.facts(data).width, video.facts(data).height) == (64, 48)
    assert abs(video.facts(data).seconds - 1.6) < 0.11


def near(seen: Sequence[int], expected: Sequence[int]) -> bool:
    """Nearer than the next step is."""
    return len(seen) == len(expected) and max(abs(a - b) for a, b in zip(seen, expected)) < 7


def test_a_stretch_shows_the_frames_of_its_own_seconds(tmp_path: Path) -> None:
    """Of 16 frames, 10 a second, those from 0.5 to 1.3 seconds: the sixth to the thirteenth."""
    data = film(STEPS)
    seen = greys(video.decoded(data, 8, (0.5, 1.3)))
    assert near(seen, STEPS[5:13]), seen
    shown = video.frames(data, 20, fps=10, span=(0.5, 1.3))
    assert near(greys([open_image(image.source) for image in shown]), STEPS[5:13])
    whole, cut = video.frames(data, 4)[0].source, video.frames(data, 4, span=(0.5, 1.3))[0].source
    assert content_key(whole) != content_key(cut)  # features of the one are not those of the other
    with pytest.raises(DataError, match=r"lasts 1\.6 seconds, and 1 to 9 are to be shown"):
        video.decoded(data, 2, (1, 9))


def test_a_record_names_a_stretch_which_is_written_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(film(STEPS))
    said = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "It brightens."}]
    record = {"id": "1", "videos": [{"path": "a.mp4", "span": [0.5, 1.3]}], "messages": said}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record))
    (sample,) = formats.load(path)
    assert sample.media == (Video(tmp_path / "a.mp4", span=(0.5, 1.3)),)
    for to, name in (("messages", "again.jsonl"), ("webdataset", "tars")):
        writers.write([sample], tmp_path / name, to)  # type: ignore[arg-type]
        (medium,) = formats.load(tmp_path / name)[0].media
        assert isinstance(medium, Video) and medium.span == (0.5, 1.3)
    (shown,) = formats.load(path, options=formats.FileOptions(frames=8))
    assert near(greys([open_image(image.source) for image in shown.media]), STEPS[5:13])  # type: ignore[arg-type]
    path.write_text(json.dumps({**record, "videos": [{"path": "a.mp4", "span": [1.0, 9.0]}]}))
    (fault,) = [one for one in found(formats.Form(path)) if isinstance(one, formats.Fault)]
    assert "lasts 1.6 seconds" in fault.message


def test_a_leap_finds_the_frames_that_a_walk_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film(STEPS)
    walked = video.decoded(data, 5)
    monkeypatch.setattr(video, "LEAP", 0.0)
    assert [one.tobytes() for one in video.decoded(data, 5)] == [one.tobytes() for one in walked]


def test_a_single_frame_of_a_long_video_is_leapt_to(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film([*STEPS, *STEPS])  # the frame in the middle is the fourth behind a key frame
    walked = video.decoded(data, 1)
    monkeypatch.setattr(video, "LEAP", 0.0)
    monkeypatch.setattr(video, "MOST_DECODED", 8)
    assert video.decoded(data, 1)[0].tobytes() == walked[0].tobytes()


def test_a_short_video_shows_frames_again_and_a_still_one_all_the_same() -> None:
    assert near(greys(video.decoded(film([50, 200]), 4)), [50, 50, 200, 200])
    assert len(video.decoded(film([90]), 3)) == 3


def test_a_telephone_s_video_stands_upright() -> None:
    half = np.zeros((48, 64, 3), np.uint8)
    half[:, :32] = 255  # white on the left
    out = BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(half, format="rgb24")), *stream.encode()])
    (shown,) = video.decoded(out.getvalue(), 1)
    with av.open(BytesIO(out.getvalue())) as container:
        (frame,) = container.decode(video=0)
        degrees = frame.rotation  # counter-clockwise, by PyAV's documentation
    assert abs(degrees) == 90 and shown.size == (48, 64)
    above, below = np.asarray(shown)[:16].mean(), np.asarray(shown)[-16:].mean()
    assert (above < below) == (degrees == 90)


def test_frames_are_pictures_of_their_own_with_stable_names(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(film(STEPS))
    shown, again = (video.frames(tmp_path / "a.mp4", 4) for _ in range(2))
    keys = [content_key(one.source) for one in shown]
    assert keys == [content_key(one.source) for one in again] and len(set(keys)) == 4
    assert keys == [content_key(one.source) for one in video.frames((tmp_path / "a.mp4").read_bytes(), 4)]
    assert keys[0] != content_key(video.frames(tmp_path / "a.mp4", 2)[0].source)
    assert near(greys([open_image(one.source) for one in shown]), [STEPS[place] for place in (2, 6, 10, 14)])
    assert not shown[0].source.clip._ready  # type: ignore[union-attr]
    assert len(video.frames(tmp_path / "a.mp4", 8, fps=2)) == 3 and len(video.frames(tmp_path / "a.mp4", 8, 10)) == 8


# ---------------------------------------------------------------------------------------------- what is refused


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\n"


@pytest.mark.parametrize("data", [b"", b"\0" * 64, PLAYLIST, CONCAT, b"\x89PNG\r\n\x1a\n" + b"\0" * 64, b"GIF89a"])
def test_what_is_no_video_is_not_even_probed(data: bytes) -> None:
    with pytest.raises(DataError, match="not a video in MP4"):
        video.decoded(data, 2)


@pytest.mark.parametrize("start", [b"\0\0\0\x18ftypmp42", b"\x1a\x45\xdf\xa3", b"RIFF\0\0\0\0AVI "])
def test_a_false_head_is_damage(start: bytes) -> None:
    for rest in (b"", PLAYLIST, b"\xff" * 4096):
        with pytest.raises(DataError, match="damaged or cut short|holds no pictures|codec"):
            video.decoded(start + rest, 2)


def test_a_video_that_ends_early_is_cut_short() -> None:
    whole = film(STEPS * 2, format="matroska")
    assert len(video.decoded(whole, 4)) == 4
    with pytest.raises(DataError, match="damaged or cut short"):
        video.decoded(whole[: len(whole) // 2], 4)
    with pytest.raises(DataError, match="damaged or cut short"):
        video.decoded(film(STEPS)[:-200], 4)  # without its table


def test_limits_hold_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film(STEPS)
    monkeypatch.setattr(video, "_at", lambda *given: pytest.fail("decoded"))
    for name, limit, cause in (
        ("MOST_BYTES", 100, "GiB"),
        ("MOST_PIXELS", 64 * 47, "megapixels"),
        ("MOST_TOGETHER", 64 * 48, "too much at once"),
        ("MOST_SECONDS", 1, "hours"),
        ("CODECS", ("h264",), "codec"),
    ):
        with monkeypatch.context() as patch, pytest.raises(DataError, match=cause):
            patch.setattr(video, name, limit)
            video.decoded(data, 2)


def test_other_codecs_are_refused() -> None:
    with pytest.raises(DataError, match="a codec that is not read here"):
        video.decoded(film(STEPS, format="matroska", codec="ffv1"), 2)


def test_mutated_videos_are_read_or_refused() -> None:
    data, random = film(STEPS, size=(32, 32)), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        harmed = bytearray(data)
        for place in random.integers(0, len(data), 8):
            harmed[place] = random.integers(0, 256)
        try:
            assert len(video.decoded(bytes(harmed), 3)) == 3
        except DataError as error:
            refused += 1
            assert error.remedy
    assert 0 < refused < 60


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *more: Any) -> Any:
        if name == "av":
            raise ModuleNotFoundError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError) as error:
        video.decoded(b"", 1)
    assert error.value.remedy == "pip install 'isthmus[video]'"


# ---------------------------------------------------------------------------------------------- as data


def write(folder: Path, rows: int = 4) -> Path:
    """Dark and bright videos, one question each."""
    folder.mkdir()
    lines = []
    for number in range(rows):
        (folder / f"{number}.mp4").write_bytes(film([20 + number, 30 + number] if number % 2 else [220 + number] * 3))
        said = [
            {"role": "user", "content": "<video>Dark or bright?"},
            {"role": "assistant", "content": "dark" if number % 2 else "bright"},
        ]
        lines.append(json.dumps({"id": str(number), "videos": [f"{number}.mp4"], "messages": said}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def test_frames_stand_where_the_video_stood(tmp_path: Path) -> None:
    file = write(tmp_path / "data")
    plain = Records(formats.Form(file))[0]
    assert [type(part) for part in plain.turns[0].parts][0] is Video
    sample = Records(formats.Form(file, options=formats.FileOptions(frames=3)))[0]
    assert [type(part).__name__ for part in sample.turns[0].parts] == ["Image"] * 3 + ["Text"]
    with pytest.raises(ConfigError, match="fps"):
        from isthmus.cli.options import form_of

        form_of(file, None, ["fps=1"])


@pytest.mark.parametrize("shown", [[], ["-s", "frames=4", "-s", "fps=9"]])
def test_check_decodes_videos_and_stats_measure_them(tmp_path: Path, shown: list[str]) -> None:
    file = write(tmp_path / "data")
    assert CliRunner().invoke(app, ["data", "check", str(file), *shown]).exit_code == 0
    told = json.loads(CliRunner().invoke(app, ["data", "stats", str(file), "--json", *shown]).stdout)
    assert told["width"]["median"] == 64 and told["height"]["median"] == 48 and told["unreadable media"] == 0
    harmed = tmp_path / "data" / "3.mp4"
    harmed.write_bytes(harmed.read_bytes()[:-300])
    form = formats.Form(file, options=formats.FileOptions(frames=2) if shown else formats.FileOptions())
    (fault,) = [one for one in found(form) if isinstance(one, formats.Fault)]
    assert fault.line == 4 and "3.mp4: the video is damaged" in fault.message
    assert json.loads(CliRunner().invoke(app, ["data", "stats", str(file), "--json"]).stdout)["unreadable media"] == 1


def test_a_model_trains_on_frames(tmp_path: Path) -> None:
    from rich.console import Console

    recipe = toy(tmp_path / "toy", rows=1)
    source = {"name": str(write(tmp_path / "data")), "options": {"frames": 3}}
    stage = recipe.stages[0].but(data=[source], budget={"steps": 2}, save_every=None, evaluate_every=None)
    run = Run(recipe.but(stages=[stage]), tmp_path / "run", torch.device("cpu"), Console(quiet=True))
    model = run.newborn()
    look = run.look(model)
    assert run.train(model, look) is not None
    assert len(look) == 4 * 3  # type: ignore[arg-type]
    batch = model.processor.collator(look)(
        [Records(formats.Form(Path(source["name"]), options=formats.FileOptions(frames=3)))[0]]
    )
    assert len(batch.media["image"]) == 3
