"""A model of lmms-eval that is a directory of ours, in its process: `--model isthmus --model_args pretrained=DIR`.

Written against lmms-eval 0.7 (EvolvingLMMs-Lab/lmms-eval), which finds it by the entry point `lmms_eval.models` where
both packages are installed. Served models need none of this: lmms-eval's own `openai` asks them.

Differs: pictures stand before the text, as in that harness' other models. Of a model's generation_config.json only the
end tokens count, as everywhere here. Log-probabilities and talks of several rounds are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from isthmus.assembly import load
from isthmus.speakers.local import Local
from isthmus.types import Image, Sample, Turn

DECODING = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")
"""What a task's `generation_kwargs` may set; `until` cuts the reply, anything else is not ours to honour."""
TOP_K = 50
"""Tokens that are drawn from where a task says nothing of it: that harness' other models leave it to transformers."""


class Isthmus(lmms):  # type: ignore[misc]
    """Answers lmms-eval's requests with a model in this process.

    Args:
        pretrained: a directory that `isthmus train` wrote, or a hub name.
        device, dtype: as in `isthmus.load`.
        batch_size: prompts that are answered together.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int | str = 1,
    ) -> None:
        super().__init__()
        self.model, self.batch_size = load(pretrained, dtype, device), int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A reply to every request, in their order; requests of one decoding are answered together."""
        found = [""] * len(requests)
        ways: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            ways.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(place)
        for places in ways.values():
            settings = requests[places[0]].args[1]
            speaker = Local(self.model, **_decoding(settings))
            for start in range(0, len(places), self.batch_size):
                chosen = places[start : start + self.batch_size]
                replies = speaker.say_all([self._sample(requests[place]) for place in chosen])
                for place, reply in zip(chosen, replies, strict=True):
                    found[place] = _cut(reply, settings.get("until"))
        return found

    def _sample(self, request: Any) -> Sample:
        """The request's pictures, then its text."""
        text, _, pictures_of, number, task, split = request.args
        pictures = pictures_of(self.task_dict[task][split][number]) or []
        return Sample((Turn.say("user", *map(Image, pictures), text),), id=f"{task}/{number}")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("only free replies: `isthmus eval` scores choices by likelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("only one question at a time")


def _decoding(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings for `generate`; a temperature of 0 is greedy."""
    chosen = {name: settings[name] for name in DECODING if settings.get(name) is not None}
    if not chosen.get("temperature"):
        chosen |= {"do_sample": False}
        for name in ("temperature", "top_p", "top_k"):
            chosen.pop(name, None)
        return chosen
    return {"do_sample": True, "top_k": TOP_K, **chosen}


def _cut(reply: str, until: str | Sequence[str] | None) -> str:
    """The reply up to the first of the texts that end it."""
    for ending in [until] if isinstance(until, str) else until or ():
        reply = reply.partition(ending)[0] if ending else reply
    return reply.strip()


manifest = ModelManifest("isthmus", simple_class_path=f"{__name__}.Isthmus")
