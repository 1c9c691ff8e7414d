"""Whether two forms of one model are the same: what each makes of a question, compared step by step.

A form is a model in memory or a directory of ours, a directory of a class of transformers, or an endpoint. An endpoint
tells the greedy text and, where it can, the tokens of prompt and answer, how likely the latter were, and the vector of
a picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, Blip2Processor, InstructBlipProcessor

from isthmus import kernels_linear, parts
from isthmus.config import check
from isthmus.data.media import MOST_PIXELS, open_image
from isthmus.exporting import TOLERANCE
from isthmus.model import VLM, VLMConfig
from isthmus.pretrained import quiet
from isthmus.processor import MARKER
from isthmus.serving import told
from isthmus.serving.spelling import Spelling
from isthmus.speakers.local import PLAIN
from isthmus.speakers.remote import Remote
from isthmus.speakers.settings import RemoteConfig
from isthmus.types import Batch, ConfigError, Image, Sample, Turn

EXACT = 1e-5
"""Of prepared pictures."""
LONGEST = 64
"""Greedy tokens that are compared."""
PICTURE = -1
"""Stands for every place of a picture, whatever placeholder a form has for it."""


@dataclass(frozen=True)
class Question:
    """What both are asked, as the first turn of a conversation."""

    prompt: str
    image: Image | None = None

    @property
    def turn(self) -> Turn:
        return Turn.say("user", *(() if self.image is None else (self.image,)), self.prompt)


@dataclass(frozen=True)
class Seen:
    """What a form made of a question; an endpoint tells `text`, and perhaps all but `logits` and `pixels`.

    Attributes:
        pixels: the prepared picture.
        vector: what encoder and joint make of it, one vector of length 1.
        ids: the prompt's tokens, `PICTURE` where the picture stands; an endpoint has its own placeholder there.
        length: how many they are.
        logits: at every position of the prompt, [T, V].
        tokens: the greedy answer.
        logprobs: of each of its tokens.
        spelled: its tokens as bytes; None for part of a character.
        text: the same in words.
    """

    text: str
    length: int | None = None
    logprobs: tuple[float, ...] | None = None
    ids: tuple[int, ...] | None = None
    logits: Tensor | None = None
    tokens: tuple[int, ...] | None = None
    pixels: Tensor | None = None
    vector: Tensor | None = None
    spelled: tuple[bytes | None, ...] | None = None


class Form(Protocol):
    """One form of a model."""

    def see(self, question: Question) -> Seen: ...


@dataclass(frozen=True)
class Check:
    """One line of the result; `equal` is None where there is nothing to compare."""

    what: str
    equal: bool | None
    note: str


# ---------------------------------------------------------------------------------------------- forms


@dataclass(frozen=True)
class Ours:
    """A model in memory, in evaluation mode, or a directory that `save_pretrained` or `isthmus train` wrote."""

    model: VLM

    @torch.inference_mode()
    def see(self, question: Question) -> Seen:
        processor = self.model.processor
        batch = processor.prompts([Sample((question.turn,))])
        output = self.model.run(batch)
        assert output.hidden_BTD is not None  # every joint with an LLM has states
        ids = batch.input_ids_BT.masked_fill(batch.modality_BT > 0, PICTURE)[0]
        answered = self.model.generate(
            batch,
            **PLAIN,
            max_new_tokens=LONGEST,
            pad_token_id=processor.pad,
            return_dict_in_generate=True,
            output_logits=True,
        )
        whole = answered.sequences[0]
        answer = whole if self.model.config.is_encoder_decoder else whole[len(ids) :]
        spell = Spelling(processor.tokenizer)
        return Seen(
            processor.decode(answer, skip_special_tokens=True).strip(),
            len(ids),
            _logprobs(answer, answered.logits),
            tuple(ids.tolist()),
            output.head(output.hidden_BTD)[0].float(),
            tuple(answer.tolist()),
            batch.media["image"].pixels if "image" in batch.media else None,
            self._vector(batch),
            tuple(spell(token, first=not place)[1] for place, token in enumerate(answer.tolist())),
        )

    def _vector(self, batch: Batch) -> Tensor | None:
        """A picture by itself, as `/v1/embeddings` makes a vector of it; None where the joint reads the question."""
        if "image" not in batch.media or batch.extra_text:
            return None
        return F.normalize(self.model.connect(batch)["image"][0].float().mean(0), dim=0).cpu()


@dataclass(frozen=True)
class Native:
    """A directory of a class of transformers, asked as its users ask it: chat template, then processor.

    BLIP-2's own processors put pictures before the whole text; here their markers stand in the turn, as ours do.
    """

    model: Any
    processor: Any

    @torch.inference_mode()
    def see(self, question: Question) -> Seen:
        tokenizer, inputs = self.processor.tokenizer, self._inputs(question)
        ids = inputs["input_ids"][0]
        logits = self.model(**inputs).logits[0].float()
        plain = PLAIN | {"suppress_tokens": self.model.generation_config.suppress_tokens}  # an export's marker
        answer = self.model.generate(**inputs, **plain, max_new_tokens=LONGEST)[0, len(ids) :]
        return Seen(
            tokenizer.decode(answer, skip_special_tokens=True).strip(),
            len(ids),
            None,  # they are shares of a vocabulary that has markers in it
            tuple(ids.masked_fill(ids == self.model.config.image_token_id, PICTURE).tolist()),
            logits,
            tuple(answer.tolist()),
            inputs.get("pixel_values"),
        )

    def _inputs(self, question: Question) -> dict[str, Any]:
        image = None if question.image is None else open_image(question.image.source)
        processor: Any = self.processor
        if not isinstance(self.processor, Blip2Processor | InstructBlipProcessor):
            text = self._text(question.prompt if image is None else f"{MARKER}\n{question.prompt}")
            return processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
        markers = "" if image is None else MARKER * processor.num_query_tokens
        text = self._text(markers + question.prompt)
        inputs = dict(processor.tokenizer(text, add_special_tokens=False, return_tensors="pt"))
        if image is not None:
            inputs |= processor.image_processor(image, return_tensors="pt")
            if isinstance(self.processor, InstructBlipProcessor):
                heard = processor.qformer_tokenizer(question.prompt, return_tensors="pt")
                inputs |= {f"qformer_{name}": heard[name] for name in ("input_ids", "attention_mask")}
        return inputs

    def _text(self, content: str) -> str:
        talk = [{"role": "user", "content": content}]
        return self.processor.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


@dataclass(frozen=True)
class Served:
    """A model behind an OpenAI-compatible endpoint."""

    remote: Remote

    def see(self, question: Question) -> Seen:
        with self.remote as remote:
            text = remote.say([question.turn])
        return Seen(text, **vars(told.told(self.remote.config, question.turn)))


def form(source: str, name: str | None = None, key_env: str | None = None) -> Form:
    """A form by directory, hub name or address.

    Args:
        source: where it is.
        name: what an endpoint calls the model.
        key_env: the environment variable with an endpoint's key.

    Raises:
        ConfigError: an endpoint without a name, or a directory that neither we nor transformers know.
    """
    if source.startswith(("http://", "https://")):
        if name is None:
            raise ConfigError(
                f"{source}: which model there?", "give its name with --name; `curl .../v1/models` lists them"
            )
        whole = {"side": MOST_PIXELS}  # no picture is longer: it travels in its own size
        fields = {"endpoint": source, "model": name, "key_env": key_env, "max_tokens": LONGEST, "picture": whole}
        return Served(Remote(check(RemoteConfig, fields, "endpoint")))
    folder = parts.folder(source)
    config = folder / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("model_type") == VLMConfig.model_type:
        ours = VLM.from_pretrained(folder, dtype=torch.float32)
        kernels_linear.use_pytorch(ours)
        return Ours(ours)
    try:
        with quiet():
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            processor = AutoProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(f"{source}: not a model that can be asked ({cause})", "name a model directory") from None
    if not processor.tokenizer.chat_template:
        raise ConfigError(f"{source}: its tokenizer has no chat template", "export the model again with one")
    return Native(model.eval(), processor)


# ---------------------------------------------------------------------------------------------- comparison


def compare(one: Form, other: Form, question: Question) -> list[Check]:
    """Every step from the picture to the answer, in the order in which they depend on each other."""
    a, b = one.see(question), other.see(question)
    return [
        _picture(a, b),
        _prompt(a, b),
        _logits(a, b),
        _tokens(a, b),
        _answer(a, b),
        Check("greedy text", a.text == b.text, "" if a.text == b.text else f"{a.text!r} and {b.text!r}"),
    ]


def equal(checks: list[Check]) -> bool:
    """Whether all that could be compared is equal."""
    return all(each.equal is not False for each in checks)


UNTOLD = "one of both does not tell"


def _numbers(what: str, a: Tensor | None, b: Tensor | None, tolerance: float) -> Check:
    if a is None or b is None:
        return Check(what, None, UNTOLD)
    if a.numel() != b.numel():
        return Check(what, False, f"{list(a.shape)} and {list(b.shape)}")
    if not a.numel():
        return Check(what, True, "none")
    difference = (a.flatten().float() - b.flatten().float()).abs().max().item()
    return Check(what, difference <= tolerance, f"largest difference {difference:.1e}")


def _picture(a: Seen, b: Seen) -> Check:
    """The prepared picture, or what encoder and joint make of it, where an endpoint tells no more."""
    found = _numbers("prepared picture", a.pixels, b.pixels, EXACT)
    if found.equal is not None or a.vector is None or b.vector is None:
        return found
    behind = _numbers(found.what, a.vector, b.vector, TOLERANCE)
    return Check(found.what, behind.equal, f"behind encoder and joint, {behind.note}")


def _prompt(a: Seen, b: Seen) -> Check:
    """The prompt's tokens, or how many they are, where an endpoint tells no more."""
    found = _sequence("token ids of the prompt", _marked(a.ids, b.ids), _marked(b.ids, a.ids))
    if found.equal is not None or a.length is None or b.length is None:
        return found
    if a.length != b.length:
        return Check(found.what, False, f"{a.length} and {b.length} of them")
    return Check(found.what, None, f"{a.length} in both, {UNTOLD} which")


