"""A stand-in for the model, its renderer and its collator: a tiny Llama that reads letters and mean colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image as Pillow
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from isthmus.types import Batch, Image, Media, Modality, Output, Past, Sample, Text, Turn

START = {"system": 1, "user": 2, "assistant": 3}
END, BREAK, PICTURE = 4, 5, 6
LETTER = 10  # ids of characters start here
QUERIES = 3


@dataclass
class FakeRendered:
    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    modality: list[int] = field(default_factory=list)
    media: list[Image] = field(default_factory=list)

    def add(self, ids: Sequence[int], trained: bool = False, modality: int = Modality.TEXT) -> None:
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.modality += [modality] * len(ids)


class FakeRenderer:
    """`<role>` text `<end>` `<break>` for every turn; the answer and its `<end>` are trained, the break is not."""

    calls = 0

    def render(self, turns: Sequence[Turn], open_answer: bool = False) -> FakeRendered:
        self.calls += 1
        rendered = FakeRendered()
        for turn in turns:
            mine = turn.role == "assistant"
            rendered.add([START[turn.role]])
            for part in turn.parts:
                if isinstance(part, Image):
                    rendered.add([PICTURE] * QUERIES, modality=Modality.IMAGE)
                    rendered.media.append(part)
                elif isinstance(part, Text):
                    rendered.add([LETTER + ord(c) % 90 for c in part.text], trained=mine)
            rendered.add([END], trained=mine)
            rendered.add([BREAK])
        if open_answer:
            rendered.add([START["assistant"]])
        return rendered


def colour(image: Image) -> Tensor:
    """Mean colour in [-1, 1]."""
    source = image.source
    picture = source if isinstance(source, Pillow.Image) else source.draw()  # type: ignore[union-attr]
    return torch.tensor(list(picture.convert("RGB").resize((1, 1)).getdata())[0]).float() / 127.5 - 1


class FakeCollator:
    """Left-padded prompts, open for an answer; a picture's pixels are its mean colour, [N, 3, 1, 1]."""

    def __init__(self, renderer: FakeRenderer) -> None:
        self.renderer = renderer

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        rendered = [self.renderer.render(sample.turns, open_answer=True) for sample in samples]
        width = max(len(r.ids) for r in rendered)

        def pad(rows: list[list[int]]) -> Tensor:
            return torch.tensor([[0] * (width - len(row)) + row for row in rows])

        pictures = [(row, image) for row, r in enumerate(rendered) for image in r.media]
        media = {}
        if pictures:
            pixels = torch.stack([colour(image) for _, image in pictures])[:, :, None, None]
            rows = torch.tensor([row for row, _ in pictures])
            media["image"] = Media(row_N=rows, segment_N=torch.ones_like(rows), at_N=rows, pixels=pixels)
        return Batch(
            input_ids_BT=pad([r.ids for r in rendered]),
            segment_BT=pad([[1] * len(r.ids) for r in rendered]),
            modality_BT=pad([r.modality for r in rendered]),
            media=media,
            ids=tuple(sample.id for sample in samples),
        )


class FakeVLM(nn.Module):
    """The interface of `isthmus.model.VLM` that evaluation uses, over an unmodified Llama."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.15,
        )
        self.llm = LlamaForCausalLM(config).eval()
        self.joint = nn.Linear(3, QUERIES * 32)
        self.tokens_run = 0

    @property
    def device(self) -> torch.device:
        return self.joint.weight.device

    def connect(self, pixels: Tensor) -> Tensor:
        """[N, 3, 1, 1] -> [N, Q, D]"""
        return self.joint(pixels.flatten(1)).view(-1, QUERIES, 32)

    def run(self, batch: Batch, past: Past | None = None, keep: bool = False, need: str = "hidden") -> Output:
        embed = self.llm.get_input_embeddings()
        connected = {"image": self.connect(batch.media["image"].pixels)} if batch.media else {}
        if need == "connected":
            return Output(None, connected, self.llm.lm_head, embed)
        length = batch.input_ids_BT.shape[1]
        embeds = embed(batch.input_ids_BT)
        if connected:
            at = batch.modality_BT[:, -length:] == Modality.IMAGE
            embeds[at] = connected["image"].flatten(0, 1)
        segment = batch.segment_BT
        positions = (segment.cumsum(1) - 1).clamp(min=0)[:, -length:]
        total = segment.shape[1]
        causal = torch.arange(total)[None, :] <= torch.arange(total - length, total)[:, None]
        same = segment[:, -length:, None] == segment[:, None, :]
        mask = torch.zeros(same.shape).masked_fill(~(causal & same), torch.finfo(torch.float32).min)[:, None]
        cache = past.cache if past is not None else DynamicCache()
        self.tokens_run += batch.input_ids_BT.numel()
        hidden = self.llm.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return Output(hidden, connected, self.llm.lm_head, embed, past=Past(cache) if keep else None)
