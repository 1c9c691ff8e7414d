"""Two processes that torchrun has started, as `isthmus train` is started on machines with several accelerators."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from isthmus.training import checkpoint
from isthmus.training.log import read_rows
from isthmus.training.toy import toy


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "one process"])
def test_sigterm_saves_in_time_and_the_exit_code_tells(tmp_path: Path, whom: str) -> None:
    """torchrun gives its processes 30 seconds; its own exit code is 1 for whatever ends it, and it reports theirs."""
    recipe = toy(tmp_path / "parts")
    stage = recipe.stages[0].but(budget={"steps": 100_000}, save_every=None, evaluate_every=None)
    recipe.but(stages=[stage]).save(tmp_path / "recipe.json")
    run, said = tmp_path / "run", tmp_path / "said"
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "isthmus", "train"]
    words += [str(tmp_path / "recipe.json"), "--out", str(run), "--device", "cpu"]
    environment = os.environ | {"ISTHMUS_HOME": str(tmp_path / "home")}
    with said.open("wb") as stream:
        launcher = subprocess.Popen([sys.executable, *words], stdout=stream, stderr=stream, env=environment)
        try:
            metrics = run / "align" / "metrics.jsonl"
            while not read_rows(metrics):
                assert launcher.poll() is None, said.read_text()
                time.sleep(0.1)
            began = time.monotonic()
            (launcher if whom == "launcher" else psutil.Process(launcher.pid).children()[1]).terminate()
            assert launcher.wait(60) == 1
            assert time.monotonic() - began < 30
        finally:
            for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else ():
                process.kill()
            launcher.kill()
    told = said.read_text()
    assert "interrupted; what was done is kept" in told
    assert ("exitcode  : 130" in told) is (whom == "one process")
    (saved,) = (run / "align" / "checkpoints").iterdir()
    assert checkpoint.damage(saved) is None
    assert int(saved.name.removeprefix("step-")) == read_rows(metrics)[-1]["step"]
