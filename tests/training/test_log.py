"""What a run tells: rows survive a crash, plain lines off a terminal, and a picture that shows the curve."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isthmus.training.curves import COLOURS, DOT, LINE, _ticks, draw_curves, draw_together
from isthmus.training.log import Metrics, Progress, read_rows
from isthmus.types import ConfigError

ROW = {"loss": 2.5, "tokens_per_second": 1234.5, "data_wait": 0.07, "seconds": 0.5}


def test_rows_after_the_resumed_step_and_a_half_written_one_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "run" / "metrics.jsonl"
    first = Metrics(file, after=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": step / 2})
    first.write({"step": 3, "validation_loss": 9.0})
    with file.open("a") as stream:
        stream.write('{"step": 4, "lo')
    Metrics(file, after=2).write({"step": 3, "loss": 7.0})
    rows = read_rows(file)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 7.0)]
    assert abs(time.time() - rows[-1]["time"]) < 60


@pytest.mark.parametrize(
    "harmed", [b"\xff\n", b"null\n", b'"step": 2}\n', b'{"loss": 2.0}\n', b'{"step": "2"}\n', b"\n"]
)
def test_a_damaged_row_takes_no_other_with_it(tmp_path: Path, harmed: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + harmed + b'{"step": 3}\n')
    Metrics(file, after=3)
    assert [row["step"] for row in read_rows(file)] == [1, 3]


def test_plain_lines_off_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=200), "align", steps=40, done=0) as progress:
        for step in range(1, 41):
            progress.show({"step": step, **ROW})
    lines = out.getvalue().splitlines()
    assert len(lines) == 20 and "\x1b" not in out.getvalue()
    assert lines[0] == "align 2/40 · loss 2.5000 · 1,234 tokens/s · waiting for data 7%" and "40/40" in lines[-1]


@pytest.mark.parametrize(("even", "odd", "said"), [(0.2, 0.05, "15%"), (0.15, 0.02, "11%"), (0.1, 0.05, None)])
def test_waiting_for_data_is_said_once_above_a_tenth(even: float, odd: float, said: str | None) -> None:
    """Of the twenty steps after the first, ten of each kind; even ones take 1 s, odd ones half of it."""
    out = io.StringIO()
    with Progress(Console(file=out, width=200), "align", steps=60, done=0) as progress:
        for step in range(1, 61):
            wait = 0.9 if step == 1 else odd if step % 2 else even
            progress.show({"step": step, **ROW, "data_wait": wait, "seconds": 0.5 if step % 2 else 1.0})
    told = [line for line in out.getvalue().splitlines() if line.startswith("waiting for data takes")]
    expected = f"waiting for data takes {said} of the time: more engine.workers prepare more batches ahead"
    assert told == ([expected] if said else [])


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=120, force_terminal=True), "align", steps=40, done=10) as progress:
        progress.show({"step": 11, **ROW})
    assert "11/40" in out.getvalue() and "loss 2.5000" in out.getvalue()


def test_the_picture_falls_where_the_loss_falls(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 4 - step / 30} for step in range(1, 101)]
    rows += [{"step": 50, "validation_loss": 3.0}, {"step": 100, "validation_loss": 1.0}]
    draw_curves(rows, tmp_path / "curves.png", "Stage align")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)

    def places(colour: str) -> list[tuple[int, int]]:
        wanted = tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
        rows, columns = np.nonzero(np.abs(pixels - wanted).max(-1) < 40)
        return [(x, y) for x, y in zip(columns.tolist(), rows.tolist()) if y > 48]  # below the legend

    line, dots = sorted(places(LINE)), sorted(places(DOT))
    assert line[-1][0] - line[0][0] > 700 and line[-1][1] - line[0][1] > 200
    assert dots[-1][0] - dots[0][0] > 350 and dots[-1][1] > dots[0][1]


@pytest.mark.parametrize("rows", [[{"step": 1, "loss": 2.0}], [{"step": n, "loss": 3.0} for n in (1, 2)]])
def test_one_point_and_a_flat_line_are_drawn(tmp_path: Path, rows: list[dict]) -> None:
    draw_curves(rows, tmp_path / "curves.png", "t")
    assert Image.open(tmp_path / "curves.png").size == (960, 540)


def test_several_curves_in_colours_of_their_own(tmp_path: Path) -> None:
    falling = [{"step": step, "loss": 4 - step / 30} for step in range(1, 101)]
    flat = [{"step": step, "loss": 3.0} for step in range(1, 51)]
    assert draw_together({"a · align": falling, "b · align": flat, "c · new": []}, tmp_path / "runs.png")
    pixels = np.asarray(Image.open(tmp_path / "runs.png").convert("RGB")).astype(int)
    seen = []
    for colour in COLOURS[:3]:
        wanted = tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
        near = np.abs(pixels[80:480, :600] - wanted).max(-1) < 40  # away from the names
        seen.append(int(near.sum()))
    assert seen[0] > 100 and seen[1] > 100 and seen[2] == 0  # the stage without a step has no line
    assert not draw_together({"c · new": []}, tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def events(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard itself reads."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_tensorboard_reads_every_row_once_over_a_kill_and_a_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    killed = Metrics(file, after=0, tensorboard=True)  # never closed
    for step in range(1, 8):
        killed.write({"step": step, "loss": float(step), "learning_rate": 0.5})
    with Metrics(file, after=4, tensorboard=True) as resumed:
        for step in range(5, 10):
            resumed.write({"step": step, "loss": 100.0 + step})
        resumed.write({"step": 9, "validation_loss": 7.0})
    expected = [(step, float(step)) for step in range(1, 5)] + [(step, 100.0 + step) for step in range(5, 10)]
    assert events(tmp_path / "tensorboard", "loss") == expected
    assert events(tmp_path / "tensorboard", "learning_rate") == [(step, 0.5) for step in range(1, 5)]
    assert events(tmp_path / "tensorboard", "validation_loss") == [(9, 7.0)]
    assert [row["loss"] for row in read_rows(file) if "loss" in row] == [loss for _, loss in expected]


def test_tensorboard_switched_on_midway_brings_the_past_with_its_times(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    Metrics(file, after=0).write({"step": 1, "loss": 2.0})
    with Metrics(file, after=1, tensorboard=True) as metrics:
        metrics.write({"step": 2, "loss": 1.0})
    assert events(tmp_path / "tensorboard", "loss") == [(1, 2.0), (2, 1.0)]


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"isthmus\[tensorboard\]"):
        Metrics(tmp_path / "metrics.jsonl", after=0, tensorboard=True)


def test_no_rows_no_picture(tmp_path: Path) -> None:
    draw_curves([], tmp_path / "curves.png", "t")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("low, high", [(0, 1), (0.013, 0.02), (1.2, 97), (0, 5000), (3, 3), (0, 0)])
def test_ticks_enclose_the_range_with_few_round_numbers(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    assert all(len(f"{tick:g}".replace("-", "").replace(".", "").strip("0")) <= 3 for tick in ticks)
