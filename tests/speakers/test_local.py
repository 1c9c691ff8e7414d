"""A model in this process as a speaker."""

from __future__ import annotations

import time
from contextlib import closing

import composed
from isthmus.speakers.local import Local
from isthmus.types import Turn


def test_a_model_that_nobody_listens_to_stops(monkeypatch):
    model = composed.stir(composed.model("llama"))
    model.generation_config.eos_token_id = None
    steps, think = [], type(model).think
    monkeypatch.setattr(type(model), "think", lambda self, *all: steps.append(1) or think(self, *all))
    speaker, turns = Local(model, max_new_tokens=400), [Turn.say("user", "hi")]
    with closing(speaker.stream(turns)) as pieces:
        next(pieces)
    told = len(steps)
    time.sleep(0.2)
    assert told == len(steps) < 400
