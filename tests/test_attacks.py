"""The scripts that attack a real server and load hostile directories run end to end at a tiny size, and can fail."""

from __future__ import annotations

import importlib
import json
import socket
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def stands(script, tmp_path, capsys, *names: str) -> None:
    """Run these attacks at a tiny size; each must find that the promise is kept."""
    file = tmp_path / "found.json"
    done = script("attack_server").main(["--tiny", "--only", *names, "--json", str(file)])
    assert done == 0, capsys.readouterr().out + file.read_text()
    found = json.loads(file.read_text())["attacks"]
    assert list(found) == list(names) and all(each["passed"] for each in found.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["S1", "S2", "S3", "S4", "S5"])
def test_a_server_stands_every_attack(name, script, tmp_path, capsys):
    stands(script, tmp_path, capsys, name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_stands_bodies_made_from_its_description(script, tmp_path, capsys):
    pytest.importorskip("schemathesis")
    stands(script, tmp_path, capsys, "S6")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_directories_made_to_harm(script, tmp_path):
    file = tmp_path / "found.json"
    assert script("attack_checkpoints").main(["--tiny", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert sum(found["M1"]["families"]["auto_map, ignored"].values()) >= 1 and found["M2"]["files"] > 10


def test_a_visit_to_the_canary_is_seen(script):
    with script("attack_reach").canary() as (port, visits):
        socket.create_connection(("127.0.0.1", port)).close()
        end = time.monotonic() + 5
        while not visits and time.monotonic() < end:
            time.sleep(0.01)
    assert len(visits) == 1


def test_what_leaks_is_seen(script):
    leak = script("attack_limits").LEAK
    for text in ("at 0x7f3a12345678", "Traceback (most", "/usr/lib/x", "sk-a-secret-that-must-not-leak"):
        assert leak.search(text)
    assert not leak.search("a picture is damaged or cut short")
