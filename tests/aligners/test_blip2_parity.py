"""Whole models against transformers' on the same weights: InstructBLIP's logits, and BLIP-2's two ways of retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
)

import composed
import isthmus
import tiny
from composed import picture, sample
from isthmus.config import Recipe
from isthmus.connectors.qformer import Shape
from isthmus.connectors.qformer_weights import take_over
from isthmus.types import Batch

Q = 3
SHAPE = Shape(queries=Q, layers=3, width=16, heads=2, inner=24, dropout=0.0, contrast=8, positions=32)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": tiny.IMAGE,
    "patch_size": tiny.PATCH,
    "layer_norm_eps": 1e-5,
}
QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 32,
    "cross_attention_frequency": 2,
    "max_position_embeddings": 32,
}


def stirred(model: PreTrainedModel) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def recipe_over(folder: Path, other: PreTrainedModel, aligner: dict[str, Any]) -> Recipe:
    """A recipe whose encoder is that of `other`, read from its checkpoint."""
    other.save_pretrained(folder)
    tiny.processor("clip").save_pretrained(folder)
    encoder = {"source": str(folder), "layer": -1, "class_token": "keep"}
    return composed.recipe("opt").but(encoder=encoder, aligner=aligner)


@torch.no_grad()
def test_the_whole_equals_transformers_instructblip(tmp_path: Path) -> None:
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config={**QFORMER, "vocab_size": tiny.VOCAB},
        text_config=tiny.llm("opt").config.to_dict(),
        num_query_tokens=Q,
        image_token_index=tiny.VOCAB - 1,
    )
    other = stirred(InstructBlipForConditionalGeneration(config))
    options = {**SHAPE.model_dump(), "vocabulary": tiny.VOCAB}
    recipe = recipe_over(tmp_path, other, {"name": "instructblip", "options": options})
    llm = tmp_path / "llm"
    other.language_model.save_pretrained(llm)
    tiny.tokenizer().save_pretrained(llm)
    ours = isthmus.compose(recipe.but(llm={"source": str(llm)}))
    take_over(ours.connectors["image"], other.state_dict(), project=True)
    pairs = [sample(picture(1), "what is it?"), sample(picture(2), "is the dog on the left?")]
    batch = ours.processor.collator()(pairs)
    asked, real = batch.extra_text["image"], batch.segment_BT > 0
    assert (asked < 0).any()  # one instruction is shorter

    def logits(instruction: torch.Tensor) -> torch.Tensor:
        return other(
            pixel_values=batch.media["image"].pixels,
            qformer_input_ids=instruction.clamp(min=0),
            qformer_attention_mask=(instruction >= 0).long(),
            input_ids=batch.input_ids_BT.masked_fill(batch.modality_BT > 0, tiny.VOCAB - 1),
            attention_mask=real.long(),
        ).logits[real]

    output = ours.run(batch)
    found = output.head(output.hidden_BTD)[real]
    torch.testing.assert_close(found, logits(asked), atol=1e-4, rtol=1e-4)
    assert (found - logits(asked.flip(0))).abs().max() > 1e-3  # the instruction counts


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> tuple[Blip2ForImageTextRetrieval, Any, Batch]:
    """Theirs, ours on its weights, and three captioned pictures."""
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "vocab_size": tiny.VOCAB + 1, "use_qformer_text_input": True},
        text_config=tiny.llm("opt").config.to_dict(),
        num_query_tokens=Q,
        image_text_hidden_size=8,
        image_token_index=None,
    )
    other = stirred(Blip2ForImageTextRetrieval(config))
    folder = tmp_path_factory.mktemp("retrieval")
    options = {**SHAPE.model_dump(), "vocabulary": tiny.VOCAB + 1, "text": True, "qformer": str(folder)}
    ours = isthmus.compose(recipe_over(folder, other, {"name": "blip2", "options": options}))
    texts = ["a cat", "the dog is here", "on the left"]
    pairs = [sample(picture(n), answer=text) for n, text in enumerate(texts, 1)]
    return other, ours, ours.processor.collator()(pairs)


@torch.no_grad()
@pytest.mark.parametrize("matching", [False, True], ids=["itc", "itm"])
def test_retrieval_equals_transformers_blip2(retrieval: Any, matching: bool) -> None:
    other, ours, batch = retrieval
    former, ids = ours.connectors["image"], batch.extra_text["image"]
    expected = other(
        pixel_values=batch.media["image"].pixels,
        input_ids=ids.clamp(min=0),
        attention_mask=(ids >= 0).long(),
        use_image_text_matching_head=matching,
    ).logits_per_image
    features = ours.encode("image", batch.media["image"])
    if matching:
        found = former.heads.match(former.see(features, ids)[-1][:, :Q]).mean(1)
    else:
        found = former.heads.similarity(former.see(features)[-1], former.read(ids)[:, 0]) * former.heads.temperature
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 1e-3
