"""The figures of a comparison: the front by hand, marks inside their frames, and well-formed SVG with words."""

from __future__ import annotations

import re
import xml.etree.ElementTree as Tree

import pytest

from isthmus.comparing import figures
from isthmus.comparing.outcome import Cell, Drawn, Line
from isthmus.evaluation.seeds import Level

NAMES = ("a <joint>", "b", "c", "d", "e", "f")
QUALITY = dict(zip(NAMES, (0.5, 0.7, 0.6, 0.7, 0.9, 0.2)))
COSTS = dict(zip(NAMES, (1.0, 2.0, 3.0, 2.0, 400.0, 0.5)))


def line(unit: str = "accuracy") -> Line:
    cells = {
        name: Cell(Level(value, (value,), value - 0.3, value + 0.3, value - 0.1, value + 0.1), {}, None)
        for name, value in QUALITY.items()
    }
    return Line("t", "Task & more", unit, 100, 50, cells)


def test_the_front_is_what_nothing_cheaper_is_as_good_as() -> None:
    assert figures.best(line(), NAMES, COSTS) == ["f", "a <joint>", "b", "e"]
    assert figures.best(line("nats per token"), NAMES, COSTS) == ["f"]  # lower is better, and it is the cheapest


@pytest.mark.parametrize("drawn", ["forest", "front", "free", "losses"])
def test_figures_are_sound_and_say_what_they_show(drawn: str) -> None:
    falling = tuple((float(step), 5 - step / 10) for step in range(1, 30))
    text = {
        "forest": lambda: figures.forest(line(), NAMES, "b"),
        "front": lambda: figures.front(line(), NAMES, COSTS, "GFLOP", "computation"),
        "free": lambda: figures.front(line(), NAMES, dict.fromkeys(NAMES, 0.0), "MiB", "memory"),
        "losses": lambda: figures.losses(Drawn("sft", {"b": falling}, {"b": falling[::9]}), NAMES),
    }[drawn]()
    root = Tree.fromstring(text)
    assert root.get("role") == "img" and len(root.get("aria-label") or "") > 20
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    for shape in root.iter():
        across = [shape.get(key) for key in ("x", "x1", "x2", "cx")]
        down = [shape.get(key) for key in ("y", "y1", "y2", "cy")]
        assert all(0 <= float(place) <= width for place in across if place), Tree.tostring(shape)
        assert all(0 <= float(place) <= height for place in down if place), Tree.tostring(shape)
    if drawn != "losses":
        assert len(re.findall('class="sign"', text)) == len(NAMES)


def test_ticks_close_together_are_told_apart() -> None:
    """Of large sets intervals are narrow: .50, .505 and .51 are three numbers."""
    cells = {name: Cell(Level(0.505, (0.505,), 0.5, 0.51, 0.5, 0.51), {}, None) for name in ("a", "b")}
    text = figures.forest(Line("t", "Task", "accuracy", 20_000, 9_000, cells), ["a", "b"], "a")
    ticks = [(float(x), float(told)) for x, told in re.findall(r'class="tick" x="([\d.]+)"[^>]*>([^<]+)<', text)]
    steps = {round((told - before) / (x - start), 6) for (start, before), (x, told) in zip(ticks, ticks[1:])}
    assert len(ticks) > 2 and len(steps) == 1


def test_joints_are_told_apart_without_colour() -> None:
    """By those who see few colours, and by everybody on grey paper."""

    def shape(number: int) -> str:
        return re.sub(r"<g class=.*?>", "", figures.sign(number, 10, 10))

    assert len({shape(number) for number in range(8)}) == 8
    assert len({figures.sign(number, 10, 10) for number in range(40)}) == 40
    for number in range(8):
        told = re.search('points="(.*?)"', figures.sign(number, 10, 10, 4))
        corners = [tuple(map(float, each.split(","))) for each in told[1].split()] if told else []
        assert all(abs(x - 10) <= 6 and abs(y - 10) <= 6 for x, y in corners)


def test_costs_that_spread_are_drawn_on_a_logarithmic_scale() -> None:
    frame = figures.Frame([1, 10, 100], [0, 1], log=True)
    assert frame.at(10, 0)[0] == pytest.approx((frame.at(1, 0)[0] + frame.at(100, 0)[0]) / 2)
    assert figures.Frame([0, 50, 100], [0, 1]).at(50, 0)[0] == pytest.approx(frame.at(10, 0)[0])
