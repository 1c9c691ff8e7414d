"""Text and pictures in, model inputs out, and ids back to text: the processor that is saved beside a VLM.

It speaks two languages over one renderer: ours (`Sample`, `Batch`) and transformers' (`processor(images=, text=)`,
`apply_chat_template`), so that a saved model works with tools that know neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from isthmus import parts
from isthmus.config import Writing
from isthmus.data import chat, collate, formats, media, views
from isthmus.data.boxes import Decimals, Regions
from isthmus.data.hints import Hints
from isthmus.data.reading import Reader, padded
from isthmus.data.template import Template
from isthmus.tokens import name_tokens
from isthmus.types import (
    IGNORE,
    Batch,
    ConfigError,
    DataError,
    Features,
    Image,
    IsthmusError,
    Layout,
    Medium,
    Part,
    Reading,
    Sample,
    Source,
    Text,
    Turn,
)

if TYPE_CHECKING:
    from isthmus.model import VLM

MARKER = "<image>"
"""Where a picture goes in a plain string given to `__call__`; in conversations it is ordinary text."""
FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
"""What a directory holds of a processor, whatever the model."""
PADDING = {"padding", "max_length", "truncation", "padding_side", "pad_to_multiple_of", "size"}
IDLE = {"return_attention_mask", "return_token_type_ids", "return_mm_token_type_ids"}
"""Arguments of transformers' processors that change nothing here."""
PADDED = "leave it out: rows are padded on the left to the longest and never cut, pictures are the encoder's size"