def _marked(ids: tuple[int, ...] | None, other: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The ids with `PICTURE` for the placeholder that an endpoint has where the other's picture begins."""
    if ids is None or other is None or PICTURE in ids or PICTURE not in other[: len(ids)]:
        return ids
    placeholder = ids[other.index(PICTURE)]
    return tuple(PICTURE if each == placeholder else each for each in ids)


def _tokens(a: Seen, b: Seen) -> Check:
    """The answer's tokens: by their ids, or, where an endpoint tells no ids, by their bytes, the end left out."""
    what = f"first {LONGEST} greedy tokens"
    found = _sequence(what, a.tokens, b.tokens)
    if found.equal is not None or a.spelled is None or b.spelled is None:
        return found
    pairs = list(zip(a.spelled, b.spelled))
    apart = next((place for place, (x, y) in enumerate(pairs) if x != y and None not in (x, y)), None)
    if apart is not None:
        x, y = pairs[apart]
        return Check(what, False, f"by their bytes; the first that differs is number {apart + 1}: {x!r} and {y!r}")
    if abs(len(a.spelled) - len(b.spelled)) > 1:
        return Check(what, False, f"{len(a.spelled)} and {len(b.spelled)} of them")
    return Check(what, True, f"{len(pairs)}, by their bytes")


def _answer(a: Seen, b: Seen) -> Check:
    """How likely each token of the answer was; an endpoint leaves out the one that ends it."""
    what = "its log-probabilities"
    if a.logprobs is None or b.logprobs is None:
        return Check(what, None, UNTOLD)
    if a.text != b.text:
        return Check(what, None, "of different answers, not compared")
    count = min(len(a.logprobs), len(b.logprobs))
    return _numbers(what, torch.tensor(a.logprobs[:count]), torch.tensor(b.logprobs[:count]), TOLERANCE)


def _logprobs(answer_T: Tensor, logits: Sequence[Tensor]) -> tuple[float, ...]:
    """Of the tokens that were generated, whatever an encoder-decoder's answer begins with."""
    ids_U = answer_T[len(answer_T) - len(logits) :]
    return tuple(float(one_1V[0].float().log_softmax(-1)[token]) for one_1V, token in zip(logits, ids_U))


def _sequence(what: str, a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> Check:
    if a is None or b is None:
        return Check(what, None, UNTOLD)
    if a == b:
        return Check(what, True, f"{len(a)}")
    if len(a) != len(b):
        note = f"{len(a)} and {len(b)} of them"
        shorter = min(len(a), len(b))
        a, b = a[:shorter], b[:shorter]
    else:
        note = f"{len(a)}"
    apart = next((place for place, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), None)
    if apart is None:
        return Check(what, False, f"{note}; the shorter is the beginning of the longer")
    return Check(what, False, f"{note}; the first that differs is number {apart + 1}: {a[apart]} and {b[apart]}")


def _logits(a: Seen, b: Seen) -> Check:
    """At the prompt's positions, of the words that both know: a form may have rows more for its markers."""
    if a.logits is None or b.logits is None:
        return Check("logits", None, UNTOLD)
    if a.ids != b.ids:
        return Check("logits", None, "of different prompts, not compared")
    shared = min(a.logits.shape[-1], b.logits.shape[-1])
    return _numbers("logits", a.logits[..., :shared], b.logits[..., :shared], TOLERANCE)
