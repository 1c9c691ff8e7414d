"""A VLM in this process as a Speaker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from isthmus.data.collate import Look
from isthmus.model import VLM
from isthmus.types import Batch, ConfigError, Sample, Turn

PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
} | dict.fromkeys(
    (
        "bad_words_ids",
        "begin_suppress_tokens",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "guidance_scale",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "sequence_bias",
        "suppress_tokens",
        "temperature",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
        "watermarking_config",
    )
)
"""Options of `generate` with which the model's own logits decide: of its generation_config.json only the end tokens
count. The server decodes so, and likelihoods are measured so."""


class Local:
    """Speaks with a VLM.

    Args:
        model: the model; answers are computed in its own arithmetic.
        look: how media become pixels or features; the processor's own by default.
        decode: options of `generate` (`max_new_tokens`, `do_sample`, `temperature`, `top_p`, `num_beams`) in place of
            `PLAIN`'s; the model's own settings say only where an answer ends.
        route: of which kind all that is said to it is (`types.Route`); None lets every conversation tell its own.

    Raises:
        ConfigError: a route is given, and the joint does not treat kinds of tasks apart.
    """

    def __init__(self, model: VLM, look: Look | None = None, route: int | None = None, **decode: Any):
        if route is not None and not model.aligner.routes:
            raise ConfigError(f"{model.aligner.name} does not treat kinds of tasks apart", "leave the route out")
        self.model, self.look, self.meta = model, look, {} if route is None else {"route": route}
        self.decode = PLAIN | {"max_new_tokens": 128, "pad_token_id": model.processor.pad} | decode

    def say(self, turns: Sequence[Turn]) -> str:
        """The answer to a conversation that ends with the user."""
        return self.say_all([Sample(tuple(turns))])[0]

    def say_all(self, samples: Sequence[Sample]) -> list[str]:
        """Answers to several conversations in one left-padded batch."""
        batch = self._prompt(samples)
        ids = self.model.generate(batch, **self.decode)
        start = 0 if self.model.config.is_encoder_decoder else batch.input_ids_BT.shape[1]
        return [text.strip() for text in self.model.processor.batch_decode(ids[:, start:], skip_special_tokens=True)]

    def stream(self, turns: Sequence[Turn]) -> Iterator[str]:
        """The answer in pieces as it is generated; an error in the model is raised here.

        Whoever stops listening (closes the iterator) stops the model before its next token.
        """
        streamer = TextIteratorStreamer(self.model.processor.tokenizer, skip_special_tokens=True)
        failed, left = [], Event()
        stopping = StoppingCriteriaList([_Left(left)])

        def generate() -> None:
            try:
                batch = self._prompt([Sample(tuple(turns))])
                if left.is_set():
                    return
                self.model.generate(batch, streamer=streamer, stopping_criteria=stopping, **self.decode)
            except BaseException as error:
                failed.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            left.set()
            thread.join()
        if failed:
            raise failed[0]

    def _prompt(self, samples: Sequence[Sample]) -> Batch:
        samples = [one.but(meta={**self.meta, **one.meta}) for one in samples]
        with torch.inference_mode():
            return self.model.processor.prompts(samples, self.look).to(self.model.device)


class _Left(StoppingCriteria):
    """Ends every row once nobody listens."""

    def __init__(self, left: Event):
        self.left = left

    def __call__(self, input_ids: Tensor, scores: Tensor, **unused: Any) -> Tensor:
        return torch.full((len(input_ids),), self.left.is_set(), dtype=torch.bool, device=input_ids.device)