class VLMProcessor(ProcessorMixin):
    """Tokenizer, image processor, and what the joint says of how media stand in the text.

    Args:
        layouts: per kind, the fields of `Layout`.
        placeholders: per kind, the token id that media vectors overwrite.
        aspect: how pictures become square.
        template: how conversations are written (see `Stage.template`).
        system: the system turn of conversations that have none.
        decoder_start: the first id of an encoder-decoder's decoder; None for a decoder alone.
        reading: the fields of `Reading`, where connectors read text; else None.
        boxes: the fields of a `BoxFormat`: how the joint writes regions; plain decimals by default.
        hints: the fields of `Hints`: how the joint writes tags; one behind the other by default.
        routes: whether the joint treats kinds of tasks apart.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        layouts: dict[str, dict[str, Any]] | None = None,
        placeholders: dict[str, int] | None = None,
        aspect: media.Aspect = "pad",
        template: Writing = "chat",
        system: str | None = None,
        decoder_start: int | None = None,
        reading: dict[str, Any] | None = None,
        boxes: dict[str, Any] | None = None,
        hints: dict[str, Any] | None = None,
        routes: bool = True,
        chat_template: str | None = None,
    ):
        self.layouts, self.placeholders = layouts or {}, placeholders or {}
        self.aspect, self.template, self.system, self.decoder_start = aspect, template, system, decoder_start
        self.reading, self.boxes = reading, boxes or Decimals().model_dump()
        self.hints, self.routes = hints or Hints().model_dump(), routes
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def of(cls, model: VLM, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> VLMProcessor:
        """The processor of a freshly composed model."""
        layouts = {kind: model.aligner.layout(kind, model.queries(kind)) for kind in model.encoders}
        names = model.aligner.new_tokens()
        hints = model.aligner.hints()
        around = "".join(layout.before + layout.after for layout in layouts.values()) + hints.sentence
        name_tokens(tokenizer, model.vocabulary - len(names), names, [name for name in names if name in around])
        reading = model.aligner.reading()
        return cls(
            model.encoders["image"].processor,
            tokenizer,
            layouts={kind: vars(layout) for kind, layout in layouts.items()},
            placeholders={kind: model.placeholder(kind) for kind in model.encoders},
            aspect=model.config.encoder("image").aspect,
            system=system,
            decoder_start=model.config.text_config.decoder_start_token_id if model.config.is_encoder_decoder else None,
            reading=None if reading is None else vars(reading) | {"tokenizer": parts.vocabulary(reading.tokenizer)},
            boxes=model.aligner.boxes().model_dump(),
            hints=hints.model_dump(),
            routes=model.aligner.routes,
            chat_template=tokenizer.chat_template,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **settings: Any
    ) -> VLMProcessor:
        """A processor from the directory (or hub name) of a saved model.

        Raises:
            IsthmusError: a file of the directory is missing or damaged; it is named.
        """
        if not (folder := Path(pretrained_model_name_or_path)).is_dir():
            return super().from_pretrained(pretrained_model_name_or_path, **settings)
        for name in FILES:
            parts.read_object(folder / name)
        try:
            return super().from_pretrained(folder, **settings)
        except Exception as error:  # `tokenizers` raises plain ones
            cause = next(iter(str(error).splitlines()), type(error).__name__)
            raise IsthmusError(f"{folder}: its processor cannot be read ({cause})", parts.AGAIN) from error

    # ------------------------------------------------------------------------------------ our language

    def renderer(self, template: Writing | None = None) -> chat.Renderer:
        """What turns conversations into ids, with the spans that are trained and the media's places."""
        layouts = {kind: Layout(**fields) for kind, fields in self.layouts.items()}
        return chat.Renderer(
            self.tokenizer,
            layouts,
            self.placeholders,
            template=template or self.template,
            system=self.system,
            decoder_start=self.decoder_start,
            regions=self.regions,
            hints=Hints(**self.hints),
        )

    @property
    def regions(self) -> Regions:
        """How this model writes and reads regions: in the coordinates of the square that its encoder sees."""
        return Regions.of(self.boxes, self.aspect)

    def reader(self, renderer: chat.Renderer) -> Reader | None:
        """What tokenizes the text that connectors read beside features, if they do."""
        end = self.tokenizer.eos_token_id
        begin = end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        if self.reading is None:
            return None
        return Reader(Reading(**self.reading), renderer.plain, (begin, end), renderer.regions.spell)

    def look(self, kind: str, seen: Sequence[Medium]) -> tuple[Tensor | None, Features | None]:
        """Pixels of media as they are, [N, C, H, W]; a feature cache is the other reader (`prepare.features`)."""
        pictures = (media.open_image(medium.source) for medium in seen)
        return torch.stack([views.pixels(picture, self.image_processor, self.aspect) for picture in pictures]), None

    def collator(
        self, look: collate.Look | None = None, template: Writing | None = None, **settings: Any
    ) -> collate.Collator:
        """A collator for this model; `settings` are those of `data.collate.Collator`."""
        renderer, look = self.renderer(template), self.look if look is None else look
        reader = self.reader(renderer)
        return collate.Collator(renderer, look, self.pad, reader=reader, routes=self.routes, **settings)

    def prompts(self, samples: Sequence[Sample], look: collate.Look | None = None) -> Batch:
        """A left-padded batch that ends where the assistant is to speak."""
        return self.collator(look, open_answer=True, side="left")(samples)

    @property
    def pad(self) -> int:
        """The id that fills rows up; masked everywhere, so any will do."""
        own, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return own if own is not None else end if end is not None else 0

    # ------------------------------------------------------------------------------------ transformers' language

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        **more: Any,
    ) -> BatchFeature:
        """Strings with one `<image>` per picture -> input_ids, attention_mask, pixel_values, image_at, left-padded
        (right-padded for an encoder-decoder).

        `image_at` [N, 2] is the row and column of each picture. Where the connector reads the question,
        `instruction_ids` [N, L] are the string without its markers.

        Args:
            images: a picture, those of all strings, or a list of them per string; each any `Source`, or whole levels
                as an array or tensor, [H, W, 3] or [3, H, W].

        Raises:
            DataError: the number of markers and of pictures differ, or something is no picture.
            ConfigError: an argument of transformers that has no meaning here, such as `truncation`.
        """
        refuse(more | {"padding": padding == "max_length"}, "the processor", PADDED, IDLE)
        if not isinstance(text, str | list | tuple | None):
            raise DataError(f"the text is a {type(text).__name__}", "call processor(images=..., text=...)")
        texts = [text] if isinstance(text, str) else list(text or [""])
        pictures = list(images) if isinstance(images, list | tuple) else [] if images is None else [images]
        counts = [string.count(MARKER) for string in texts]
        if pictures and all(isinstance(each, list | tuple) for each in pictures):
            shown, wanted = [len(each) for each in pictures], counts
            pictures = [picture for each in pictures for picture in each]
        else:
            shown, wanted = [len(pictures)], [sum(counts)]
        if shown != wanted:
            told = [" + ".join(map(str, each)) for each in (wanted, shown)]
            raise DataError(f"{told[0]} {MARKER} markers for {told[1]} pictures", "write one marker per picture")
        renderer, left = self.renderer(), map(_picture, pictures)
        rows = [renderer.render_string(_interleave(string, left)) for string in texts]
        width = max(len(row.ids) for row in rows)
        shift = [0 if self.decoder_start is not None else width - len(row.ids) for row in rows]
        behind = [width - gap - len(row.ids) for gap, row in zip(shift, rows)]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(
                [[self.pad] * gap + row.ids + [self.pad] * end for gap, row, end in zip(shift, rows, behind)]
            ),
            "attention_mask": torch.tensor(
                [[0] * gap + [1] * len(row.ids) + [0] * end for gap, row, end in zip(shift, rows, behind)]
            ),
        }
        if pictures:
            inputs["pixel_values"], _ = self.look("image", [image for row in rows for image in row.media])
            at = [(index, shift[index] + start) for index, row in enumerate(rows) for start, _ in row.spans]
            inputs["image_at"] = torch.tensor(at)
            reader = self.reader(renderer)
            if reader is not None and reader.reading.of == "question":
                read = [reader.encode(text.replace(MARKER, "").strip()) for text in texts]
                inputs["instruction_ids"] = padded([ids for ids, row in zip(read, rows) for _ in row.media])
        return BatchFeature(inputs, tensor_type=return_tensors)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        add_generation_prompt: bool | None = None,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str = "pt",
        padding: bool | str = True,
        processor_kwargs: Mapping[str, Any] | None = None,
        return_assistant_tokens_mask: bool = False,
        **more: Any,
    ) -> Any:
        """Messages in the common form (roles; text and image parts) -> model inputs, ending where the answer begins.

        Where the joint treats kinds of tasks apart, `route` [B] is that of each conversation, if one has regions.
        Without `return_dict` their ids alone, and without `tokenize` the string that `__call__` reads, with `<image>`
        for each picture, which may then be left out of its part.

        Args:
            add_generation_prompt: open an answer at the end; None does so unless the last turn is the assistant's.
            return_assistant_tokens_mask: add `assistant_masks`, 1 at what training would learn: answers with their
                ends, [B, T], or [B, U] of an encoder-decoder's decoder; nowhere if an answer is opened.

        Raises:
            DataError: no messages; or an answer is to be opened after an answer; or see `data.formats.turns`.
            ConfigError: an argument of transformers that has no meaning here.
        """
        more |= {**(processor_kwargs or {}), "padding": padding == "max_length"}
        remedy = PADDED if any(map(more.get, PADDING)) else "leave it out"
        refuse(more, "apply_chat_template", remedy, IDLE)
        if not conversation or isinstance(conversation, Mapping) or not all(conversation):
            raise DataError("there are no messages", "pass a list of {role, content}")
        alone = isinstance(conversation[0], Mapping)
        many = [conversation] if alone else conversation
        told = [formats.turns(messages if tokenize else [*map(_stood_in, messages)]) for messages in many]
        opens = _opens([turns[-1].role == "assistant" for turns in told], add_generation_prompt)
        if not tokenize:
            strings = [self._string(turns, opens) for turns in told]
            return strings[0] if alone else strings
        batch = self.collator(open_answer=opens, side="left")([*map(Sample, told)])
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT, "attention_mask": (batch.segment_BT > 0).long()}
        if batch.decoder_ids_BU is not None:
            inputs["decoder_input_ids"] = batch.decoder_ids_BU
        if "image" in batch.media:
            images = batch.media["image"]
            inputs |= {"pixel_values": images.pixels, "image_at": torch.stack([images.row_N, images.at_N], 1)}
        if "image" in batch.extra_text:
            inputs["instruction_ids"] = batch.extra_text["image"]
        if self.routes and batch.route_BT is not None:
            inputs["route"] = batch.route_BT.amax(1)  # a row is one conversation, and its padding is 0
        if return_assistant_tokens_mask:
            written = inputs.get("decoder_input_ids", batch.input_ids_BT)
            labels = torch.full_like(written, IGNORE) if batch.labels_BT is None else batch.labels_BT
            inputs["assistant_masks"] = (labels != IGNORE).long()
        features = BatchFeature(inputs, tensor_type=return_tensors)
        return features if return_dict else features["input_ids"]

    def _string(self, told: tuple[Turn, ...], open_answer: bool) -> str:
        """A conversation as the LLM's own template writes it."""
        if self.template != "chat" or self.decoder_start is not None:
            raise ConfigError(
                "this model's conversations are not written by a chat template", "leave tokenize=False out"
            )
        if self.system is not None and told[0].role != "system":
            told = (Turn.say("system", self.system), *told)
        written = [{"role": turn.role, "content": self._marked(turn.parts)} for turn in told]
        jinja = Template(self.tokenizer).jinja
        return str(
            self.tokenizer.apply_chat_template(
                written, chat_template=jinja, tokenize=False, add_generation_prompt=open_answer
            )
        )

    def _marked(self, parts: Sequence[Part]) -> str:
        """A turn in a string for `__call__`, where the line break behind a picture stands once, as when tokenized."""
        if not self.layouts.get("image", {}).get("after", "").endswith("\n"):
            return "".join(part.text if isinstance(part, Text) else MARKER for part in parts)
        string = "".join(part.text if isinstance(part, Text) else f"{MARKER}\n" for part in parts)
        return string.replace(f"{MARKER}\n\n", f"{MARKER}\n")

    def decode(self, ids: Any, **options: Any) -> str:
        """Ids to text; media placeholders are left out."""
        return self.tokenizer.decode([i for i in _list(ids) if i not in self.placeholders.values()], **options)

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        return [self.decode(row, **options) for row in rows]


