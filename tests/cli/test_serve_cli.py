"""`isthmus serve` as a process: it answers, finishes what runs when it is stopped, and refuses what is unsafe."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI
from typer.testing import CliRunner

import composed
from isthmus.cli.app import app
from isthmus.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served") / "mine"
    composed.model("llama").save_pretrained(path)
    return path


@pytest.mark.slow
def test_it_answers_until_it_is_stopped_and_finishes_what_runs(folder):
    script = Path(sys.executable).with_name("isthmus")
    command = [script, "serve", folder, "--port", "0", "--api-key-env", "SERVED_KEY", "--device", "cpu"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"SERVED_KEY": "one"}
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        told = process.stdout.readline()
        address = re.fullmatch(r"mine at (http://127\.0\.0\.1:\d+)/v1\n", told)
        assert address, told
        assert process.stdout.readline() == f"a page to chat at {address[1]}/\n"
        log: list[str] = []
        thread = threading.Thread(target=lambda: log.extend(process.stderr or ()))
        thread.start()
        with OpenAI(base_url=f"{address[1]}/v1", api_key="one", max_retries=5) as client:
            question = [{"role": "user", "content": "hello secret"}]
            stream = client.chat.completions.create(
                model="mine", messages=question, max_tokens=300, temperature=1.5, seed=1, stream=True, timeout=60
            )
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert process.wait(30) == 0 and process.stdout.read() == "stopped\n"
        thread.join()
        assert "one" not in "".join(log).split() and "secret" not in "".join(log)
    finally:
        process.kill()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{address[1]}/health")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--host", "0.0.0.0"], "no key is set"),
        (["--host", "192.168.7.7"], "no key is set"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "holds no key"),
        (["--host", "192.0.2.1", "--api-key-env", "SERVED_KEY"], "cannot listen on 192.0.2.1"),
    ],
)
def test_what_is_unsafe_or_impossible_is_refused_before_the_model_is_read(options, cause, monkeypatch):
    monkeypatch.setenv("SERVED_KEY", "one")
    result = CliRunner().invoke(app, ["serve", "no-such-model", *options])
    assert isinstance(result.exception, ConfigError) and cause in result.exception.cause