def refuse(given: Mapping[str, Any], where: str, remedy: str, idle: Set[str] = frozenset()) -> None:
    """Let nothing be left out silently that transformers' users may ask for: what is off or idle passes.

    Raises:
        ConfigError: something else is asked for; it is named.
    """
    asked = [name for name, value in given.items() if name not in idle and value is not None and value is not False]
    if asked:
        raise ConfigError(f"{where} of this model does not take {', '.join(asked)}", remedy)


def _interleave(string: str, pictures: Iterator[Any]) -> list[str | Image]:
    """The pieces of a string with the next pictures in place of its markers."""
    first, *others = string.split(MARKER)
    return [first, *(part for piece in others for part in (next(pictures), piece))]


def _picture(given: Any) -> Image:
    """What somebody calls a picture."""
    if not isinstance(given, Source | np.ndarray | Tensor):
        raise DataError(f"{type(given).__name__} is no picture", "give a path, bytes or an open picture")
    return Image(given)  # type: ignore[arg-type]


def _opens(answered: Sequence[bool], asked: bool | None) -> bool:
    """Whether conversations, of which some may end with an answer, are to end where the assistant is to speak.

    Raises:
        DataError: they are asked to, and one of them ends with its answer; or, where nothing is asked, some of them do.
    """
    if asked and any(answered):
        raise DataError(
            "an answer cannot be opened after an answer", "leave add_generation_prompt out, or the last assistant turn"
        )
    if asked is None and len(set(answered)) > 1:
        raise DataError(
            f"{sum(answered)} of {len(answered)} conversations end with an answer",
            "pass those that end with a question in a call of their own",
        )
    return not any(answered) if asked is None else asked


def _stood_in(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message in whose image parts something stands, for where it does not matter what."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [{"type": "image", "image": MARKER} if part == {"type": "image"} else part for part in content]
    return {**message, "content": parts}


def _list(ids: Any) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)
